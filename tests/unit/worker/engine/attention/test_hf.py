from __future__ import annotations

import threading

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from tests.builders_engine import tiny_model
from worker.engine.attention import hf
from worker.engine.attention.interface import AttentionOptions, LayerShape

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "shape"),
    [("llama", LayerShape(2, 16, 16)), ("gpt2", LayerShape(4, 16, 16)), ("qwen3", LayerShape(2, 16, 16))],
)
def test_layer_shapes_are_found_by_asking_the_model(family: str, shape: LayerShape) -> None:
    model = tiny_model(family)
    hf.install(model)
    assert hf.probe_layer_shapes(model, CPU) == dict.fromkeys(range(4), shape)


def test_a_model_that_never_calls_the_attention_function_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=200))
    with pytest.raises(hf.UnsupportedModel, match="BloomForCausalLM does not take its attention from"):
        hf.install(model)


class _Calls(torch.nn.Module):
    """Asks for attention of layer 0 as often as told."""

    layer_idx = 0

    def __init__(self, num_calls: int) -> None:
        super().__init__()
        self.num_calls = num_calls

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> None:
        for _ in range(self.num_calls):
            hf._attention_forward(self, torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), None)


def test_a_model_whose_layers_are_silent_or_ask_twice_is_refused() -> None:
    with pytest.raises(hf.UnsupportedModel, match="never calls the attention function"):
        hf.probe_layer_shapes(_Calls(0), CPU)
    with pytest.raises(hf.UnsupportedModel, match="layer 0 of _Calls calls attention more than once"):
        hf.probe_layer_shapes(_Calls(2), CPU)


def test_a_call_outside_of_a_step_is_a_clear_error() -> None:
    model = tiny_model("llama")
    hf.install(model)
    with pytest.raises(RuntimeError, match="there is no KV cache to attend over"):
        model(input_ids=torch.tensor([[1]]), use_cache=False)


def test_layers_hand_on_window_softcap_and_scale() -> None:
    model = tiny_model("gemma2")
    hf.install(model)
    seen: dict[int, AttentionOptions] = {}

    def record(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        seen[layer] = options
        return torch.zeros_like(query)

    with hf.attention(record):
        model(input_ids=torch.tensor([[1]]), use_cache=False)
    assert [seen[layer].sliding_window for layer in range(4)] == [8, None, 8, None]
    assert {(options.softcap, options.scale) for options in seen.values()} == {(5.0, 0.25)}


def test_sinks_are_found_on_the_module() -> None:
    model = tiny_model("gpt_oss", head_dim=16, sliding_window=8, num_local_experts=4)
    hf.install(model)
    seen: list[AttentionOptions] = []

    def record(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        seen.append(options)
        return torch.zeros_like(query)

    with hf.attention(record):
        model(input_ids=torch.tensor([[1]]), use_cache=False)
    assert [None if options.sinks is None else options.sinks.shape for options in seen] == [torch.Size([4])] * 4


def test_each_thread_has_its_own_current_attention() -> None:
    inside, done = threading.Event(), threading.Event()
    seen: list[object] = []

    def other() -> None:
        inside.wait(10)
        seen.append(hf._current.attend)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with hf.attention(lambda *_: torch.zeros(1)):
        inside.set()
        assert done.wait(10)
    thread.join(10)
    assert seen == [None]
