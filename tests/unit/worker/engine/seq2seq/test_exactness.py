"""Encoder-decoder models in the engine give what transformers' generate gives to one request alone, token by token."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from common.generation import EarlyStopping, FinishReason, SamplingParams
from tests.builders_engine import Driver, TokenNames, make_request
from tests.builders_engine import generate as run
from tests.builders_seq2seq import BOS, EOS, FAMILIES, START, VOCAB_SIZE, generate, tiny_seq2seq
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.attention.interface import AttentionBackend
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.fuse import speed_up
from worker.engine.loop import Engine
from worker.engine.runner import ModelRunner
from worker.engine.settings import EngineSettings
from worker.engine.types import GenerationRequest

# Around the ends of blocks, and beyond the distances that T5's tiny bias tells apart.
LENGTHS = (1, 2, 5, 8, 12, 15, 16, 17, 21, 28, 31, 32, 33, 40, 48, 60)
NUM_TOKENS = 24


@functools.cache
def model(family: str) -> PreTrainedModel:
    """As transformers has it, for it alone."""
    return tiny_seq2seq(family)


def source(length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randint(4, VOCAB_SIZE, (length,), generator=generator).tolist())


@functools.cache
def greedy(family: str, length: int) -> list[int]:
    return generate(model(family), source(length), NUM_TOKENS)[0]


def make_engine(family: str, backend: AttentionBackend | None = None, *, fast: bool = False, **limits: Any) -> Engine:
    backend = backend or CpuAttention()
    settings = EngineSettings(
        **{"block_size": backend.block_size, "token_budget": 256, "max_num_seqs": 64, "num_blocks": 400, **limits}
    )
    module = tiny_seq2seq(family)
    if fast:
        assert speed_up(module)
    return Engine(ModelRunner(module, backend, settings), settings, TokenNames)


def request(length: int, name: str | None = None, **fields: Any) -> GenerationRequest:
    defaults = {"source_token_ids": source(length), "max_tokens": NUM_TOKENS, "stop_token_ids": (EOS,)}
    return make_request(name or f"r{length}", (START,), **{**defaults, **fields})


def test_outputs_depend_on_their_source_and_some_end() -> None:
    """Or the tests below would show little."""
    for family in FAMILIES:
        outputs = [greedy(family, length) for length in LENGTHS]
        assert len({tuple(output) for output in outputs}) > 12
        assert max(len(set(output)) for output in outputs) > 6
    ends = [greedy(family, length)[-1] == EOS for family in FAMILIES for length in LENGTHS]
    assert 10 < sum(ends) < 70


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_compiled", [True, False])
def test_sixteen_sources_in_one_batch(family: str, is_compiled: bool) -> None:
    engine = make_engine(family, None if is_compiled else TorchAttention(4), fast=is_compiled)
    found = run(engine, *(request(length) for length in LENGTHS))
    for length in LENGTHS:
        assert found[f"r{length}"].tokens == [greedy(family, length)], length
        reason = FinishReason.STOP if greedy(family, length)[-1] == EOS else FinishReason.LENGTH
        assert found[f"r{length}"].reasons == [reason]
        assert found[f"r{length}"].usage.prompt_tokens == length


@pytest.mark.parametrize("family", FAMILIES)
def test_under_preemption_and_with_small_budgets(family: str) -> None:
    """A source of 60 tokens and its output take 22 of the 26 blocks."""
    engine = make_engine(family, TorchAttention(4), token_budget=16, max_num_seqs=16, num_blocks=26)
    found = run(engine, *(request(length) for length in LENGTHS))
    assert {name: one.tokens for name, one in found.items()} == {f"r{n}": [greedy(family, n)] for n in LENGTHS}
    assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_takeover_in_the_middle_goes_on_as_if_nothing_had_happened(family: str) -> None:
    """What was emitted is computed again behind the source, in chunks and beside others."""
    takeovers = {
        length: request(length, emitted=(tuple(greedy(family, length)[: min(9, len(greedy(family, length)) - 1)]),))
        for length in LENGTHS
        if len(greedy(family, length)) > 1
    }
    engine = make_engine(family, token_budget=16, max_num_seqs=16)
    found = run(engine, *takeovers.values())
    assert {name: one.tokens for name, one in found.items()} == {f"r{n}": [greedy(family, n)] for n in takeovers}


BEAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "early": {"early_stopping": True, "length_penalty": 0.6},
    "never": {"early_stopping": "never", "length_penalty": 2.0, "num_return_sequences": 4},
    "as translation models have it": {
        "early_stopping": True,
        "no_repeat_ngram_size": 3,
        "min_length": 6,
        "forced_bos_token_id": 77,
        "forced_eos_token_id": EOS,
    },
}
EARLY_STOPPING = {
    False: EarlyStopping.HEURISTIC,
    True: EarlyStopping.WHEN_FULL,
    "never": EarlyStopping.NEVER,
}


def as_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """What transformers' options are called here. `min_length` counts what the decoder begins with."""
    found = {name: value for name, value in options.items() if name in SamplingParams.__struct_fields__}
    found["early_stopping"] = EARLY_STOPPING[options.get("early_stopping", False)]
    found["num_outputs"] = options.get("num_return_sequences", 1)
    found["min_tokens"] = max(0, options.get("min_length", 0) - 1)
    return found


@pytest.mark.parametrize("name", BEAMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_four_beams(family: str, name: str) -> None:
    lengths, options = (5, 17, 33), BEAMS[name]
    engine = make_engine(family, max_num_seqs=16)
    found = run(engine, *(request(n, num_beams=4, **as_sampling(options)) for n in lengths), request(60))
    for length in lengths:
        expected = generate(model(family), source(length), NUM_TOKENS, num_beams=4, **options)
        assert found[f"r{length}"].tokens == expected, length
    assert found["r60"].tokens == [greedy(family, 60)]


FEATURES: dict[str, dict[str, Any]] = {
    "forced ends": {"forced_bos_token_id": BOS, "forced_eos_token_id": EOS},
    "forced and suppressed": {"forced_bos_token_id": 50, "begin_suppress_tokens": list(range(4, 200))},
    "repetition": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "of the source": {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 1},
    "n-grams of the source": {"encoder_no_repeat_ngram_size": 2, "suppress_tokens": list(range(30, VOCAB_SIZE))},
    "min length": {"min_length": 25},
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("family", ["t5", "mbart"])
def test_scores_are_edited_as_by_transformers(family: str, name: str) -> None:
    options, lengths = FEATURES[name], (8, 31, 60)
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in as_sampling(options).items()}
    found = run(make_engine(family), *(request(length, **fields) for length in lengths), request(40))
    changed = 0
    for length in lengths:
        expected = generate(model(family), source(length), NUM_TOKENS, **options)
        assert found[f"r{length}"].tokens == expected, length
        changed += expected[0] != greedy(family, length)
    assert changed, "the options do nothing"
    assert found["r40"].tokens == [greedy(family, 40)]


def test_a_decoder_that_begins_with_two_tokens_has_no_forced_first_one() -> None:
    options = {"forced_bos_token_id": 50, "begin_suppress_tokens": [7, 8, 9]}
    fields = {"forced_bos_token_id": 50, "begin_suppress_tokens": (7, 8, 9), "source_token_ids": source(17)}
    found = run(make_engine("m2m_100"), make_request("r", (START, 99), max_tokens=8, stop_token_ids=(EOS,), **fields))
    assert found["r"].tokens == generate(model("m2m_100"), source(17), 8, prompt=(START, 99), **options)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_sampled_outputs_share_the_source_and_are_the_same_alone(family: str) -> None:
    sampled = {"temperature": 1.0, "seed": 5, "num_outputs": 6}
    engine = make_engine(family, max_num_seqs=16)
    driver = Driver(engine)
    driver.add(request(60, **sampled), request(33))
    driver.step()
    driver.step()
    # 4 blocks of the source, one of each output; and those of the other request.
    assert engine.stats().num_blocks - engine.stats().num_free_blocks == 4 + engine.stats().num_running - 1 + 3 + 1
    together = driver.run()["r60"].tokens
    assert len({tuple(tokens) for tokens in together}) > 3
    one_by_one = make_engine(family, max_num_seqs=1, enable_prefix_cache=False)
    assert run(one_by_one, request(60, **sampled))["r60"].tokens == together


def test_a_stepwise_log_probability_is_that_of_the_plain_model() -> None:
    found = run(make_engine("bart"), request(33, logprobs=True), request(40))["r33"]
    tokens = found.tokens[0]
    with torch.inference_mode():
        logits = model("bart")(
            input_ids=torch.tensor([source(33)]), decoder_input_ids=torch.tensor([[START, *tokens[:-1]]])
        ).logits[0]
    expected = logits.log_softmax(-1)[range(len(tokens)), tokens]
    torch.testing.assert_close(torch.tensor(found.logprobs[0]), expected, rtol=1e-4, atol=1e-4)
