"""The engine against transformers' own `generate`, fp32, token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from common.generation import FinishReason
from tests.builders_engine import FAMILIES, Driver, generate, make_engine, make_request, reference_tokens, tiny_model
from worker.engine.attention.interface import AttentionBatch
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.batch import BatchBuffers, StepBatch
from worker.engine.loop import Engine
from worker.engine.runner import ModelRunner
from worker.engine.scheduler import Plan
from worker.engine.settings import EngineSettings
from worker.engine.types import GenerationRequest

PENALTIES: list[dict[str, Any]] = [
    {},
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 0.8},
]
GPT2_SHAPE = {"hidden_size": 768, "num_attention_heads": 12, "max_position_embeddings": 1024, "vocab_size": 50257}
PROMPT_LENGTHS = [1, 5, 40, 16, 150, 17, 64, 200, 2, 33, 90, 100]


def mixed_requests(vocab_size: int = 200) -> list[GenerationRequest]:
    """Prompts of 1 to 200 tokens, every third one the beginning of a common text, with all kinds of penalties."""
    generator = torch.Generator().manual_seed(5)
    common = torch.randint(3, vocab_size, (256,), generator=generator).tolist()
    requests = []
    for i, length in enumerate(PROMPT_LENGTHS):
        own = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        prompt = common[:length] if i % 3 == 1 or length > 80 else own
        requests.append(make_request(f"r{i}", prompt, max_tokens=10 + 3 * i, **PENALTIES[i % len(PENALTIES)]))
    return requests


def run_joining(engine: Engine, requests: list[GenerationRequest], aborted: frozenset[str] = frozenset()) -> Driver:
    """Two requests at once, then one every second step; some leave before their end."""
    driver = Driver(engine)
    driver.add(*requests[:2])
    for request in requests[2:]:
        driver.step()
        driver.step()
        driver.add(request)
    for _ in range(5):
        driver.step()
    for request_id in aborted:
        engine.abort(request_id)
    driver.run()
    return driver


@pytest.mark.parametrize("family", FAMILIES)
def test_every_output_is_what_the_request_alone_gets_from_transformers(family: str) -> None:
    model = tiny_model(family)
    requests = mixed_requests()
    expected = {r.request_id: reference_tokens(model, r.prompt_token_ids, r.sampling) for r in requests}
    engine = make_engine(model, block_size=8, num_blocks=36, token_budget=48, max_num_seqs=8)
    driver = run_joining(engine, requests, aborted=frozenset({"r10"}))
    for request_id, collected in driver.results.items():
        tokens = collected.tokens[0]
        if request_id == "r10":
            assert collected.reasons == [FinishReason.CANCELLED]
            assert tokens == expected[request_id][: len(tokens)]
        else:
            assert collected.reasons == [FinishReason.LENGTH]
            assert tokens == expected[request_id], request_id
    stats = engine.stats()
    assert stats.num_preemptions > 0, "the cache was not small enough for this test"
    assert stats.cached_prompt_tokens > 0, "nothing hit the prefix cache"
    assert len({tuple(tokens) for tokens in expected.values()}) == len(expected), "degenerate weights"


def test_depth_of_one_layer_and_prompts_up_to_the_context() -> None:
    model = tiny_model("gpt2", num_hidden_layers=1)
    assert len(model.transformer.h) == 1
    lengths = [1, 100, 246, 255]
    requests = [make_request(f"r{n}", [(7 * i + n) % 190 + 3 for i in range(n)], max_tokens=10) for n in lengths]
    results = generate(make_engine(model, block_size=16, num_blocks=20, token_budget=32), *requests)
    for request, length in zip(requests, lengths, strict=True):
        num_left = min(10, 256 - length)
        sampling = make_request(max_tokens=num_left).sampling
        assert results[request.request_id].tokens[0] == reference_tokens(model, request.prompt_token_ids, sampling)
        assert results[request.request_id].reasons == [FinishReason.LENGTH]


def test_real_shape_of_gpt2_at_reduced_depth() -> None:
    model = tiny_model("gpt2", **GPT2_SHAPE, num_hidden_layers=2)
    assert model.config.n_embd == 768
    requests = [
        make_request(f"r{n}", [(7919 * i + n) % 50000 for i in range(n)], max_tokens=8, no_repeat_ngram_size=2)
        for n in (1, 70, 500)
    ]
    results = generate(make_engine(model, block_size=16, num_blocks=60, token_budget=128), *requests)
    for request in requests:
        expected = reference_tokens(model, request.prompt_token_ids, request.sampling)
        assert results[request.request_id].tokens[0] == expected


def test_an_end_of_sequence_id_ends_the_output_where_transformers_ends_it() -> None:
    model = tiny_model("llama")
    prompt = [5, 6, 7]
    tokens = reference_tokens(model, prompt, make_request(max_tokens=20).sampling)
    request = make_request("r", prompt, max_tokens=20, stop_token_ids=(tokens[7], tokens[9]))
    collected = generate(make_engine(model), request)["r"]
    assert collected.tokens[0] == reference_tokens(model, prompt, request.sampling)
    assert collected.reasons == [FinishReason.STOP]
    assert collected.stop_matches == [collected.tokens[0][-1]]


def test_outputs_of_one_request_share_its_prompt_while_it_is_computed() -> None:
    model = tiny_model("llama")
    request = make_request("r", range(3, 103), num_outputs=4, max_tokens=6, temperature=1.0, seed=3)
    engine = make_engine(model, block_size=8, num_blocks=40, token_budget=32)
    collected = generate(engine, request)["r"]
    alone = generate(make_engine(model, enable_prefix_cache=False, num_blocks=200), request)["r"]
    assert collected.tokens == alone.tokens
    assert len({tuple(tokens) for tokens in collected.tokens}) > 1
    assert (engine.stats().prompt_tokens, engine.stats().cached_prompt_tokens) == (100, 0)


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.8, "repetition_penalty": 1.2},
    {"temperature": 0.9, "min_p": 0.05, "top_k": 50, "no_repeat_ngram_size": 2},
    {"temperature": 0.0},
    {"temperature": 1.0, "num_outputs": 2},
    {"temperature": 1.1, "typical_p": 0.9, "presence_penalty": 0.8, "frequency_penalty": -0.4, "min_tokens": 14},
    {"sequence_bias": (((7, 9), 14.0), ((9,), 9.0), ((9, 7), 15.0)), "forced_eos_token_id": 11, "stop_token_ids": (5,)},
]


def sampled_requests() -> list[GenerationRequest]:
    return [
        make_request(f"r{i}", range(3 + i, 9 + 7 * i), max_tokens=16, seed=i * 0x1234567890AB, **params)
        for i, params in enumerate(SAMPLED)
    ]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def sampled_alone(llama: PreTrainedModel) -> dict[str, list[list[int]]]:
    engine = make_engine(llama, num_blocks=100)
    return {r.request_id: generate(engine, r)[r.request_id].tokens for r in sampled_requests()}


def test_seeded_output_is_the_same_alone_and_in_a_batch(
    llama: PreTrainedModel, sampled_alone: dict[str, list[list[int]]]
) -> None:
    engine = make_engine(llama, num_blocks=20, token_budget=24, max_num_seqs=8)
    results = run_joining(engine, sampled_requests()).results
    assert {request_id: collected.tokens for request_id, collected in results.items()} == sampled_alone
    assert engine.stats().num_preemptions > 0


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), min_size=8, max_size=8))
def test_seeded_output_goes_on_alike_after_a_takeover_anywhere(
    llama: PreTrainedModel, sampled_alone: dict[str, list[list[int]]], cuts: list[tuple[int, int]]
) -> None:
    resumed = [
        replace(r, emitted=tuple(tuple(ids[:k]) for ids, k in zip(sampled_alone[r.request_id], cut, strict=False)))
        for r, cut in zip(sampled_requests(), cuts, strict=True)
    ]
    results = generate(make_engine(llama, num_blocks=40, max_num_seqs=8), *resumed)
    assert {request_id: collected.tokens for request_id, collected in results.items()} == sampled_alone


def test_another_seed_gives_another_output(llama: PreTrainedModel) -> None:
    requests = [make_request(f"r{seed}", range(3, 9), max_tokens=12, temperature=1.0, seed=seed) for seed in range(8)]
    results = generate(make_engine(llama, num_blocks=100), *requests)
    assert len({tuple(collected.tokens[0]) for collected in results.values()}) == 8


def test_bfloat16_decodes_too() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    results = generate(make_engine(model, num_blocks=100), *mixed_requests()[:6])
    assert all(collected.reasons == [FinishReason.LENGTH] for collected in results.values())


# -- the tests above can fail -----------------------------------------------------------------


class _SwapsTwoBlocks(BatchBuffers):
    def fill(self, plan: Plan) -> StepBatch:
        batch = super().fill(plan)
        tables = batch.attention.block_tables
        if tables.shape[1] >= 2:
            tables[:, :2] = tables[:, :2].flip(1)
        return batch


class _ForgetsTheLastKey(TorchAttention):
    """The last row of a step is not written, as by a copy one element short."""

    def attend(self, query: Any, key: Any, value: Any, cache: Any, batch: AttentionBatch, options: Any) -> torch.Tensor:
        slots = batch.slots.clone()
        slots[-1] = 0
        return super().attend(query, key, value, cache, replace(batch, slots=slots), options)


class _IgnoresTheWindow(TorchAttention):
    def attend(self, query: Any, key: Any, value: Any, cache: Any, batch: AttentionBatch, options: Any) -> torch.Tensor:
        return super().attend(query, key, value, cache, batch, replace(options, sliding_window=None))


@pytest.mark.parametrize("mutant", ["swapped block table", "missing copy", "ignored window", "forgotten salt"])
def test_a_broken_engine_is_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mistral")
    requests = mixed_requests()[:6]
    expected = [reference_tokens(model, r.prompt_token_ids, r.sampling) for r in requests]
    limits = EngineSettings(block_size=8, num_blocks=64, token_budget=48, max_num_seqs=8)
    attention = TorchAttention(8)
    if mutant == "swapped block table":
        monkeypatch.setattr("worker.engine.runner.BatchBuffers", _SwapsTwoBlocks)
    elif mutant == "missing copy":
        attention = _ForgetsTheLastKey(8)
    elif mutant == "ignored window":
        attention = _IgnoresTheWindow(8)
    else:  # every block has the same hash, so that prefixes of other requests are hit
        monkeypatch.setattr(
            "worker.engine.blocks.BlockPool.extend_hashes",
            lambda self, hashes, ids, n, salt: hashes.extend(bytes([i]) for i in range(len(hashes), n)),
        )
    engine = Engine(ModelRunner(model, attention, limits), limits, _silent)
    results = run_joining(engine, requests).results
    assert [results[r.request_id].tokens[0] for r in requests] != expected


class _silent:  # noqa: N801  # used as a factory
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""
