"""Faster layers for CUDA give the model's own logits; through Triton's interpreter where there is no GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.builders_engine import TokenNames, generate, make_request, make_settings, reference_tokens, tiny_model
from tests.builders_models import VOCAB_SIZE, tiny_module
from tests.builders_triton import DEVICE, enlarge_tiles
from worker.engine import fuse_cuda
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.attention.triton_paged import TritonAttention
from worker.engine.fuse_cuda import KernelNorm, speed_up
from worker.engine.graphs import GraphRunner, run_again
from worker.engine.kernels.triton import layers, vector
from worker.engine.loadcheck import check_module
from worker.engine.loop import Engine
from worker.engine.runner import ModelRunner

MERGED, GATED, NORMS = "merged projections", "gated layers", "norms"
ROTARY, SUMS = "rotary embedding", "residual sums"
HEAD = "head"  # in 16 bits alone
ALL = (MERGED, GATED, NORMS, ROTARY, SUMS)


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond for what a GPU does in one of a thousand places at once."""
    monkeypatch.setattr(fuse_cuda, "_TEST_TOKENS", 2)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE, dtype)


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = 1e-5 if actual.dtype == torch.float32 else 2e-2
    return torch.allclose(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
class TestKernels:
    @pytest.mark.parametrize("width", [7, 64, 600])
    @pytest.mark.parametrize("offset", [0.0, 1.0])
    def test_norm(self, width: int, offset: float, dtype: torch.dtype) -> None:
        x, weight = rand(1, 3, width, dtype=dtype) * 5, rand(width, dtype=dtype)
        expected = nn.functional.rms_norm(x.double(), (width,), weight.double() + offset, 1e-3)
        assert close(layers.rms_norm(x, weight, 1e-3, offset), expected)

    def test_norm_of_heads_within_a_merged_product(self, dtype: torch.dtype) -> None:
        merged = rand(1, 3, 10 * 16, dtype=dtype)
        heads = merged[..., 32:96].view(1, 3, 4, 16)
        assert not heads.is_contiguous()
        weight = rand(16, dtype=dtype)
        output = layers.rms_norm(heads, weight, 1e-6, 0.0)
        assert output.is_contiguous()
        assert close(output, nn.functional.rms_norm(heads.double(), (16,), weight.double(), 1e-6))

    @pytest.mark.filterwarnings("ignore:overflow")  # an exponential that is infinite is right here
    @pytest.mark.parametrize("width", [5, 96, 1500])
    def test_gated_activations(self, width: int, dtype: torch.dtype) -> None:
        x = rand(1, 2, 2 * width, dtype=dtype) * 4
        gate, up = x.double().chunk(2, dim=-1)
        assert close(layers.gated(x, layers.SILU), nn.functional.silu(gate) * up)
        assert close(layers.gated(x, layers.GELU_TANH), nn.functional.gelu(gate, approximate="tanh") * up)

    @pytest.mark.filterwarnings("ignore:overflow")
    def test_activations_of_extreme_values_are_finite(self, dtype: torch.dtype) -> None:
        x = torch.tensor([[-200.0, 200.0, 0.0, 1.0, 1.0, 1.0]], device=DEVICE, dtype=dtype)
        for activation in (layers.SILU, layers.GELU_TANH):
            assert layers.gated(x, activation).tolist() == [[0.0, 200.0, 0.0]]

    @pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 16), (2, 2, 64), (17, 1, 6)])
    def test_rotary_embedding(self, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        merged = rand(1, 4, (heads + kv_heads) * dim, dtype=dtype)
        query, key = (
            part.view(1, 4, -1, dim).transpose(1, 2) for part in merged.split([heads * dim, kv_heads * dim], -1)
        )
        cos, sin = rand(1, 4, dim, dtype=dtype), rand(1, 4, dim, dtype=dtype).flip(-1)
        expected = []
        for x in (query.double(), key.double()):
            first, second = x.chunk(2, dim=-1)
            expected.append(x * cos.double()[:, None] + torch.cat([-second, first], -1) * sin.double()[:, None])
        layers.rotate_in_place(query, key, cos, sin)
        assert close(query, expected[0])
        assert close(key, expected[1])


def logits(module: nn.Module, num_tokens: int = 9) -> torch.Tensor:
    tokens = torch.randint(VOCAB_SIZE, (1, num_tokens), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    with torch.inference_mode():
        result: torch.Tensor = module(input_ids=tokens, use_cache=False).logits
    return result


def small(family: str, **changes: Any) -> Any:
    return tiny_module(family, num_hidden_layers=2, **changes).to(DEVICE)


class TestVector:
    """A matrix times one row, with what stands around it."""

    @pytest.mark.parametrize(("num_outputs", "depth"), [(24, 64), (10, 48), (7, 96), (16, 4096)])
    @pytest.mark.parametrize("offset", [None, 0.0, 1.0])
    def test_product_of_a_normed_row_plus_an_addend(self, num_outputs: int, depth: int, offset: float | None) -> None:
        x, weight, addend, norm = (
            rand(*shape, dtype=torch.bfloat16)
            for shape in [(1, 1, depth), (num_outputs, depth), (num_outputs,), (depth,)]
        )
        assert vector.fits(weight)
        row = x.double()[0, 0]
        if offset is not None:
            row = nn.functional.rms_norm(row, (depth,), norm.double() + offset, 1e-3)
        expected = weight.double() @ row + addend.double()
        before = None if offset is None else vector.Norm(norm, 1e-3, offset)
        actual = vector.multiply(x, weight, addend=addend, norm=before)
        assert actual.shape == (1, 1, num_outputs)
        assert (actual[0, 0].double() - expected).norm() <= 1e-2 * expected.norm()

    @pytest.mark.parametrize("activation", [layers.SILU, layers.GELU_TANH])
    def test_gated(self, activation: int) -> None:
        x, weight = rand(1, 64, dtype=torch.bfloat16), rand(2 * 12, 64, dtype=torch.bfloat16) / 4
        gate, up = (weight.double() @ x.double()[0]).chunk(2)
        function = nn.functional.silu if activation == layers.SILU else partial(nn.functional.gelu, approximate="tanh")
        expected = function(gate) * up
        actual = vector.multiply(x, weight, activation=activation)[0]
        assert (actual.double() - expected).norm() <= 1e-2 * expected.norm()

    def test_a_sum_in_place(self) -> None:
        x, weight, total = (rand(*shape, dtype=torch.bfloat16) for shape in [(1, 32), (16, 32), (1, 16)])
        expected = total.double() + x.double() @ weight.double().t()
        assert vector.multiply(x, weight, addend=total, in_place=True) is total
        assert close(total, expected)

    def test_weights_that_it_does_not_take(self) -> None:
        assert not vector.fits(rand(8, 64))  # float32 is for exactness: cuBLAS has it
        assert not vector.fits(rand(8, 40, dtype=torch.bfloat16))
        assert not vector.fits(rand(8, 64, dtype=torch.bfloat16).t())


def test_a_decode_alone_has_norms_and_sums_in_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    enlarge_tiles(monkeypatch)
    module = small("llama", vocab_size=40).to(torch.bfloat16)
    assert speed_up(module) == (*ALL, HEAD)
    shapes: list[tuple[int, ...]] = []
    multiply = vector.multiply

    def count(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        shapes.append(tuple(weight.shape))
        return multiply(x, weight, **options)

    monkeypatch.setattr(vector, "multiply", count)
    tokens = torch.tensor([[3]], device=DEVICE)
    alone = module(input_ids=tokens, use_cache=False).logits[0, 0]
    num_layers = module.config.num_hidden_layers
    assert len(shapes) == 4 * num_layers + 1  # projections, their end, gate with up, their end; the head
    for layer in module.model.layers:  # a hook, as adapters have, is to see what is normed
        layer.self_attn.q_proj.register_forward_hook(lambda *_: None)
    shapes.clear()
    other = module(input_ids=tokens, use_cache=False).logits[0, 0]
    assert len(shapes) == 2 * num_layers + 1
    assert (alone - other).norm() <= 2e-2 * other.norm()


@pytest.mark.parametrize(
    ("family", "kept"),
    [
        ("llama", ALL),
        ("qwen3", ALL),  # norms of queries and keys
        ("gemma2", (MERGED, GATED, NORMS, ROTARY)),  # four norms a layer, weights stored less one, GELU
        ("glm", (MERGED, NORMS)),  # turns neighbours, not halves
        ("gpt2", ()),
    ],
)
def test_families_keep_what_their_class_bears_and_their_logits(family: str, kept: tuple[str, ...]) -> None:
    module = small(family)
    before = logits(module)
    assert speed_up(module) == kept
    assert (logits(module) - before).norm() <= 1e-5 * before.norm()


def test_bfloat16_keeps_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    enlarge_tiles(monkeypatch)
    module = small("llama", dtype=torch.bfloat16)
    before = logits(module).float()
    assert speed_up(module) == (*ALL, HEAD)
    assert (logits(module).float() - before).norm() <= 0.05 * before.norm()


def test_a_changed_model_passes_the_load_check() -> None:
    module = small("mistral")
    assert speed_up(module) == ALL
    check_module(module, TorchAttention(16))


def test_the_whole_path_of_a_gpu_decodes_what_transformers_does() -> None:
    """Changed layers, Triton attention and replayed steps together."""
    model = tiny_model("llama", num_hidden_layers=2).to(DEVICE)
    requests = [make_request(f"r{n}", range(3, 3 + n), max_tokens=4) for n in (2, 9)]
    expected = [reference_tokens(model, r.prompt_token_ids, r.sampling) for r in requests]
    assert speed_up(model) == ALL
    settings = make_settings(block_size=16, num_blocks=8)
    runner = GraphRunner(ModelRunner(model, TritonAttention(), settings), run_again, 2, 16, 16)
    results = generate(Engine(runner, settings, TokenNames), *requests)
    assert [results[r.request_id].tokens[0] for r in requests] == expected


class TestTakenBack:
    """What is not what its names say stays as it was."""

    def test_a_gated_layer_of_another_formula(self) -> None:
        module = small("llama")
        mlp = module.model.layers[1].mlp
        mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) + mlp.up_proj(x))
        before = logits(module)
        assert speed_up(module) == (MERGED, NORMS, ROTARY)
        assert (logits(module) - before).norm() <= 1e-5 * before.norm()

    def test_projections_of_different_inputs(self) -> None:
        module = small("llama")
        attention = module.model.layers[1].self_attn
        value = attention.v_proj
        value.forward = lambda x: nn.functional.linear(x * 2, value.weight)
        attention.v_proj = nn.Sequential(value)
        before = logits(module)
        assert speed_up(module)[0] == MERGED  # of the other layer
        assert (logits(module) - before).norm() <= 1e-5 * before.norm()

    def test_a_norm_of_another_formula(self) -> None:
        class MeanRMSNorm(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(64))
                self.variance_epsilon = 1e-6

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return nn.functional.layer_norm(x, (64,), self.weight, None, self.variance_epsilon)

        module = small("llama")
        module.model.norm = MeanRMSNorm().to(DEVICE)
        before = logits(module)
        assert speed_up(module) == ALL
        assert not isinstance(module.model.norm, KernelNorm)
        assert (logits(module) - before).norm() <= 1e-5 * before.norm()

    def test_a_residual_with_a_factor(self) -> None:
        module = small("granite", residual_multiplier=0.5)
        before = logits(module)
        assert speed_up(module) == (MERGED, GATED, NORMS, ROTARY)
        assert (logits(module) - before).norm() <= 1e-5 * before.norm()

    def test_a_layer_that_adds_otherwise(self) -> None:
        module = small("llama")
        layer = module.model.layers[0]
        original = layer.forward
        layer.forward = lambda hidden_states, **kwargs: 2 * original(hidden_states, **kwargs)
        before = logits(module)
        assert speed_up(module) == (MERGED, GATED, NORMS, ROTARY)
        assert (logits(module) - before).norm() <= 1e-5 * before.norm()
