"""Beam search in a batch: what each request gets is what it gets alone, whatever happens around it."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.generation import EarlyStopping, FinishReason, OutputDelta, SamplingParams
from tests.builders_engine import (
    Collected,
    Driver,
    PaperRunner,
    TokenNames,
    generate,
    make_engine,
    make_request,
    paper_logits,
    paper_tokens,
    prefix_hashes,
)
from worker.engine.beams import BeamSearch, Candidate, best_candidates
from worker.engine.scheduler import Scheduler
from worker.engine.stopping import StopState
from worker.engine.types import ALL_TOKENS_FORBIDDEN, GenerationRequest


def paper_search(request: GenerationRequest, runner: PaperRunner, max_steps: int = 1000) -> BeamSearch:
    """The search without an engine."""
    prompt, params = list(request.prompt_token_ids), request.sampling
    search, outputs = BeamSearch(params), [()]
    for _ in range(max_steps):
        if search.is_done:
            break
        candidates = []
        for beam, (total, output) in enumerate(zip(search.scores, outputs, strict=True)):
            seen = [*prompt, *output][-(runner.memory or 10_000) :]
            logits = torch.from_numpy(paper_logits(prefix_hashes(seen)[-1], runner.vocab_size))
            row = torch.tensor(total) + logits.log_softmax(-1)
            row[list(params.suppress_tokens)] = -torch.inf
            candidates += [Candidate(value, beam, token) for token, value in enumerate(row.tolist())]
        best = best_candidates(candidates, params)
        ended = [c.token_id in params.stop_token_ids or search.num_tokens + 1 == params.max_tokens for c in best]
        outputs = [(*outputs[c.beam], c.token_id) for c in search.advance(best, ended, outputs)]
    search_outputs[id(search)] = outputs
    return search


search_outputs: dict[int, list[tuple[int, ...]]] = {}


def wanted(request: GenerationRequest, runner: PaperRunner | None = None) -> list[list[int]]:
    found = paper_search(request, runner or PaperRunner()).finished
    return [list(one.token_ids) for one in found[: request.sampling.num_outputs]]


def deltas_of(driver: Driver, request_id: str) -> list[OutputDelta]:
    """Step to the end; the deltas of one request."""
    found = []
    while driver.engine.has_work:
        found += [delta for out in driver.step().outputs if out.request_id == request_id for delta in out.deltas]
    return found


def beams(name: str = "r", length: int = 7, **fields: Any) -> GenerationRequest:
    return make_request(name, range(length), **{"num_beams": 3, "max_tokens": 6, **fields})


# -- what comes out ---------------------------------------------------------------------------


@pytest.mark.parametrize("early_stopping", EarlyStopping)
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0])
def test_outputs_are_the_best_sequences_the_best_first(early_stopping: EarlyStopping, length_penalty: float) -> None:
    request = beams(
        num_outputs=3, early_stopping=early_stopping, length_penalty=length_penalty, stop_token_ids=(7, 8, 9, 10)
    )
    driver = Driver(make_engine(PaperRunner(num_blocks=60)))
    driver.add(request)
    deltas = deltas_of(driver, "r")
    search = paper_search(request, PaperRunner())
    assert [(delta.output_index, list(delta.token_ids)) for delta in deltas] == list(enumerate(wanted(request)))
    assert [delta.score for delta in deltas] == pytest.approx([one.score for one in search.finished], abs=1e-4)
    assert [delta.text for delta in deltas] == [
        "".join(f"{token} " for token in delta.token_ids if token not in request.sampling.stop_token_ids)
        for delta in deltas
    ]
    for delta in deltas:
        ends = delta.token_ids[-1] in request.sampling.stop_token_ids
        assert delta.finish_reason is (FinishReason.STOP if ends else FinishReason.LENGTH)
        assert delta.stop_match == (delta.token_ids[-1] if ends else None)
    usage = driver.results["r"].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (7, 3 * search.num_tokens)


def test_nothing_comes_before_the_end_but_how_far_it_is() -> None:
    driver = Driver(make_engine(PaperRunner(num_blocks=60)))
    driver.add(beams())
    results = []
    while driver.engine.has_work:
        results += driver.step().outputs
    assert [out.num_held_tokens for out in results] == [3] * 6
    assert [bool(out.deltas) for out in results] == [False] * 5 + [True]


def test_a_wider_search_finds_what_greedy_decoding_does_not() -> None:
    greedy = paper_tokens(range(3), 6)
    assert generate(make_engine(PaperRunner(num_blocks=60)), beams(length=3))["r"].tokens != [greedy]
    assert generate(make_engine(PaperRunner(num_blocks=60)), beams(length=3, max_tokens=1))["r"].tokens == [greedy[:1]]


def test_the_prompt_is_computed_once_and_its_blocks_are_shared() -> None:
    runner = PaperRunner(num_blocks=100)
    engine = make_engine(runner, token_budget=64, max_num_seqs=8, enable_prefix_cache=False)
    driver = Driver(engine)
    driver.add(beams(length=40, num_beams=8))
    driver.step()
    assert (runner.num_rows, engine.stats().num_running) == (40, 8)
    assert engine.stats().num_blocks - engine.stats().num_free_blocks == 10
    driver.run()
    assert runner.num_rows == 40 + 5 * 8
    assert runner.num_draft_rows == 0


def test_a_chat_s_prompt_and_echo_are_what_they_are_for_others() -> None:
    request = beams(num_outputs=2, echo_text="so: ", prompt_logprobs=1)
    driver = Driver(make_engine(PaperRunner(num_blocks=60)))
    driver.add(request)
    scores, texts = [], []
    while driver.engine.has_work:
        for out in driver.step().outputs:
            scores += [] if out.prompt_scores is None else [out.prompt_scores]
            texts += [delta.text for delta in out.deltas]
    assert sum(len(part.logprobs) for part in scores) == 6
    assert [text[:4] for text in texts] == ["so: "] * 2
    assert driver.results["r"].tokens == wanted(request)


def test_a_string_ends_a_beam() -> None:
    plain = generate(make_engine(PaperRunner(num_blocks=60)), beams())["r"]
    third = plain.tokens[0][2]
    stop = f" {third} "
    driver = Driver(make_engine(PaperRunner(num_blocks=60)))
    driver.add(beams(num_outputs=3, stop_strings=(stop,)))
    deltas = deltas_of(driver, "r")
    ended = [delta for delta in deltas if delta.finish_reason is FinishReason.STOP]
    assert ended, "it must have ended a beam"
    for delta in deltas:
        text = "".join(f"{token} " for token in delta.token_ids)
        if delta in ended:
            assert text.index(stop) + len(stop) == len(text)
            assert (delta.text, delta.stop_match) == (text[: text.index(stop)], stop)
        else:
            assert stop not in text


# -- what cannot be ---------------------------------------------------------------------------


def test_more_beams_than_places_are_refused() -> None:
    collected = generate(make_engine(PaperRunner(num_blocks=60)), beams(num_beams=5))["r"]
    assert collected.error == "TOO_MANY_BEAMS"


def test_beams_that_the_cache_cannot_hold_together_are_refused() -> None:
    engine = make_engine(PaperRunner(num_blocks=11))  # 7 + 5 tokens: one block, and three times two
    assert generate(engine, beams(max_tokens=5))["r"].tokens == wanted(beams(max_tokens=5))
    assert generate(engine, beams("q", max_tokens=12, num_beams=4))["q"].error == "BEAMS_TOO_LONG"


def test_a_request_that_leaves_no_token_fails() -> None:
    engine = make_engine(PaperRunner(num_blocks=60))
    assert generate(engine, beams(suppress_tokens=tuple(range(40))))["r"].error == ALL_TOKENS_FORBIDDEN


def test_outputs_beyond_the_sequences_that_there_are_are_empty() -> None:
    driver = Driver(make_engine(PaperRunner(num_blocks=60)))
    driver.add(beams(num_outputs=3, max_tokens=2, suppress_tokens=tuple(range(1, 40))))
    deltas = deltas_of(driver, "r")
    assert [delta.token_ids for delta in deltas] == [(0, 0), (), ()]
    assert [delta.score is None for delta in deltas] == [False, True, True]
    assert [delta.finish_reason for delta in deltas] == [FinishReason.LENGTH] * 3


def test_logits_that_are_no_numbers_end_the_request() -> None:
    runner = PaperRunner(num_blocks=60)
    runner.poisoned_token = wanted(beams())[0][1]
    collected = generate(make_engine(runner), beams())["r"]
    assert (collected.error, collected.tokens) == ("NAN_LOGITS", [[]])


# -- ends from outside ------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [FinishReason.TIME_LIMIT, FinishReason.CANCELLED])
@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_a_search_that_is_cut_gives_the_best_so_far(reason: FinishReason, num_steps: int) -> None:
    request = beams(num_outputs=2, max_tokens=9, deadline=5.0, stop_token_ids=(7, 8, 9))
    driver = Driver(make_engine(PaperRunner(num_blocks=60)))
    driver.add(request)
    for _ in range(num_steps):
        driver.step()
    if reason is FinishReason.TIME_LIMIT:
        driver.now = 5.0
    else:
        driver.engine.abort("r")
    collected = driver.run()["r"]
    search = paper_search(request, PaperRunner(), num_steps)
    assert not search.is_done
    cut = search.cut(search_outputs[id(search)])
    assert collected.tokens == ([list(found.token_ids) for found in cut[:2]] if num_steps else [[], []])
    assert collected.reasons == [reason] * 2


def test_a_cut_behind_a_preemption_gives_what_was_complete() -> None:
    request = beams("late", length=9, max_tokens=12, deadline=5.0, stop_token_ids=tuple(range(10, 25)), priority=1)
    driver = Driver(make_engine(PaperRunner(num_blocks=18)))
    driver.add(request)
    for _ in range(3):
        driver.step()
    first = paper_search(request, PaperRunner(), 3).finished
    assert first
    driver.engine._scheduler.preempt(driver.engine._scheduler._running[0])
    driver.now = 5.0
    assert driver.run()["late"].tokens == [list(first[0].token_ids)]


# -- room -------------------------------------------------------------------------------------


def test_places_are_kept_for_beams_from_the_beginning() -> None:
    engine = make_engine(PaperRunner(num_blocks=100), token_budget=8, max_num_seqs=6)
    driver = Driver(engine)
    driver.add(beams(length=20, num_beams=4))
    driver.step()
    driver.add(make_request("many", range(30, 34), num_outputs=4, temperature=1.0, max_tokens=12))
    most = 0
    while engine.has_work:
        driver.step()
        most = max(most, engine.stats().num_running)
        running = Counter(sequence.request_id for sequence in engine._scheduler._running)
        assert running["many"] <= 2 or driver.results["r"].usage is not None
    assert most == 6
    assert driver.results["r"].tokens == wanted(beams(length=20, num_beams=4))


def test_beams_that_wait_for_places_are_not_overtaken() -> None:
    engine = make_engine(PaperRunner(num_blocks=100), max_num_seqs=4)
    driver = Driver(engine)
    driver.add(make_request("one", range(30, 34), max_tokens=5), beams(num_beams=4, max_tokens=3))
    driver.add(*(make_request(f"late{i}", range(10 + i, 14 + i), max_tokens=20) for i in range(3)))
    while driver.results["r"].usage is None:
        driver.step()
        assert not any(driver.results[f"late{i}"].tokens[0] for i in range(3))
    driver.run()


def test_preempted_beams_begin_anew_and_come_to_the_same() -> None:
    request = beams("late", length=9, max_tokens=14, num_outputs=2)
    engine = make_engine(PaperRunner(num_blocks=16))
    driver = Driver(engine)
    driver.add(make_request("first", range(20, 40), max_tokens=40), request)
    collected = driver.run()
    assert engine.stats().num_preemptions > 0
    assert collected["late"].tokens == wanted(request)
    assert collected["first"].tokens[0] == paper_tokens(range(20, 40), 40)
    assert collected["late"].usage is not None
    assert collected["late"].usage.completion_tokens == 14 * 3  # those of the first attempt are not counted twice


def test_preempted_beams_wait_until_they_would_come_further() -> None:
    """Beams that took what is free again at once would be preempted again and again."""
    engine = make_engine(PaperRunner(num_blocks=17), max_num_seqs=8)
    late = beams("late", length=9, max_tokens=10, num_beams=4)
    generate(engine, make_request("first", range(20, 40), max_tokens=40), late)
    assert engine.stats().num_preemptions == 1


def test_without_memory_for_copies_beams_are_tried_once_more() -> None:
    runner = PaperRunner(num_blocks=60)
    runner.fail_copies = True
    assert generate(make_engine(runner), beams())["r"].error == "OUT_OF_MEMORY"
    driver = Driver(make_engine(runner))
    driver.add(beams())
    while not driver.engine._scheduler.num_preemptions:
        driver.step()
    runner.fail_copies = False
    assert driver.run()["r"].tokens == wanted(beams())


# -- any workload -----------------------------------------------------------------------------


def any_request(rng: random.Random, name: str, max_num_seqs: int) -> GenerationRequest:
    start, length = rng.randrange(3), rng.randrange(1, 20)
    num_beams = rng.randrange(1, min(max_num_seqs, 4) + 1)
    params = SamplingParams(
        max_tokens=rng.randrange(1, 12),
        num_beams=num_beams,
        num_outputs=rng.randrange(1, num_beams + 1),
        length_penalty=rng.choice((0.0, 1.0)),
        early_stopping=rng.choice(list(EarlyStopping)),
        stop_token_ids=rng.choice(((), (7, 8, 9))),
    )
    prompt = tuple((i * 7) % 40 for i in range(start, start + length))
    return GenerationRequest(name, prompt, params, priority=rng.randrange(2), tenant=rng.choice(("a", "b")))


def is_right(request: GenerationRequest, collected: Collected, runner: PaperRunner) -> bool:
    if request.sampling.num_beams > 1:
        return collected.tokens == wanted(request, runner)
    tokens = generate(make_engine(PaperRunner(num_blocks=400, memory=runner.memory)), request)[request.request_id]
    return collected.tokens == tokens.tokens


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), enable_prefix_cache=st.booleans(), num_blocks=st.integers(28, 50))
def test_any_workload_gives_each_request_what_it_gets_alone(
    seed: int, enable_prefix_cache: bool, num_blocks: int
) -> None:
    """Blocks are checked after every step: by `check_integrity`, and by the runner for what is in them."""
    rng = random.Random(seed)
    runner = PaperRunner(num_blocks=num_blocks, max_model_len=44, memory=rng.choice((None, 2)))
    runner.fail_steps = {rng.randrange(2, 60)}
    max_num_seqs = rng.randrange(2, 9)
    engine = make_engine(
        runner,
        token_budget=rng.randrange(8, 24),
        max_num_seqs=max_num_seqs,
        enable_prefix_cache=enable_prefix_cache,
    )
    driver = Driver(engine)
    requests = [any_request(rng, f"r{i}", max_num_seqs) for i in range(rng.randrange(1, 7))]
    waiting = list(requests)
    aborted = set()
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.4:
            driver.add(waiting.pop())
        if driver.results and rng.random() < 0.02:
            aborted.add(rng.choice(sorted(driver.results)))
            engine.abort(sorted(aborted)[-1])
        runner.fail_copies = rng.random() < 0.03
        driver.step()
        assert engine.stats().num_running <= max_num_seqs
    for request in requests:
        collected = driver.results[request.request_id]
        if collected.error is not None:
            assert collected.error == "OUT_OF_MEMORY"
        elif FinishReason.CANCELLED not in collected.reasons:
            assert is_right(request, collected, runner)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_a_beam_that_keeps_its_blocks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_release", lambda self, sequence: None)
    with pytest.raises(AssertionError):
        generate(make_engine(PaperRunner(num_blocks=60)), beams())


def test_the_text_of_a_beam_goes_on_without_that_of_another() -> None:
    state = StopState(SamplingParams(max_tokens=9, stop_strings=("5 6 ",)), 9, TokenNames())
    state.push(5)
    assert state.branch().push(7).text == "5 7 "
    assert state.push(6).stop_match == "5 6 "
