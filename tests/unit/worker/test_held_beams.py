"""Beams through what a worker does with a claimed job: held back, counted, and begun anew at a takeover."""

from __future__ import annotations

from common.generation import EventBody, JobBody, OutputDelta, SamplingParams, Usage
from common.jobs import ClaimedJob, JobState, LogEvent, NewEvent
from tests.builders_engine import PaperRunner, generate, make_engine, make_request
from worker.holdings import Holdings

PROMPT = tuple(range(7))
PARAMS = SamplingParams(max_tokens=6, num_beams=3, num_outputs=2)


def job(events: tuple[LogEvent, ...] = ()) -> ClaimedJob:
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
        body=JobBody(prompt_token_ids=PROMPT, sampling=PARAMS),
        events=events,
    )


def written(events: tuple[LogEvent, ...] = (), most: int = 100) -> list[NewEvent]:
    """What a worker commits, of so many steps at most."""
    engine, holdings = make_engine(PaperRunner(num_blocks=60)), Holdings(4)
    engine.add(holdings.add(job(events), 0.0))
    found: list[NewEvent] = []
    while engine.has_work and len(found) < most:
        found += holdings.events([engine.step(0.0)])
    return found


def test_the_work_goes_on_without_a_token_and_ends_with_all_outputs() -> None:
    *before, last = written()
    assert len(before) == 5
    assert all(event.body.deltas == () and event.progress and event.terminal is None for event in before)
    assert [event.completion_tokens for event in [*before, last]] == [3, 6, 9, 12, 15, 18]
    assert (last.terminal, last.body.usage) == (JobState.DONE, Usage(7, 0, 18))
    expected = generate(
        make_engine(PaperRunner(num_blocks=60)), make_request("r", PROMPT, num_beams=3, num_outputs=2, max_tokens=6)
    )
    assert [list(delta.token_ids) for delta in last.body.deltas] == expected["r"].tokens
    assert [delta.output_index for delta in last.body.deltas] == [0, 1]
    assert all(isinstance(delta, OutputDelta) and delta.score is not None for delta in last.body.deltas)


def test_a_takeover_anywhere_begins_anew_and_comes_to_the_same() -> None:
    whole = written()
    for num_steps in range(1, len(whole)):
        log = tuple(LogEvent(bytes(8), 1, i, event.body) for i, event in enumerate(written(most=num_steps), 1))
        assert all(isinstance(entry.body, EventBody) for entry in log)
        again = written(log)
        assert again[-1].body == whole[-1].body
        assert again[-1].completion_tokens == whole[-1].completion_tokens


def test_room_is_kept_for_all_beams_until_the_first_step_with_them() -> None:
    engine, holdings = make_engine(PaperRunner(num_blocks=60), token_budget=4), Holdings(4)
    engine.add(holdings.add(job(), 0.0))
    assert holdings.reserved_kv_tokens == 8 + 3 * 4
    holdings.events([engine.step(0.0)])
    assert holdings.reserved_kv_tokens == 8 + 3 * 4  # half of the prompt
    holdings.events([engine.step(0.0)])
    assert holdings.reserved_kv_tokens == 0
    assert holdings.runners()[0].kv_tokens == 8 + 4
