"""The engine's loop on a paper runner, which fails when a sequence reads a slot that is not its own."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.generation import FinishReason, OutputDelta, SamplingParams, Usage
from tests.builders_engine import (
    Driver,
    PaperRunner,
    generate,
    make_engine,
    make_request,
    paper_logits,
    paper_tokens,
    prefix_hashes,
)
from worker.engine.blocks import BlockPool
from worker.engine.loop import Engine
from worker.engine.types import DuplicateRequest, GenerationRequest, RequestOutput

# -- the ordinary way -------------------------------------------------------------------------


def test_a_request_streams_its_tokens_and_ends_with_its_usage() -> None:
    driver = Driver(make_engine(PaperRunner()))
    driver.add(make_request("r", [1, 2, 3, 4, 5], max_tokens=3))
    first, second, third = paper_tokens([1, 2, 3, 4, 5], 3)
    outputs = [driver.step().outputs for _ in range(3)]
    assert outputs == [
        (RequestOutput("r", (OutputDelta(0, 0, (first,), f"{first} "),)),),
        (RequestOutput("r", (OutputDelta(0, 1, (second,), f"{second} "),)),),
        (
            RequestOutput(
                "r",
                (OutputDelta(0, 2, (third,), f"{third} ", finish_reason=FinishReason.LENGTH),),
                usage=Usage(5, 0, 3),
            ),
        ),
    ]
    assert not driver.engine.has_work


def test_a_step_that_only_prefills_puts_nothing_out() -> None:
    driver = Driver(make_engine(PaperRunner(), token_budget=16))
    driver.add(make_request("r", range(40)))
    assert [bool(driver.step().outputs) for _ in range(3)] == [False, False, True]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    request = make_request(
        "r", [1, 2, 3], max_tokens=4, temperature=0.5, top_k=3, repetition_penalty=1.5, logprobs=True
    )
    collected = generate(make_engine(PaperRunner()), request)["r"]
    tokens = [1, 2, 3, *collected.tokens[0]]
    for i, logprob in enumerate(collected.logprobs[0]):
        logits = paper_logits(prefix_hashes(tokens[: 3 + i])[-1], 40).astype(np.float64)
        assert logprob == pytest.approx(logits[tokens[3 + i]] - math.log(np.exp(logits).sum()), abs=1e-5)
    assert len(collected.logprobs[0]) == 4


def test_a_stop_string_ends_an_output_before_the_match() -> None:
    tokens = paper_tokens([1, 2, 3], 8)
    stop = f"{tokens[3]} {tokens[4]} "
    collected = generate(make_engine(PaperRunner()), make_request("r", [1, 2, 3], stop_strings=(stop,)))["r"]
    assert collected.texts == ["".join(f"{token} " for token in tokens[:3])]
    assert collected.tokens == [tokens[:5]]
    assert (collected.reasons, collected.stop_matches) == ([FinishReason.STOP], [stop])
    assert collected.usage == Usage(3, 0, 5)


def test_the_context_ends_an_output() -> None:
    request = make_request("r", range(10), max_tokens=1000)
    collected = generate(make_engine(PaperRunner(max_model_len=24)), request)["r"]
    assert collected.tokens == [paper_tokens(range(10), 14)]
    assert collected.reasons == [FinishReason.LENGTH]


def test_a_second_request_hits_the_prefix_that_the_first_computed() -> None:
    engine = make_engine(PaperRunner())
    first = generate(engine, make_request("a", range(18)))["a"]
    second = generate(engine, make_request("b", range(18)))["b"]
    assert first.tokens == second.tokens
    assert (first.usage, second.usage) == (Usage(18, 0, 8), Usage(18, 16, 8))


def test_requests_of_different_salts_share_nothing() -> None:
    engine = make_engine(PaperRunner())
    generate(engine, make_request("a", range(18), cache_salt=b"tenant 1"))
    collected = generate(engine, make_request("b", range(18), cache_salt=b"tenant 2"))["b"]
    assert collected.usage == Usage(18, 0, 8)


def test_the_last_prompt_token_is_computed_even_if_all_blocks_are_known() -> None:
    engine = make_engine(PaperRunner())
    generate(engine, make_request("a", range(16)))
    collected = generate(engine, make_request("b", range(16)))["b"]
    assert collected.usage == Usage(16, 12, 8)


# -- requests that cannot run -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (make_request("r", ()), "EMPTY_PROMPT"),
        (make_request("r", [1] * 64), "PROMPT_TOO_LONG"),
        (make_request("r", [1, 40]), "INVALID_TOKEN_ID"),
        (make_request("r", [1, -1]), "INVALID_TOKEN_ID"),
        (make_request("r", [1], emitted=((2,), (3,))), "EMITTED_MISMATCH"),
    ],
)
def test_a_request_that_can_never_run_ends_with_an_error(request_: GenerationRequest, error: str) -> None:
    collected = generate(make_engine(PaperRunner(max_model_len=64)), request_)["r"]
    assert (collected.error, collected.usage) == (error, None)


def test_an_id_in_use_is_refused() -> None:
    engine = make_engine(PaperRunner())
    engine.add(make_request("r"))
    with pytest.raises(DuplicateRequest, match="r"):
        engine.add(make_request("r"))


# -- cancellation and time --------------------------------------------------------------------


@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "preempted"])
def test_an_abort_frees_the_blocks_before_the_next_step(state: str) -> None:
    engine = make_engine(PaperRunner(num_blocks=17, max_model_len=60), max_num_seqs=2, token_budget=8)
    driver = Driver(engine)
    driver.add(make_request("other", range(20), max_tokens=40))
    if state == "waiting":
        driver.add(make_request("third", range(2, 30)), make_request("r", range(1, 30)))
        driver.step()
    elif state == "prefilling":
        driver.add(make_request("r", range(1, 30)))
        for _ in range(4):
            driver.step()
    else:
        driver.add(make_request("r", range(1, 30), max_tokens=30))
        for _ in range(200):
            if engine.stats().num_preemptions if state == "preempted" else driver.results["r"].tokens[0]:
                break
            driver.step()
    engine.abort("r")
    assert "r" not in engine.stats().held_request_ids
    engine.check_integrity()
    driver.step()
    assert driver.results["r"].reasons == [FinishReason.CANCELLED]
    assert driver.results["r"].usage == Usage(29, 0, len(driver.results["r"].tokens[0]))
    engine.abort("other")
    engine.abort("third")
    assert engine.stats().num_free_blocks == 16


def test_an_abort_of_an_unknown_request_does_nothing() -> None:
    engine = make_engine(PaperRunner())
    engine.abort("nobody")
    assert not engine.has_work


def test_a_deadline_ends_all_outputs_with_what_they_have() -> None:
    driver = Driver(make_engine(PaperRunner()))
    driver.add(make_request("r", range(5), num_outputs=2, max_tokens=50, deadline=10.0))
    driver.now = 9.9
    for _ in range(6):
        driver.step()
    driver.now = 10.0
    result = driver.step()
    assert [d.finish_reason for d in result.outputs[0].deltas] == [FinishReason.TIME_LIMIT] * 2
    collected = driver.results["r"]
    assert collected.tokens[0] == paper_tokens(range(5), len(collected.tokens[0]))
    assert collected.usage == Usage(5, 0, sum(len(tokens) for tokens in collected.tokens))


def test_text_held_back_is_shown_when_time_is_over() -> None:
    tokens = paper_tokens([1, 2, 3], 8)
    driver = Driver(make_engine(PaperRunner()))
    driver.add(make_request("r", [1, 2, 3], stop_strings=(f"{tokens[0]} {tokens[1]} never",), deadline=1.0))
    driver.step()
    driver.step()
    assert driver.results["r"].texts == [""]
    driver.now = 1.0
    driver.step()
    assert driver.results["r"].texts == [f"{tokens[0]} {tokens[1]} "]


# -- failures ---------------------------------------------------------------------------------


def test_nan_logits_end_their_request_and_no_other() -> None:
    runner = PaperRunner()
    tokens = paper_tokens([1, 2, 3], 8)
    other = paper_tokens([4, 5, 6], 8)
    runner.poisoned_token = next(token for token in tokens if token not in other)
    results = generate(make_engine(runner), make_request("bad", [1, 2, 3]), make_request("good", [4, 5, 6]))
    assert (results["bad"].error, results["bad"].usage) == ("NAN_LOGITS", None)
    assert results["good"].tokens == [other]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_forbids_all_tokens_ends_and_no_other(temperature: float) -> None:
    runner = PaperRunner(vocab_size=40)
    others = tuple((token,) for token in range(1, 40))
    # Token 0 alone is left, and may not follow itself.
    bad = make_request("bad", [4], bad_words_ids=(*others, (0, 0)), temperature=temperature)
    driver = Driver(make_engine(runner))
    driver.add(bad, make_request("good", [4, 5, 6]))
    results = driver.run()
    assert (results["bad"].tokens, results["bad"].error, results["bad"].usage) == ([[0]], "ALL_TOKENS_FORBIDDEN", None)
    assert results["good"].tokens == [paper_tokens([4, 5, 6], 8)]


def test_the_last_token_that_the_context_leaves_is_the_one_that_is_forced() -> None:
    runner = PaperRunner(max_model_len=8)
    results = generate(make_engine(runner), make_request("r", [1, 2, 3], max_tokens=50, forced_eos_token_id=9))
    assert results["r"].tokens == [[*paper_tokens([1, 2, 3], 4), 9]]


def test_what_a_request_with_nan_computed_is_not_shared() -> None:
    runner = PaperRunner()
    runner.poisoned_token = 19
    engine = make_engine(runner)
    assert generate(engine, make_request("bad", range(20)))["bad"].error == "NAN_LOGITS"
    runner.poisoned_token = None
    assert generate(engine, make_request("again", range(20)))["again"].usage == Usage(20, 0, 8)


def test_short_memory_sets_the_newest_prefill_aside_and_goes_on() -> None:
    runner = PaperRunner()
    runner.fail_steps = {2}
    requests = [make_request("a", range(6)), make_request("b", range(1, 30)), make_request("c", range(2, 12))]
    driver = Driver(make_engine(runner))
    driver.add(*requests)
    driver.run()
    assert {r: c.tokens for r, c in driver.results.items()} == {
        r.request_id: [paper_tokens(r.prompt_token_ids, 8)] for r in requests
    }
    assert driver.engine.stats().num_preemptions == 1


def test_memory_short_twice_ends_the_request_that_was_set_aside() -> None:
    runner = PaperRunner()
    runner.fail_steps = {2, 3}
    results = generate(make_engine(runner), make_request("a", range(6)), make_request("b", range(1, 30)))
    assert results["b"].error == "OUT_OF_MEMORY"
    assert results["a"].tokens == [paper_tokens(range(6), 8)]


# -- takeover ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_emitted", range(8))
def test_a_takeover_goes_on_with_tokens_text_and_stop_state(num_emitted: int) -> None:
    prompt = [1, 2, 3]
    tokens = paper_tokens(prompt, 8)
    request = make_request("r", prompt, stop_strings=(f"{tokens[5]} {tokens[6]} {tokens[7]} ",), logprobs=True)
    whole = Driver(make_engine(PaperRunner()))
    whole.add(request)
    steps = [whole.step().outputs[0] for _ in range(8)]
    resumed = Driver(make_engine(PaperRunner()))
    resumed.add(replace(request, emitted=(tuple(tokens[:num_emitted]),)))
    outputs = [resumed.step().outputs[0] for _ in range(8 - num_emitted)]
    assert [output.deltas for output in outputs] == [output.deltas for output in steps[num_emitted:]]
    assert outputs[-1].usage == steps[-1].usage == Usage(3, 0, 8)


def test_finished_outputs_are_not_run_again_but_counted() -> None:
    request = make_request("r", [1, 2], num_outputs=3, max_tokens=4, temperature=1.0, seed=9)
    tokens = generate(make_engine(PaperRunner()), request)["r"].tokens
    resumed = replace(request, emitted=(tuple(tokens[0]), tuple(tokens[1][:2]), ()), finished_outputs=frozenset({0}))
    collected = generate(make_engine(PaperRunner()), resumed)["r"]
    assert collected.tokens == tokens
    assert collected.reasons == [None, FinishReason.LENGTH, FinishReason.LENGTH]
    assert collected.usage == Usage(2, 0, 12)


@pytest.mark.parametrize(
    ("params", "reason", "match"),
    [
        ({"max_tokens": 3}, FinishReason.LENGTH, None),
        ({"stop_token_ids": (12,)}, FinishReason.STOP, 12),
        ({"stop_strings": ("11 12",)}, FinishReason.STOP, "11 12"),
    ],
)
def test_an_output_that_was_at_its_end_already_ends_without_a_token(
    params: dict[str, object], reason: FinishReason, match: str | int | None
) -> None:
    driver = Driver(make_engine(PaperRunner()))
    driver.add(make_request("r", [1, 2], emitted=((10, 11, 12),), **params))
    expected = OutputDelta(0, 3, finish_reason=reason, stop_match=match)
    assert driver.step().outputs == (RequestOutput("r", (expected,), usage=Usage(2, 0, 3)),)
    assert not driver.engine.has_work


def test_a_takeover_with_all_outputs_finished_only_reports_usage() -> None:
    request = make_request("r", [1], num_outputs=2, emitted=((3,), (4, 5)), finished_outputs=frozenset({0, 1}))
    collected = generate(make_engine(PaperRunner()), request)["r"]
    assert (collected.reasons, collected.usage) == ([None, None], Usage(1, 0, 3))


# -- any workload -----------------------------------------------------------------------------

_sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 20),
    temperature=st.sampled_from([0.0, 0.0, 0.8]),
    top_p=st.sampled_from([1.0, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    no_repeat_ngram_size=st.sampled_from([0, 0, 2]),
    seed=st.integers(0, (1 << 64) - 1),
    num_outputs=st.integers(1, 3),
    stop_token_ids=st.sampled_from([(), (7, 8, 9)]),
)
# Prompts are pieces of one text, so that many share a beginning.
_prompts = st.tuples(st.integers(0, 2), st.integers(1, 40)).map(
    lambda p: tuple((i * 7) % 40 for i in range(p[0], sum(p)))
)


@st.composite
def _workloads(draw: st.DrawFn) -> list[tuple[int, GenerationRequest]]:
    """Requests with the step before which they arrive."""
    return [
        (
            draw(st.integers(0, 12)),
            GenerationRequest(
                f"r{i}",
                draw(_prompts),
                draw(_sampling),
                priority=draw(st.integers(0, 1)),
                cache_salt=draw(st.sampled_from([b"", b"x"])),
            ),
        )
        for i in range(draw(st.integers(1, 8)))
    ]


def _run_workload(engine: Engine, workload: list[tuple[int, GenerationRequest]], aborts: dict[int, str]) -> Driver:
    driver = Driver(engine)
    for step in range(60):
        driver.add(*[request for arrival, request in workload if arrival == step])
        if aborts.get(step) in driver.results:
            engine.abort(aborts[step])
        driver.step()
    driver.run(max_steps=1500)
    return driver


@settings(max_examples=60, deadline=None)
@given(
    workload=_workloads(),
    num_blocks=st.integers(17, 30),
    token_budget=st.integers(4, 24),
    aborts=st.dictionaries(st.integers(0, 40), st.sampled_from([f"r{i}" for i in range(8)]), max_size=2),
    fail_steps=st.sets(st.integers(2, 60), max_size=2),
)
def test_any_workload_gives_each_request_what_it_gets_alone(
    workload: list[tuple[int, GenerationRequest]],
    num_blocks: int,
    token_budget: int,
    aborts: dict[int, str],
    fail_steps: set[int],
) -> None:
    runner = PaperRunner(num_blocks=num_blocks, max_model_len=64)
    runner.fail_steps = fail_steps
    engine = make_engine(runner, token_budget=token_budget)
    results = _run_workload(engine, workload, aborts).results
    for _, request in workload:
        alone = generate(make_engine(PaperRunner(num_blocks=200)), request)[request.request_id]
        collected = results[request.request_id]
        if collected.error is not None:
            assert collected.error == "OUT_OF_MEMORY"
            assert fail_steps
        elif FinishReason.CANCELLED in collected.reasons:
            assert request.request_id in aborts.values()
            assert all(a == b[: len(a)] for a, b in zip(collected.tokens, alone.tokens, strict=True))
        else:
            assert (collected.tokens, collected.reasons, collected.texts) == (alone.tokens, alone.reasons, alone.texts)


def test_a_block_shared_in_the_step_that_writes_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockPool, "register", _register_as_ready)
    engine = make_engine(PaperRunner(), token_budget=64)
    with pytest.raises(AssertionError, match="reads a slot that is not its own"):
        generate(engine, make_request("r", range(30)), make_request("q", range(30)))


def _register_as_ready(self: BlockPool, block_id: int, block_hash: bytes) -> None:
    self._block_of_hash[block_hash] = block_id
    self._hash_of_block[block_id] = block_hash
