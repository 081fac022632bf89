"""Wherever a log is cut, a new worker that is given it up to there writes exactly the rest.

Everything that shapes the next token or its text must follow from the log: noise and its position, penalties, n-grams,
text held back inside a character or for a stop string, limits, how other outputs ended. Checked through what a worker
does: claimed job to request (`worker.holdings`), engine, steps to events; fp32, a tiny random model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from common.generation import EventBody, FinishReason, JobBody, OutputDelta, SamplingParams, Usage
from common.jobs import ClaimedJob, LogEvent, NewEvent
from tests.builders_engine import make_settings, tiny_model
from tests.builders_models import VOCAB_SIZE, write_tokenizer
from worker.detokenizer import IncrementalDetokenizer
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.history import NGramFollowers, TokenHistory
from worker.engine.loop import Engine
from worker.engine.request_state import RequestState
from worker.engine.runner import ModelRunner
from worker.engine.stopping import StopStringFilter
from worker.engine.types import GenerationRequest
from worker.holdings import Holdings

MAX_TOKENS = 40
LIMITS = make_settings(
    token_budget=256, max_num_seqs=128, num_blocks=2400, enable_prefix_cache=False, max_draft_tokens=3
)


@dataclass(frozen=True)
class Lab:
    """What new engines are made of."""

    runner: ModelRunner
    tokenizer: Tokenizer

    def engine(self) -> Engine:
        return Engine(self.runner, LIMITS, lambda: IncrementalDetokenizer(self.tokenizer))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Every byte is a token, so that random output is full of characters in pieces."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=2)
    runner = ModelRunner(model, TorchAttention(LIMITS.block_size), LIMITS)
    return Lab(runner, Tokenizer.from_file(str(folder / "tokenizer.json")))


def job_of(
    name: str,
    prompt: Sequence[int],
    sampling: SamplingParams,
    log: Iterable[LogEvent] = (),
    remaining_ms: int = 10**9,
    echo_text: str = "",
) -> ClaimedJob:
    events = tuple(log)
    return ClaimedJob(
        generation_id=name,
        epoch=2 if events else 1,
        sequence=len(events),
        chain_hash=bytes(8),
        remaining_ms=remaining_ms,
        priority=1,
        attempts=0,
        tenant="t",
        usage=Usage(),
        body=JobBody(prompt_token_ids=tuple(prompt), sampling=sampling, echo_text=echo_text),
        events=events,
    )


def run_jobs(lab: Lab, jobs: Iterable[ClaimedJob], rng: random.Random, now: float = 0.0) -> dict[str, list[NewEvent]]:
    """What a new worker writes for these jobs; several steps may become one event."""
    engine, holdings = lab.engine(), Holdings(LIMITS.block_size)
    written: dict[str, list[NewEvent]] = {}
    for job in jobs:
        written[job.generation_id] = []
        engine.add(holdings.add(job, 0.0))
    while engine.has_work:
        steps = [engine.step(now) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        for event in holdings.events(steps):
            written[event.generation_id].append(event)
    return written


def as_log(events: Iterable[NewEvent], first: int = 1) -> list[LogEvent]:
    """As another worker reads them: packed and unpacked."""
    return [
        LogEvent(bytes(8), 1, number, msgspec.msgpack.decode(msgspec.msgpack.encode(event.body), type=EventBody))
        for number, event in enumerate(events, start=first)
    ]


@dataclass
class Output:
    """One output as a whole log gives it."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    details: list[tuple[int, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    ends: list[tuple[FinishReason, str | int | None]] = field(default_factory=list)

    def take(self, delta: OutputDelta) -> None:
        assert self.ends == [], "something after the end"
        assert delta.first_token_index == len(self.token_ids), "a gap or a repetition"
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.details += zip(delta.ranks, delta.top_logprobs, strict=True)
        if delta.finish_reason is not None:
            self.ends.append((delta.finish_reason, delta.stop_match))


def outputs_of(log: Iterable[LogEvent], num_outputs: int) -> list[Output]:
    outputs = [Output() for _ in range(num_outputs)]
    for event in log:
        assert event.body is not None
        for delta in event.body.deltas:
            outputs[delta.output_index].take(delta)
    return outputs


def check_same(found: list[Output], expected: list[Output]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.text == other.text
        assert one.ends == other.ends
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert len(one.details) == len(other.details)
        for (rank, alternatives), (other_rank, others) in zip(one.details, other.details, strict=True):
            assert rank == other_rank
            assert [found for _, found in alternatives] == pytest.approx([found for _, found in others], abs=1e-4)


def scored_tokens(log: Iterable[LogEvent]) -> list[int]:
    """Indices in the prompt, as often and in the order in which the log has their scores."""
    bodies = [event.body for event in log if isinstance(event.body, EventBody)]
    parts = [body.prompt_scores for body in bodies if body.prompt_scores is not None]
    return [part.first_token_index + i for part in parts for i in range(len(part.logprobs))]


def free_case(rng: random.Random) -> tuple[list[int], SamplingParams]:
    """A prompt, and parameters without stops."""
    prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 12))]
    sampling = SamplingParams(
        max_tokens=MAX_TOKENS,
        temperature=rng.choice((0.0, 0.7, 1.0, 1.4)),
        top_k=rng.choice((0, 0, 30)),
        top_p=rng.choice((1.0, 1.0, 0.8)),
        min_p=rng.choice((0.0, 0.0, 0.02)),
        repetition_penalty=rng.choice((1.0, 0.8, 1.5)),
        no_repeat_ngram_size=rng.choice((0, 0, 1, 2, 3)),
        seed=rng.getrandbits(64),
        num_outputs=rng.choice((1, 1, 2)),
        logprobs=True,
        top_logprobs=rng.choice((0, 3)),
        prompt_logprobs=rng.choice((None, None, 2)),
    )
    return prompt, sampling


def with_stops(sampling: SamplingParams, outputs: Sequence[Output], rng: random.Random) -> SamplingParams:
    """Stops that the first output meets late, over several tokens, and others that it only seems to meet."""
    first = outputs[0]
    changes: dict[str, Any] = {}
    if rng.random() < 0.7 and len(first.text) > 12:
        at = rng.randrange(len(first.text) // 2, len(first.text) - 5)
        early = rng.randrange(len(first.text) - 5)
        changes["stop_strings"] = (first.text[early : early + 4] + "\x01", first.text[at : at + rng.randrange(2, 6)])
    if rng.random() < 0.3:
        changes["stop_token_ids"] = (first.token_ids[rng.randrange(MAX_TOKENS // 2, MAX_TOKENS)],)
    return msgspec.structs.replace(sampling, **changes)


def check_every_cut(lab: Lab, rng: random.Random) -> int:
    """Hold one random generation to the law at every place where its log can be cut; return how many."""
    prompt, sampling = free_case(rng)
    free = as_log(run_jobs(lab, [job_of("g", prompt, sampling)], rng)["g"])
    sampling = with_stops(sampling, outputs_of(free, sampling.num_outputs), rng)
    written = run_jobs(lab, [job_of("g", prompt, sampling)], rng)["g"]
    log, usage = as_log(written), written[-1].body.usage
    expected = outputs_of(log, sampling.num_outputs)
    assert usage is not None
    assert all(len(output.ends) == 1 for output in expected)
    heads = [*(log[:cut] for cut in range(len(log) + 1)), *without_ends(log)]
    jobs = [job_of(f"cut-{number}", prompt, sampling, head) for number, head in enumerate(heads)]
    rests = run_jobs(lab, jobs, rng)
    for head, rest in zip(heads, rests.values(), strict=True):
        check_same(outputs_of([*head, *as_log(rest)], sampling.num_outputs), expected)
        is_scored = sampling.prompt_logprobs is not None
        assert scored_tokens([*head, *as_log(rest)]) == (list(range(1, len(prompt))) if is_scored else [])
        last = rest[-1].body.usage
        assert last is not None
        assert last.completion_tokens == rest[-1].completion_tokens == usage.completion_tokens
        assert [event.terminal is not None for event in rest] == [False] * (len(rest) - 1) + [True]
    return len(heads)


def without_ends(log: Sequence[LogEvent]) -> Iterable[list[LogEvent]]:
    """Logs up to an event that ended an output, without saying so: the takeover comes exactly at the end."""
    for cut, event in enumerate(log):
        assert event.body is not None
        if any(delta.finish_reason is not None for delta in event.body.deltas):
            deltas = tuple(
                msgspec.structs.replace(delta, finish_reason=None, stop_match=None) for delta in event.body.deltas
            )
            yield [*log[:cut], msgspec.structs.replace(event, body=EventBody(deltas, None, event.body.prompt_scores))]


@given(st.randoms(use_true_random=False))
@settings(max_examples=8, deadline=None)
def test_a_new_worker_writes_exactly_the_rest(lab: Lab, rng: random.Random) -> None:
    assert check_every_cut(lab, rng) > 1


@given(st.randoms(use_true_random=False))
@settings(max_examples=4, deadline=None)
def test_a_time_limit_after_a_takeover_shows_all_text_that_was_held_back(lab: Lab, rng: random.Random) -> None:
    prompt, sampling = free_case(rng)
    free = as_log(run_jobs(lab, [job_of("g", prompt, sampling)], rng)["g"])
    text = outputs_of(free, sampling.num_outputs)[0].text
    # Six bytes that no output of this length ends a piece of text with; of single bytes, each comes now and then.
    never = tuple(text[at : at + 5] + "\ue000\ue000" for at in range(0, len(text), 3))[:16]
    sampling = msgspec.structs.replace(sampling, stop_strings=never)
    log = as_log(run_jobs(lab, [job_of("g", prompt, sampling)], rng)["g"])
    heads = [log[:cut] for cut in range(len(log))]
    jobs = [job_of(f"cut-{number}", prompt, sampling, head, remaining_ms=10) for number, head in enumerate(heads)]
    for head, rest in zip(heads, run_jobs(lab, jobs, rng, now=1.0).values(), strict=True):
        done = outputs_of(head, sampling.num_outputs)
        for before, after in zip(done, outputs_of([*head, *as_log(rest)], sampling.num_outputs), strict=True):
            assert after.token_ids == before.token_ids
            assert after.ends == (before.ends or [(FinishReason.TIME_LIMIT, None)])
            assert after.text == lab.tokenizer.decode(after.token_ids, skip_special_tokens=True)


def test_an_echo_is_written_once_wherever_the_log_is_cut(lab: Lab) -> None:
    rng, echo = random.Random(4), "as it was said: "
    sampling = SamplingParams(max_tokens=6, temperature=1.0, seed=8, num_outputs=3, stop_token_ids=(50, 60, 70))
    silent = outputs_of(as_log(run_jobs(lab, [job_of("g", [5, 6, 7], sampling)], rng)["g"]), 3)
    log = as_log(run_jobs(lab, [job_of("g", [5, 6, 7], sampling, echo_text=echo)], rng)["g"])
    heads = [*(log[:cut] for cut in range(len(log) + 1)), *without_ends(log)]
    jobs = [job_of(f"cut-{n}", [5, 6, 7], sampling, head, echo_text=echo) for n, head in enumerate(heads)]
    for head, rest in zip(heads, run_jobs(lab, jobs, rng).values(), strict=True):
        whole = outputs_of([*head, *as_log(rest)], 3)
        assert [output.text for output in whole] == [echo + output.text for output in silent]
    late = job_of("late", [5, 6, 7], sampling, remaining_ms=0, echo_text=echo)
    assert [output.text for output in outputs_of(as_log(run_jobs(lab, [late], rng, now=1.0)["late"]), 3)] == [echo] * 3


# -- the law can be broken: a new worker that forgets one kind of state --------------------------------------------

AfterStart = Callable[[Engine, RequestState, int], None]


def forget_the_filter(engine: Engine, state: RequestState, index: int) -> None:
    """Text that was held back for a stop string."""
    stop = state.outputs[index].stop
    stop._filter = StopStringFilter(state.request.sampling.stop_strings)


def forget_the_bytes(engine: Engine, state: RequestState, index: int) -> None:
    """The beginning of a character."""
    state.outputs[index].stop._detokenizer = engine._new_detokenizer()


def forget_the_count(engine: Engine, state: RequestState, index: int) -> None:
    """How many tokens there are already."""
    state.outputs[index].stop._num_tokens = 0


def forget_what_was_said(engine: Engine, state: RequestState, index: int) -> None:
    """The output's tokens, for penalties and n-grams; the prompt's are known."""
    sequence = state.outputs[index].sequence
    if sequence.history is not None:
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        sequence.history = TokenHistory(state.request.sampling, prompt)


def forget_what_was_forbidden(engine: Engine, state: RequestState, index: int) -> None:
    """N-grams alone."""
    history = state.outputs[index].sequence.history
    if history is not None and history._ngrams is not None:
        history._ngrams = NGramFollowers(state.request.sampling.no_repeat_ngram_size)


def forget_the_seed(engine: Engine, state: RequestState, index: int) -> None:
    """Which noise the tokens are drawn with."""
    sequence = state.outputs[index].sequence
    sequence.sampling = msgspec.structs.replace(sequence.sampling, seed=0)


AFTER_START: list[AfterStart] = [
    forget_the_filter,
    forget_the_bytes,
    forget_the_count,
    forget_what_was_said,
    forget_what_was_forbidden,
    forget_the_seed,
]


def without_ended_outputs(request: GenerationRequest) -> GenerationRequest:
    return replace(request, finished_outputs=frozenset())


def without_the_last_token(request: GenerationRequest) -> GenerationRequest:
    return replace(request, emitted=tuple(ids[:-1] for ids in request.emitted))


def without_emitted(request: GenerationRequest) -> GenerationRequest:
    return replace(request, emitted=())


ON_ADD = [without_ended_outputs, without_the_last_token, without_emitted]


def is_caught(lab: Lab, seeds: Iterable[int]) -> bool:
    for seed in seeds:
        try:
            check_every_cut(lab, random.Random(seed))
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("mutant", AFTER_START, ids=lambda mutant: mutant.__name__)
def test_a_worker_that_forgets_a_state_breaks_the_law(
    lab: Lab, mutant: AfterStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Engine._start_output

    def start_and_forget(self: Engine, state: RequestState, index: int, emitted: tuple[int, ...]) -> None:
        start(self, state, index, emitted)
        if emitted and index in state.outputs:
            mutant(self, state, index)

    monkeypatch.setattr(Engine, "_start_output", start_and_forget)
    assert is_caught(lab, range(12))


@pytest.mark.parametrize("mutant", ON_ADD, ids=lambda mutant: mutant.__name__)
def test_a_worker_that_reads_the_log_wrongly_breaks_the_law(
    lab: Lab, mutant: Callable[[GenerationRequest], GenerationRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Engine.add
    monkeypatch.setattr(Engine, "add", lambda self, request: add(self, mutant(request)))
    assert is_caught(lab, range(12))
