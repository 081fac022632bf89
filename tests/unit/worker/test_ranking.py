"""The best of several outputs, through what a worker does with a claimed job."""

from __future__ import annotations

from common.generation import EventBody, FinishReason, JobBody, OutputDelta, SamplingParams, Usage
from common.jobs import ClaimedJob, JobState, LogEvent, NewEvent
from tests.builders_engine import PaperRunner, make_engine
from worker.holdings import Holdings
from worker.ranking import Ranking


def delta(index: int, first: int, logprobs: tuple[float, ...], *, ends: bool = False) -> OutputDelta:
    ids = tuple(range(first, first + len(logprobs)))
    reason = FinishReason.LENGTH if ends else None
    return OutputDelta(index, first, ids, "x" * len(ids), logprobs, reason)


def sampling(**changes: object) -> SamplingParams:
    fields = {"max_tokens": 6, "temperature": 1.0, "seed": 5, "num_outputs": 4, "num_best": 2, "logprobs": True}
    return SamplingParams(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_mean_counts_and_the_best_comes_first() -> None:
    ranking = Ranking(sampling())
    ranking.take([delta(0, 0, (-1.0,)), delta(1, 0, (-3.0, -1.0), ends=True), delta(2, 0, (-0.5,))])
    ranking.take([delta(0, 1, (-1.0, -1.0), ends=True), delta(2, 1, (-0.7,), ends=True), delta(3, 0, (), ends=True)])
    best = ranking.best()
    assert [(found.output_index, found.score, found.logprobs) for found in best] == [
        (0, -0.6, (-0.5, -0.7)),
        (1, -1.0, (-1.0, -1.0, -1.0)),
    ]
    assert [found.first_token_index for found in best] == [0, 0]


def test_of_equal_ones_the_first_wins_and_one_without_tokens_is_last() -> None:
    ranking = Ranking(sampling(num_best=3, num_outputs=3, logprobs=False))
    ranking.take([delta(0, 0, (), ends=True), delta(1, 0, (-1.0,), ends=True), delta(2, 0, (-1.0, -1.0), ends=True)])
    assert [(len(found.token_ids), found.score, found.logprobs) for found in ranking.best()] == [
        (1, -1.0, ()),
        (2, -1.0, ()),
        (0, None, ()),
    ]


def job(params: SamplingParams, events: tuple[LogEvent, ...] = ()) -> ClaimedJob:
    return ClaimedJob(
        generation_id="g",
        epoch=2 if events else 1,
        sequence=len(events),
        chain_hash=bytes(8),
        remaining_ms=10**9,
        priority=1,
        attempts=0,
        tenant="t",
        usage=Usage(),
        body=JobBody(prompt_token_ids=tuple(range(7)), sampling=params),
        events=events,
    )


def written(params: SamplingParams, events: tuple[LogEvent, ...] = ()) -> list[NewEvent]:
    engine, holdings = make_engine(PaperRunner(num_blocks=60)), Holdings(4)
    engine.add(holdings.add(job(params, events), 0.0))
    found: list[NewEvent] = []
    while engine.has_work:
        found += holdings.events([engine.step(0.0)])
    return found


def test_a_worker_holds_outputs_back_counts_them_and_reports_the_best_at_the_end() -> None:
    *before, last = written(sampling())
    assert len(before) == 5
    assert all(event.body.deltas == () and event.progress and event.terminal is None for event in before)
    assert [event.completion_tokens for event in [*before, last]] == [4, 8, 12, 16, 20, 24]
    assert last.terminal is JobState.DONE
    assert [found.output_index for found in last.body.deltas] == [0, 1]
    every = Ranking(sampling(num_best=4))
    for event in written(sampling(num_best=0)):
        every.take(event.body.deltas)
    assert [(found.token_ids, found.score) for found in last.body.deltas] == [
        (found.token_ids, found.score) for found in every.best()[:2]
    ]


def test_a_takeover_begins_anew_and_comes_to_the_same() -> None:
    whole = written(sampling())
    log = tuple(LogEvent(bytes(8), 1, i, event.body) for i, event in enumerate(whole[:3], 1))
    assert all(isinstance(entry.body, EventBody) for entry in log)
    again = written(sampling(), log)
    assert again[-1].body == whole[-1].body
    assert again[-1].completion_tokens == 24
