"""Scores of tokens against torch's own log_softmax and topk; prompts scored in any chunks, once each."""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.deltas import merge_scores
from common.generation import Alternatives, PromptScores, SamplingParams
from tests.builders_engine import Driver, PaperRunner, generate, make_engine, make_request, paper_logits, prefix_hashes
from tests.waits import Waits
from worker.engine.sampler import Sampler
from worker.engine.scheduler import MAX_SCORED_ROWS
from worker.engine.sequence import Sequence
from worker.engine.types import GenerationRequest

CPU = torch.device("cpu")


def make_row(prompt: list[int], **params: Any) -> Sequence:
    return Sequence("s", prompt, SamplingParams(max_tokens=10, **params))


def of_place(logits: torch.Tensor, token_id: int, num_alternatives: int) -> tuple[float, int, list[float]]:
    """Log-probability, rank and the alternatives' log-probabilities."""
    expected = logits.float().log_softmax(-1)
    rank = 1 + int((logits.float() > logits.float()[token_id]).sum())
    return float(expected[token_id]), rank, expected.topk(num_alternatives).values.tolist()


# -- sampled tokens ---------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"logprobs": True, "top_logprobs": 4},
    {"logprobs": True},
    {},
    {"temperature": 1.2, "seed": 3, "logprobs": True, "top_logprobs": 20, "repetition_penalty": 1.5},
    {"temperature": 1.0, "seed": 4, "top_p": 0.9, "logprobs": True, "top_logprobs": 1},
    {"temperature": 0.7, "seed": 5, "num_best": 2, "num_outputs": 3},
]


@pytest.mark.parametrize("may_wait", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_gets_what_it_asked_for(may_wait: bool, dtype: torch.dtype) -> None:
    rows = [make_row([1, 2, i], **params) for i, params in enumerate(ROWS)]
    # The last of them are nearly flat: with top_p they need more candidates, and are drawn again on a device.
    logits = torch.randn(len(rows), 3000, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[4] *= 0.01
    sampled = Sampler(CPU, may_wait=may_wait).sample(logits, rows)
    assert sampled.logprobs.keys() == {0, 1, 3, 4, 5}
    assert sampled.details.keys() == {0, 3, 4}
    assert not sampled.invalid_rows
    for row, logprob in sampled.logprobs.items():
        count = rows[row].sampling.top_logprobs
        expected, rank, top = of_place(logits[row], sampled.token_ids[row], count)
        assert logprob == pytest.approx(expected, abs=1e-5)
        if count:
            details = sampled.details[row]
            assert details.rank == rank
            assert [found for _, found in details.alternatives] == pytest.approx(top, abs=1e-5)
            own = logits[row].float().log_softmax(-1)
            assert all(float(own[token]) == pytest.approx(found, abs=1e-5) for token, found in details.alternatives)


def test_alternatives_wait_no_earlier_for_a_device() -> None:
    rows = [make_row([1, 2, i], **params) for i, params in enumerate(ROWS)]
    logits = torch.randn(len(rows), 3000, generator=torch.Generator().manual_seed(1)) * 5
    with Waits() as waits:
        Sampler(CPU, may_wait=False).sample(logits, rows)
    assert waits.seen == []


def test_a_small_vocabulary_has_no_more_alternatives_than_tokens() -> None:
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(1))
    sampled = Sampler(CPU).sample(logits, [make_row([1], logprobs=True, top_logprobs=20)])
    assert sorted(token for token, _ in sampled.details[0].alternatives) == list(range(7))


def test_rows_that_ask_for_nothing_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.engine.scores.score_tokens", None)
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    assert Sampler(CPU).sample(logits, [make_row([1]), make_row([2], temperature=1.0)]).logprobs == {}


def test_alternatives_come_with_their_tokens_when_drafts_stand() -> None:
    runner = PaperRunner(num_blocks=60, memory=1)
    request = make_request("r", [1, 2, 3], max_tokens=40, logprobs=True, top_logprobs=3)
    deltas = [delta for engine in [make_engine(runner, token_budget=32)] for delta in deltas_of(engine, request)]
    assert runner.num_draft_rows > 0
    assert any(len(delta.token_ids) > 1 for delta in deltas)
    ids = list(request.prompt_token_ids)
    for delta in deltas:
        assert len(delta.token_ids) == len(delta.ranks) == len(delta.top_logprobs) == len(delta.logprobs)
        for token_id, rank, alternatives in zip(delta.token_ids, delta.ranks, delta.top_logprobs, strict=True):
            logits = torch.from_numpy(paper_logits(prefix_hashes(ids[-1:])[-1], runner.vocab_size))
            assert (rank, alternatives[0][0]) == (1, token_id)
            assert [logprob for _, logprob in alternatives] == pytest.approx(of_place(logits, token_id, 3)[2], abs=1e-5)
            ids.append(token_id)


def deltas_of(engine: Any, request: GenerationRequest) -> list[Any]:
    engine.add(request)
    found = []
    while engine.has_work:
        found += [delta for output in engine.step(0.0).outputs for delta in output.deltas]
    return found


# -- prompts ----------------------------------------------------------------------------------


def paper_scores(prompt: tuple[int, ...], num_alternatives: int) -> list[tuple[float, int, list[float]]]:
    hashes = prefix_hashes(array("i", prompt))
    return [
        of_place(torch.from_numpy(paper_logits(hashes[i], 40)), prompt[i + 1], num_alternatives)
        for i in range(len(prompt) - 1)
    ]


def check_scores(scores: PromptScores | None, prompt: tuple[int, ...], num_alternatives: int, first: int = 1) -> None:
    expected = paper_scores(prompt, num_alternatives)[first - 1 :]
    assert scores is not None
    assert scores.first_token_index == first
    assert list(scores.logprobs) == pytest.approx([logprob for logprob, _, _ in expected], abs=1e-5)
    assert list(scores.ranks) == [rank for _, rank, _ in expected]
    found: tuple[Alternatives, ...] = scores.top_logprobs
    assert len(found) == (len(expected) if num_alternatives else 0)
    for alternatives, (_, _, top) in zip(found, expected, strict=False):
        assert [logprob for _, logprob in alternatives] == pytest.approx(top, abs=1e-5)


def test_scores_take_a_bounded_number_of_rows_a_step() -> None:
    runner = PaperRunner(num_blocks=200, max_model_len=600)
    engine = make_engine(runner, token_budget=256)
    prompts = {f"r{i}": tuple((7 * j + i) % 40 for j in range(100)) for i in range(3)}
    driver = Driver(engine)
    driver.add(*(make_request(name, prompt, prompt_logprobs=2, max_tokens=3) for name, prompt in prompts.items()))
    parts: dict[str, list[PromptScores | None]] = {name: [] for name in prompts}
    while engine.has_work:
        scored = [output for output in driver.step().outputs if output.prompt_scores is not None]
        assert sum(len(output.prompt_scores.logprobs) for output in scored if output.prompt_scores) <= MAX_SCORED_ROWS
        for output in scored:
            parts[output.request_id].append(output.prompt_scores)
    for name, prompt in prompts.items():
        check_scores(merge_scores(parts[name]), prompt, 2)
        assert (
            driver.results[name].tokens
            == generate(
                make_engine(PaperRunner(num_blocks=99, max_model_len=600)), make_request(name, prompt, max_tokens=3)
            )[name].tokens
        )


def test_a_scored_prompt_takes_nothing_of_its_rows_from_the_prefix_cache() -> None:
    engine = make_engine(PaperRunner(num_blocks=60))
    prompt = tuple(range(20))
    generate(engine, make_request("a", prompt, max_tokens=2))
    driver = Driver(engine)
    driver.add(make_request("b", prompt, max_tokens=2, prompt_logprobs=0))
    usage = driver.run()["b"].usage
    assert usage is not None
    assert usage.cached_prompt_tokens == 0
    generate(engine, make_request("c", prompt, max_tokens=2))
    assert engine.stats().cached_prompt_tokens == 16  # of the last one: others may still hit


def test_a_takeover_goes_on_with_the_scores_that_are_missing() -> None:
    prompt = tuple((7 * j) % 40 for j in range(50))
    engine = make_engine(PaperRunner(num_blocks=60))
    generate(engine, make_request("before", prompt, max_tokens=1))
    engine.add(make_request("r", prompt, max_tokens=2, prompt_logprobs=1, num_scored_tokens=23))
    parts = []
    while engine.has_work:
        parts += [output.prompt_scores for output in engine.step(0.0).outputs]
    check_scores(merge_scores(parts), prompt, 1, first=23)
    assert engine.stats().cached_prompt_tokens == 20  # five blocks of four: the row behind them is scored


def test_logits_that_are_no_numbers_end_a_scored_request() -> None:
    runner = PaperRunner()
    runner.poisoned_token = 5
    engine = make_engine(runner, token_budget=4)
    collected = generate(engine, make_request("r", range(12), prompt_logprobs=0, num_outputs=2))["r"]
    assert collected.error == "NAN_LOGITS"


def test_without_new_tokens_the_scores_are_all_there_is() -> None:
    engine = make_engine(PaperRunner())
    engine.add(make_request("r", range(10), max_tokens=0, prompt_logprobs=1, num_outputs=2, echo_text="x"))
    outputs = [output for _ in range(3) for output in engine.step(0.0).outputs]
    check_scores(merge_scores(output.prompt_scores for output in outputs), tuple(range(10)), 1)
    deltas = [delta for output in outputs for delta in output.deltas]
    assert [(delta.output_index, delta.token_ids, delta.text) for delta in deltas] == [(0, (), "x"), (1, (), "x")]
    assert outputs[-1].usage is not None
    assert outputs[-1].usage.completion_tokens == 0
    assert not engine.has_work


@pytest.mark.parametrize("token_budget", [5, 64])
@pytest.mark.parametrize("length", [62, 64])
def test_a_prompt_that_fills_the_context_can_be_scored(token_budget: int, length: int) -> None:
    prompt = tuple((7 * i) % 40 for i in range(length))
    engine = make_engine(PaperRunner(num_blocks=1 + 16, max_model_len=length), token_budget=token_budget)
    engine.add(make_request("r", prompt, max_tokens=0, prompt_logprobs=1, num_outputs=2))
    outputs = [output for _ in range(20) for output in engine.step(0.0).outputs]
    check_scores(merge_scores(output.prompt_scores for output in outputs), prompt, 1)
    assert [output.error for output in outputs] == [None] * len(outputs)
    assert outputs[-1].usage is not None
    assert not engine.has_work
    engine.add(make_request("long", (*prompt, 1), max_tokens=0, prompt_logprobs=1))
    assert engine.step(0.0).outputs[0].error == "PROMPT_TOO_LONG"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_any_workload_is_scored_once_whatever_is_preempted_or_fails(seed: int) -> None:
    rng = random.Random(seed)
    runner = PaperRunner(num_blocks=rng.randrange(13, 40), max_model_len=44)
    runner.fail_steps = {rng.randrange(2, 30)}
    engine = make_engine(runner, token_budget=rng.randrange(6, 24), max_num_seqs=rng.randrange(2, 6))
    requests = [
        make_request(
            f"r{i}",
            [(7 * j + rng.randrange(2)) % 40 for j in range(rng.randrange(1, 30))],
            max_tokens=rng.randrange(1, 12),
            num_outputs=rng.randrange(1, 4),
            temperature=1.0,
            prompt_logprobs=rng.choice((None, 0, 3)),
        )
        for i in range(rng.randrange(1, 6))
    ]
    parts: dict[str, list[PromptScores | None]] = {request.request_id: [] for request in requests}
    driver, waiting = Driver(engine), list(requests)
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.5:
            driver.add(waiting.pop())
        for output in driver.step().outputs:
            parts[output.request_id].append(output.prompt_scores)
    for request in requests:
        count, prompt = request.sampling.prompt_logprobs, request.prompt_token_ids
        scores = merge_scores(parts[request.request_id])
        if count is None or len(prompt) == 1:
            assert scores is None
        elif driver.results[request.request_id].error is None:
            check_scores(scores, prompt, count)
