"""Which families are served, and that every one which would answer wrongly is refused with its name and the reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from tests.builders_models import RIGHT_FAMILIES, WRONG_FAMILIES, tiny_config, tiny_module, write_tiny_model
from worker.engine import loadcheck
from worker.engine.attention import hf
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.attention.interface import AttentionBatch, AttentionOptions, LayerCache
from worker.engine.loadcheck import UnsupportedFamilyError, check_config, check_model, check_module, context_length
from worker.engine.model import load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backend() -> CpuAttention:
    return CpuAttention()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", RIGHT_FAMILIES)
def test_a_family_that_answers_exactly_passes(family: str, dtype: torch.dtype, backend: CpuAttention) -> None:
    error = check_module(tiny_module(family, dtype=dtype), backend)
    assert error < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("family", WRONG_FAMILIES)
def test_a_family_that_would_answer_wrongly_is_refused_by_name(family: str, backend: CpuAttention) -> None:
    with pytest.raises(UnsupportedFamilyError, match=rf"the family {family} ") as refusal:
        check_module(tiny_module(family), backend)
    reasons = ("layers of type", "attention interface", "never calls")
    assert any(reason in str(refusal.value) for reason in reasons)


def test_chunked_attention_is_noticed_in_the_logits_even_where_the_configuration_hides_it(
    backend: CpuAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loadcheck, "check_config", lambda config: None)
    with pytest.raises(UnsupportedFamilyError, match=r"llama4_text cannot be served: .*other logits than alone"):
        check_module(tiny_module("llama4_text"), backend)


@pytest.mark.parametrize(
    "changes",
    [
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"multi_query": False, "parallel_attn": False, "bias": True},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_falcon_answers_exactly_in_each_of_its_shapes(
    changes: dict[str, Any], dtype: torch.dtype, backend: CpuAttention
) -> None:
    assert check_module(tiny_module("falcon", dtype=dtype, **changes), backend) < (
        1e-5 if dtype == torch.float32 else 0.1
    )


def test_falcon_with_alibi_is_refused(backend: CpuAttention) -> None:
    with pytest.raises(UnsupportedFamilyError, match=r"the family falcon cannot be served: .*attention interface"):
        check_module(tiny_module("falcon", alibi=True), backend)


@pytest.mark.parametrize("family", ["falcon", "gptj", "codegen", "gpt_neo"])
def test_a_family_with_a_call_site_of_ours_answers_as_before_outside_of_a_step(family: str) -> None:
    module, tokens = tiny_module(family), torch.arange(3, 40)[None]
    with torch.inference_mode():
        before = module(input_ids=tokens, use_cache=False).logits
        for _ in range(2):
            hf.install(module)
        assert torch.equal(module(input_ids=tokens, use_cache=False).logits, before)


@dataclass
class Faulty:
    """The CPU back-end with one fault."""

    backend: CpuAttention
    fault: str
    name: str = "faulty"
    block_size: int = 16

    def allocate(self, *arguments: Any) -> LayerCache:
        return self.backend.allocate(*arguments)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        output = self.backend.attend(query, key, value, cache, batch, options)
        match self.fault:
            case "mixes neighbours":
                return output.roll(1, dims=0)
            case "forgets the cache":
                cache.keys.zero_()
            case "answers NaN":
                output[-1] = float("nan")
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["mixes neighbours", "forgets the cache", "answers NaN"])
def test_a_back_end_that_is_wrong_is_noticed(fault: str, dtype: torch.dtype, backend: CpuAttention) -> None:
    if fault == "answers NaN" and dtype == torch.bfloat16:
        dtype = torch.float32  # in bfloat16 the median of rows counts, and one row's NaN is the engine's to report
    with pytest.raises(UnsupportedFamilyError, match=r"the family llama cannot be served: .*other logits than alone"):
        check_module(tiny_module("llama", dtype=dtype), Faulty(backend, fault))


class _SkipsItsAttention(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return hidden_states, None


def without_attention_in_layer_2() -> PreTrainedModel:
    module = tiny_module("llama")
    module.model.layers[2].self_attn = _SkipsItsAttention()
    return module


def test_a_layer_that_never_calls_attention_is_counted(backend: CpuAttention) -> None:
    with pytest.raises(UnsupportedFamilyError, match="the family llama cannot be served: 3 of 4 layers call attention"):
        check_module(without_attention_in_layer_2(), backend)


def test_two_layers_that_share_an_index_would_share_a_cache(backend: CpuAttention) -> None:
    module = tiny_module("llama")
    module.model.layers[3].self_attn.layer_idx = 1
    with pytest.raises(UnsupportedFamilyError, match="calls attention more than once"):
        check_module(module, backend)


def test_an_encoder_is_refused() -> None:
    with pytest.raises(UnsupportedFamilyError, match="the family llama has an encoder"):
        check_config(tiny_config("llama", is_encoder_decoder=True))


class TestRopeThatDependsOnLength:
    """Its frequencies switch at a length taken over the whole batch; below that length it is constant."""

    @staticmethod
    def config(kind: str) -> dict[str, Any]:
        """Changes to a tiny configuration of 256 positions."""
        common = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
        if kind != "longrope":
            return {"rope_parameters": {**common, "original_max_position_embeddings": 64} if kind == "yarn" else common}
        factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
        return {"original_max_position_embeddings": 64, "rope_parameters": {**common, **factors}}

    def test_longrope_is_served_up_to_its_original_length(self) -> None:
        assert context_length(tiny_config("phi3", **self.config("longrope"))) == 64

    def test_other_rope_is_served_to_the_end(self) -> None:
        assert context_length(tiny_config("llama")) == 256
        assert context_length(tiny_config("llama", **self.config("yarn"))) == 256

    @pytest.mark.parametrize(("family", "kind"), [("phi3", "longrope"), ("llama", "dynamic")])
    def test_within_that_length_the_longest_neighbour_changes_nothing(
        self, family: str, kind: str, backend: CpuAttention
    ) -> None:
        module = tiny_module(family, **self.config(kind))
        limit = context_length(module.config)
        check_module(module, backend)
        hf.install(module)
        shapes = hf.probe_layer_shapes(module, CPU)

        def first_row(neighbour_position: int) -> torch.Tensor:
            """Logits of a token at position 5, beside a token at another position."""
            paged = hf.PagedAttention(
                backend, {i: backend.allocate(s, 40, module.dtype, CPU) for i, s in shapes.items()}
            )
            width = neighbour_position // 16 + 1
            paged.batch = AttentionBatch(
                slots=torch.tensor([16 + 5, 32 + neighbour_position], dtype=torch.int32),
                block_tables=torch.tensor([[1] * width, list(range(2, 2 + width))], dtype=torch.int32),
                query_starts=torch.tensor([0, 1, 2], dtype=torch.int32),
                context_lens=torch.tensor([6, neighbour_position + 1], dtype=torch.int32),
                max_query_len=1,
                max_context_len=neighbour_position + 1,
            )
            positions = torch.tensor([[5, neighbour_position]])
            with torch.inference_mode(), hf.attention(paged):
                logits: torch.Tensor = module(input_ids=torch.tensor([[7, 9]]), position_ids=positions).logits[0, 0]
            return logits

        alone = first_row(6)
        assert torch.equal(first_row(limit - 1), alone)
        assert not torch.equal(first_row(limit + 63), alone)  # the reason for the limit


def test_a_family_without_a_context_length_is_refused() -> None:
    with pytest.raises(UnsupportedFamilyError, match="no context length"):
        context_length(PretrainedConfig())


def test_a_passed_check_is_remembered_for_the_same_weights_and_only_for_them(
    tmp_path: Path, backend: CpuAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def count(module: PreTrainedModel, backend: CpuAttention, tolerance: float | None) -> float:
        ran.append(module.config.model_type)
        return check_module(module, backend, tolerance)

    monkeypatch.setattr(loadcheck, "check_module", count)
    folder = write_tiny_model(tmp_path / "one")
    for _ in range(2):
        check_model(load_model(str(folder), torch.float32, CPU, cache_root=tmp_path), backend, tmp_path)
    assert ran == ["llama"]
    check_model(load_model(str(folder), torch.bfloat16, CPU, cache_root=tmp_path), backend, tmp_path)
    other = write_tiny_model(tmp_path / "two", seed=1)
    check_model(load_model(str(other), torch.float32, CPU, cache_root=tmp_path), backend, tmp_path)
    assert ran == ["llama"] * 3


def test_a_refusal_is_not_remembered_as_a_pass(tmp_path: Path, backend: CpuAttention) -> None:
    loaded = load_model(str(write_tiny_model(tmp_path / "model")), torch.float32, CPU, cache_root=tmp_path)
    for _ in range(2):
        with pytest.raises(UnsupportedFamilyError):
            check_model(loaded, Faulty(backend, "mixes neighbours"), tmp_path)
    check_model(loaded, backend, tmp_path)
