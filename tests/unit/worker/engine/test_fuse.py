"""Faster layers give the model's own logits, and a change that would not is taken back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.builders_models import RIGHT_FAMILIES, VOCAB_SIZE, tiny_module
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.demo import demo_model_dir
from worker.engine.fuse import OneCallNorm, PackedLinear, speed_up
from worker.engine.loadcheck import check_module

MERGED, PACKED, NORMS = "merged linear layers", "packed linear layers", "norms"


def changes_kept(dtype: torch.dtype) -> tuple[str, ...]:
    """What a Llama-shaped model keeps: oneDNN packs bfloat16 only for processors that multiply it."""
    can_pack = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (MERGED, PACKED, NORMS) if can_pack else (NORMS,)


def logits(module: nn.Module, num_tokens: int = 50) -> torch.Tensor:
    tokens = torch.randint(VOCAB_SIZE, (2, num_tokens), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        result: torch.Tensor = module(input_ids=tokens, use_cache=False).logits
    return result


@pytest.mark.parametrize("family", RIGHT_FAMILIES)
def test_every_family_keeps_its_logits_and_passes_the_load_check(family: str) -> None:
    module = tiny_module(family)
    before = logits(module)
    kept = speed_up(module)
    assert PACKED in kept or MERGED in kept
    assert (logits(module) - before).norm() <= 1e-5 * before.norm()
    check_module(module, CpuAttention())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_shaped_families_keep_every_change_that_the_processor_can(family: str, dtype: torch.dtype) -> None:
    module = tiny_module(family, dtype=dtype)
    kept = speed_up(module)
    assert kept == changes_kept(dtype)
    assert any(type(layer) is nn.Linear for layer in module.modules()) != (PACKED in kept)


def test_gpt2_s_transposed_layers_are_packed() -> None:
    module = tiny_module("gpt2")
    assert speed_up(module) == (PACKED,)
    assert sum(isinstance(layer, PackedLinear) for layer in module.modules()) == 4 * 4 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_demo_model_answers_as_before(dtype: torch.dtype) -> None:
    folder: Path = demo_model_dir()
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    text = "The quick brown fox jumps over the lazy dog. In 1969 men landed on the Moon, and the world watched. " * 3
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        before = module(input_ids=tokens, use_cache=False).logits[0].float()
        assert speed_up(module) == changes_kept(dtype)
        after = module(input_ids=tokens, use_cache=False).logits[0].float()
    same = (before.argmax(-1) == after.argmax(-1)).float().mean().item()
    if dtype == torch.float32:
        assert same == 1.0
        assert (before - after).abs().max() < 1e-3  # logits reach 38
    else:
        assert same > 0.93  # bfloat16 against float32 differs as much


def test_a_bias_is_kept() -> None:
    layers = [nn.Linear(24, width) for width in (8, 5)]
    x = torch.randn(3, 24)
    with torch.inference_mode():
        expected = torch.cat([layer(x) for layer in layers], dim=-1)
        assert torch.allclose(PackedLinear(layers)(x), expected, atol=1e-6)


class TestTakenBack:
    """What the model's class does not bear, or what is not the norm it is called, stays as it was."""

    def test_layers_called_in_another_order_are_not_merged(self) -> None:
        module = tiny_module("llama")
        mlp = module.model.layers[1].mlp

        def forward(x: torch.Tensor) -> torch.Tensor:
            up = mlp.up_proj(x)
            result: torch.Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * up)
            return result

        mlp.forward = forward
        before = logits(module)
        assert speed_up(module) == (PACKED, NORMS)
        assert (logits(module) - before).norm() <= 1e-5 * before.norm()

    def test_layers_called_with_other_inputs_are_not_merged(self) -> None:
        module = tiny_module("llama")
        mlp = module.model.layers[1].mlp
        mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x * 2))
        before = logits(module)
        assert speed_up(module) == (PACKED, NORMS)
        assert (logits(module) - before).norm() <= 1e-5 * before.norm()

    def test_a_class_that_reads_a_layer_s_weight_keeps_it(self) -> None:
        module = tiny_module("llama")
        mlp = module.model.layers[1].mlp
        mlp.forward = lambda x: nn.functional.linear(x, mlp.gate_proj.weight) @ mlp.down_proj.weight.t()
        before = logits(module)
        assert speed_up(module) == (NORMS,)
        assert torch.allclose(logits(module), before, rtol=1e-4, atol=1e-4)

    def test_a_norm_of_another_formula_stays(self) -> None:
        class OffsetRMSNorm(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(64))
                self.variance_epsilon = 1e-6

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return nn.functional.rms_norm(x, (64,), 1 + self.weight, self.variance_epsilon)

        module = tiny_module("llama")
        module.model.norm = OffsetRMSNorm()
        before = logits(module)
        assert speed_up(module) == (MERGED, PACKED)
        assert not any(isinstance(layer, OneCallNorm) for layer in module.modules())
        assert (logits(module) - before).norm() <= 1e-5 * before.norm()
