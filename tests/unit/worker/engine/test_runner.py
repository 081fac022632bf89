from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.builders_engine import generate, make_request, make_settings, tiny_model
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.loop import Engine
from worker.engine.runner import ModelRunner, StepOutOfMemory
from worker.engine.scheduler import Chunk, Plan
from worker.engine.sequence import Sequence
from worker.engine.settings import EngineSettings
from worker.engine.stopping import Detokenizer


class NoText:
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def make_plan(prompt: list[int], num_computed: int = 0, is_last: bool = True) -> Plan:
    sequence = Sequence("r", prompt, make_request().sampling)
    sequence.block_ids.extend(range(1, 9))
    sequence.num_computed_tokens = num_computed
    return Plan((Chunk(sequence, len(prompt) - num_computed, is_last),), len(prompt) - num_computed)


def test_the_cache_takes_as_many_blocks_as_its_bytes_hold() -> None:
    model = tiny_model("llama")
    block_bytes = 4 * 4 * 2 * (16 + 16) * 4  # layers, slots, heads, key and value, fp32
    settings = make_settings(kv_cache_bytes=10 * block_bytes + 1)
    assert ModelRunner(model, TorchAttention(4), settings).num_blocks == 11  # and the scratch block


def test_a_cache_without_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_cache_bytes \(100\) is less than one block"):
        ModelRunner(tiny_model("llama"), TorchAttention(4), make_settings(kv_cache_bytes=100))


def test_a_back_end_of_another_block_size_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size is 4, but torch_ref uses 16"):
        ModelRunner(tiny_model("llama"), TorchAttention(16), make_settings())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"num_blocks": 10}, 40), ({"num_blocks": 100}, 256), ({"num_blocks": 100, "max_model_len": 50}, 50)],
)
def test_a_sequence_is_bounded_by_positions_settings_and_cache(settings: dict[str, Any], expected: int) -> None:
    assert ModelRunner(tiny_model("llama"), TorchAttention(4), make_settings(**settings)).max_model_len == expected


def test_a_chunk_that_is_not_the_last_gives_no_logits() -> None:
    runner = ModelRunner(tiny_model("llama"), TorchAttention(4), make_settings(num_blocks=40))
    assert runner.execute(make_plan([3, 4, 5], is_last=False)).shape == (0, 200)
    assert runner.execute(make_plan([3, 4, 5])).shape == (1, 200)


def test_a_family_that_takes_no_logit_rows_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    expected = ModelRunner(model, TorchAttention(4), make_settings(num_blocks=40)).execute(make_plan([3, 4, 5]))
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda input_ids, position_ids, use_cache: forward(input_ids, position_ids=position_ids, use_cache=use_cache),
    )
    runner = ModelRunner(model, TorchAttention(4), make_settings(num_blocks=40))
    torch.testing.assert_close(runner.execute(make_plan([3, 4, 5])), expected)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")],
)
def test_short_memory_is_told_apart_from_other_failures(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, TorchAttention(4), make_settings(num_blocks=40))
    failing = SimpleNamespace(error=error)

    def forward(*_: Any, **__: Any) -> None:
        raise failing.error

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(StepOutOfMemory):
        runner.execute(make_plan([3, 4, 5]))
    failing.error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        runner.execute(make_plan([3, 4, 5]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_engine_decodes_on_a_gpu_as_on_the_cpu() -> None:
    requests = [
        make_request(f"r{i}", range(3, 20 + 30 * i), max_tokens=20, seed=i, temperature=i % 2) for i in range(4)
    ]
    results = []
    for device in ("cpu", "cuda"):
        settings = EngineSettings(num_blocks=40, token_budget=64)
        new_detokenizer: type[Detokenizer] = NoText
        engine = Engine(
            ModelRunner(tiny_model("llama").to(device), TorchAttention(16), settings), settings, new_detokenizer
        )
        results.append({name: collected.tokens for name, collected in generate(engine, *requests).items()})
    assert results[0] == results[1]
