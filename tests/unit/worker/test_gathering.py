"""Tokens that gather: of many streams, each event holds those of several steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from common.generation import EventBody, OutputDelta, Usage
from common.jobs import JobState, NewEvent
from tests.builders_jobs import make_claimed
from worker.engine.types import RequestOutput, StepResult
from worker.holdings import Holdings
from worker.process import most_events_per_s
from worker.settings import WorkerSettings

NUM = 32
EVENTS_PER_S = 200  # of 32 streams: one each 0.16 s


def hold(num_jobs: int = NUM, max_events_per_s: float = EVENTS_PER_S) -> Holdings:
    holdings = Holdings(16, max_events_per_s)
    for i in range(num_jobs):
        holdings.add(make_claimed(f"g{i}"), 0.0)
    return holdings


def output(job: int, index: int, *, ends: bool = False) -> RequestOutput:
    """One token, whose id is its index."""
    delta = OutputDelta(output_index=0, first_token_index=index, token_ids=(index,), text=f"{index} ")
    return RequestOutput(
        f"g{job}@1", (delta,), usage=Usage(prompt_tokens=3, completion_tokens=index + 1) if ends else None
    )


def step(index: int, jobs: Sequence[int] = range(NUM), *, ends: bool = False) -> StepResult:
    return StepResult(index + 1, tuple(output(job, index, ends=ends) for job in jobs))


def ids(event: NewEvent) -> list[int]:
    assert isinstance(event.body, EventBody)
    return [token_id for delta in event.body.deltas for token_id in delta.token_ids]


def test_tokens_of_many_streams_gather_up_to_the_rate() -> None:
    holdings = hold()
    times = [0.05 * i for i in range(9)]
    found = [holdings.events([step(i)], now) for i, now in enumerate(times)]
    assert [len(events) for events in found] == [NUM, 0, 0, 0, NUM, 0, 0, 0, NUM]
    assert {tuple(ids(event)) for event in found[4]} == {(1, 2, 3, 4)}
    assert {event.completion_tokens for event in found[4]} == {5}


def test_they_wait_no_longer_than_a_fifth_of_a_second() -> None:
    holdings = hold(max_events_per_s=1)
    holdings.events([step(0)], 10.0)
    assert holdings.due_in(10.0) is None
    assert holdings.events([step(1)], 10.15) == []
    due_in = holdings.due_in(10.15)
    assert due_in is not None
    assert abs(due_in - 0.05) < 1e-6
    assert [ids(event) for event in holdings.events([], 10.2 + 1e-6)] == [[1]] * NUM
    assert holdings.due_in(10.3) is None


def test_what_is_due_goes_with_a_step_where_one_ends_soon() -> None:
    holdings = hold()
    holdings.events([step(0)], 10.0)
    holdings.events([step(1)], 10.15)
    due_in = holdings.due_in(10.15)
    assert due_in is not None
    assert abs(due_in - 0.05) < 1e-6, "0.04 s behind the 0.16 s of its rate"
    assert len(holdings.events([step(2)], 10.165)) == NUM


def test_few_streams_do_not_gather() -> None:
    holdings = hold(1)
    assert [len(holdings.events([step(i, [0])], 0.001 * i)) for i in range(9)] == [1] * 9


def test_a_first_token_does_not_wait() -> None:
    holdings = hold()
    others = range(1, NUM)
    holdings.events([step(0, others)], 0.0)
    (event,) = holdings.events([StepResult(2, (*step(1, others).outputs, output(0, 0)))], 0.01)
    assert (event.generation_id, ids(event)) == ("g0", [0])


def test_a_claims_first_event_does_not_wait_though_its_log_has_tokens() -> None:
    holdings = hold()
    others = range(1, NUM)
    holdings.events([step(0, others)], 0.0)
    (event,) = holdings.events([StepResult(2, (*step(1, others).outputs, output(0, 7)))], 0.01)
    assert (event.generation_id, ids(event)) == ("g0", [7])


def test_an_end_takes_along_what_has_gathered() -> None:
    holdings = hold()
    holdings.events([step(0)], 0.0)
    assert holdings.events([step(1)], 0.01) == []
    (event,) = holdings.events([StepResult(3, (output(4, 2, ends=True),))], 0.02)
    assert (event.generation_id, ids(event), event.terminal) == ("g4", [1, 2], JobState.DONE)
    assert "g4" not in holdings


def test_what_was_lost_meanwhile_is_left_out() -> None:
    holdings = hold()
    holdings.events([step(0)], 0.0)
    assert holdings.events([step(1)], 0.01) == []
    holdings.drop("g3")
    found = {event.generation_id for event in holdings.events([], 1.0)}
    assert found == {f"g{i}" for i in range(NUM)} - {"g3"}


def test_how_many_events_there_may_be() -> None:
    """What is set, else by the threads of a CPU; on a GPU each step makes its own."""
    assert most_events_per_s(WorkerSettings(max_events_per_s=7, num_threads=4), "cpu") == 7
    assert most_events_per_s(WorkerSettings(num_threads=4), "cpu") == 400
    assert most_events_per_s(WorkerSettings(num_threads=4), "cuda:0 NVIDIA H100") == math.inf


@given(
    st.lists(st.tuples(st.floats(0, 0.1), st.sets(st.integers(0, 7), min_size=1)), max_size=40),
    st.sampled_from([1.0, 20.0, 100.0, 1e9]),
)
def test_every_token_comes_once_and_in_order(steps: list[tuple[float, set[int]]], rate: float) -> None:
    """Whatever steps there are and however long they take."""
    holdings, now = hold(8, rate), 0.0
    made: dict[int, int] = dict.fromkeys(range(8), 0)
    got: dict[str, list[int]] = {f"g{job}": [] for job in range(8)}
    for number, (pause, jobs) in enumerate(steps):
        now += pause
        outputs = tuple(output(job, made[job]) for job in sorted(jobs))
        for job in jobs:
            made[job] += 1
        for event in holdings.events([StepResult(number + 1, outputs)], now):
            got[event.generation_id] += ids(event)
    for event in holdings.events([], now + 1.0):
        got[event.generation_id] += ids(event)
    assert got == {f"g{job}": list(range(count)) for job, count in made.items()}
