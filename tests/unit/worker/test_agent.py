"""The agent's watchdog: a step that never ends ends the worker, and nothing renews its lease any more."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast
from unittest import mock

import pytest
from prometheus_client import CollectorRegistry

from common.generation import EventBody, OutputDelta, Usage
from common.jobs import ClaimedJob, CommitResult, JobState, NewEvent, Swept, WorkerInfo
from tests.builders_jobs import make_claimed
from tests.builders_metrics import value
from tests.builders_system import until
from worker.agent import Agent, StepHungError
from worker.engine.types import EngineStats, GenerationRequest, RequestOutput, StepResult
from worker.holdings import Holdings
from worker.metrics import WorkerMetrics
from worker.settings import WorkerSettings

BEAT_S = 0.01


@dataclass
class Engine:
    """A step that has been submitted to never returns, from `hangs` on."""

    hangs: bool = True
    stats: EngineStats = field(default_factory=lambda: EngineStats(num_blocks=64, num_free_blocks=64))
    submitted: list[str] = field(default_factory=list)
    began: float = 0.0
    is_stopped: bool = False

    @property
    def last_step_at(self) -> float:
        return self.began if self.submitted and self.hangs else time.monotonic()

    def submit(self, *requests: GenerationRequest) -> None:
        self.submitted += [request.request_id for request in requests]
        self.began = time.monotonic() if requests else self.began

    def abort(self, request_id: str) -> None:
        self.submitted.remove(request_id)

    def ack(self, step: int) -> None:
        raise AssertionError("no step has ended")

    def stop(self) -> None:
        self.is_stopped = True

    async def next_results(self) -> list[StepResult]:
        return [await self.next_result()]

    async def next_result(self) -> StepResult:
        return await asyncio.Event().wait()  # type: ignore[return-value]


@dataclass
class Claims:
    """A queue with some jobs. Each call that would renew the lease is noted with its time."""

    jobs: list[ClaimedJob]
    renewals: list[float] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    swallows: bool = False  # the first cancellation of a blocking wait, as the Redis client can
    held: int = 0
    is_paused: bool = False
    drain_requested_by: str = ""

    async def _wait(self) -> None:
        while not self.jobs:
            try:
                await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                if not self.swallows:
                    raise
                self.swallows = False
                return

    async def claim(self, max_jobs: int, free: int, total: int, *, wait: bool = False) -> list[ClaimedJob]:
        if wait:
            await self._wait()
        self.renewals.append(time.monotonic())
        taken, self.jobs = self.jobs[:1], self.jobs[1:]
        return taken

    async def heartbeat(self, info: WorkerInfo) -> CommitResult:
        self.renewals.append(time.monotonic())
        return CommitResult(drain_requested_by=self.drain_requested_by)

    async def commit(self, events: Any) -> CommitResult:
        raise AssertionError("no step has ended")

    async def reap(self) -> Swept:
        return Swept()

    async def sweep(self) -> Swept:
        return Swept()

    async def release(self, generation_ids: list[str]) -> int:
        self.released += generation_ids
        return len(generation_ids)

    async def leave(self) -> int:
        return 0


def make_agent(claims: Claims, engine: Engine, hang_s: float, **options: Any) -> Agent:
    settings = WorkerSettings(hang_s=hang_s, drain_s=0)
    return Agent(
        cast(Any, claims),
        cast(Any, engine),
        settings,
        WorkerInfo,
        WorkerMetrics(CollectorRegistry(), "test", 10),
        **{"max_num_seqs": 8, "beat_interval_s": BEAT_S, **options},
    )


class SlowFarewell(Claims):
    """A server that takes its time over a worker that leaves."""

    left_at = 0.0

    async def leave(self) -> int:
        self.left_at = time.monotonic()
        await asyncio.sleep(10 * BEAT_S)
        return 0


async def test_who_leaves_says_nothing_more() -> None:
    """A heartbeat behind the farewell would have it listed, and waited for, until its lease ends."""
    claims = SlowFarewell([])
    agent = make_agent(claims, Engine(hangs=False), hang_s=10)
    running = asyncio.create_task(agent.run())
    await asyncio.sleep(5 * BEAT_S)
    agent.stop()
    await asyncio.wait_for(running, 10)
    assert len(claims.renewals) > 1
    assert claims.renewals[-1] <= claims.left_at


async def test_a_step_that_never_ends_ends_the_worker() -> None:
    claims, engine = Claims([make_claimed("a")]), Engine()
    agent = make_agent(claims, engine, hang_s=0.1)
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(agent.run(), 10)
    assert caught.value.subgroup(StepHungError) is not None
    assert engine.submitted == ["a@1"]
    assert claims.released == []  # it cannot be given back: what computes it still runs
    number = len(claims.renewals)
    assert claims.renewals[-1] - engine.began < 0.1 + 1  # while young it is renewed
    await asyncio.sleep(5 * BEAT_S)
    assert len(claims.renewals) == number, "the lease is renewed after the step was found to hang"


async def test_no_loop_goes_on_renewing_the_lease_when_its_cancellation_is_swallowed() -> None:
    """The claim loop waits for a bell, holding nothing: a cancellation that gets lost must not keep the worker."""
    claims, engine = Claims([]), Engine()
    claims.swallows = True
    agent = make_agent(claims, engine, hang_s=0.05)
    engine.submitted.append("b@1")  # adopted, so to speak: the engine computes while the claim loop waits
    engine.began = time.monotonic()
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(agent.run(), 10)
    assert caught.value.subgroup(StepHungError) is not None
    assert not claims.swallows


async def test_an_engine_that_steps_or_idles_is_left_alone() -> None:
    claims, engine = Claims([make_claimed("a")]), Engine(hangs=False)
    agent = make_agent(claims, engine, hang_s=0.03)
    running = asyncio.create_task(agent.run())

    async def has_beaten() -> bool:
        return len(claims.renewals) > 20  # many times hang_s

    await until(has_beaten, what="beats")
    assert not running.done()
    agent.stop()
    await asyncio.wait_for(running, 10)
    assert (claims.released, engine.submitted, engine.is_stopped) == (["a"], [], True)


async def test_an_operators_request_to_drain_ends_the_worker_as_a_signal_does() -> None:
    claims, engine = Claims([make_claimed("a"), make_claimed("b")]), Engine(hangs=False)
    agent = make_agent(claims, engine, hang_s=10)
    running = asyncio.create_task(agent.run())

    async def has_submitted() -> bool:
        return bool(engine.submitted)

    await until(has_submitted, what="work")
    claims.drain_requested_by = "key-1"
    await asyncio.wait_for(running, 10)
    assert agent.draining
    assert (claims.released, engine.is_stopped) == (["a"], True)
    assert len(claims.jobs) == 1, "nothing new is claimed"


# -- preemption


@dataclass
class Crowded(Claims):
    """A queue in which the highest class always waits, for more room than there may be."""

    wants: int = 16
    asked: int = 0
    preempted: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    async def claim(self, max_jobs: int, free: int, total: int, *, wait: bool = False) -> list[ClaimedJob]:
        self.calls.append("claim")
        taken, self.jobs = self.jobs[:max_jobs], self.jobs[max_jobs:]
        return taken

    async def heartbeat(self, info: WorkerInfo) -> CommitResult:
        self.renewals.append(time.monotonic())
        return CommitResult(queued=(1, 0, 0))

    async def wanted(self, total: int) -> int:
        self.asked += 1
        return self.wants

    async def preempt(self, generation_ids: list[str], max_preemptions: int) -> int:
        self.calls.append("preempt")
        self.preempted += generation_ids
        return len(generation_ids)


class Idle(Engine):
    """An engine that computes nothing, and does at once what it is told."""

    async def settled(self) -> None:
        return


async def run_crowded(claims: Crowded, num_beats: int = 30, **settings: Any) -> None:
    engine = Idle(hangs=False)
    agent = Agent(
        cast(Any, claims),
        cast(Any, engine),
        WorkerSettings(drain_s=0, **settings),
        WorkerInfo,
        WorkerMetrics(CollectorRegistry(), "test", 10),
        max_num_seqs=2,
        beat_interval_s=BEAT_S,
    )

    async def has_beaten() -> bool:
        return len(claims.renewals) > num_beats

    with mock.patch("worker.agent._PREEMPT_PAUSE_S", 60):  # longer than a slow machine takes for all beats
        running = asyncio.create_task(agent.run())
        await until(has_beaten, what="beats")
        agent.stop()
        await asyncio.wait_for(running, 10)


LOW = [make_claimed("old", priority=2), make_claimed("young", priority=2)]


async def test_one_gives_way_and_then_its_place_is_claimed() -> None:
    claims = Crowded(jobs=[*LOW, make_claimed("urgent", priority=0), make_claimed("urgent too", priority=0)])
    await run_crowded(claims)
    assert claims.preempted == ["young", "old"]  # a round for each
    assert claims.calls[-2:] != ["preempt", "preempt"]
    assert all(after == "claim" for before, after in pairwise(claims.calls) if before == "preempt")


async def test_what_ends_while_it_is_to_give_way_counts_as_ended() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, "test", 10)
    claims = Crowded(jobs=[])
    agent = Agent(
        cast(Any, claims),
        cast(Any, Idle(hangs=False)),
        WorkerSettings(drain_s=0),
        WorkerInfo,
        metrics,
        max_num_seqs=2,
        beat_interval_s=BEAT_S,
    )
    agent._take(LOW)
    preempt = claims.preempt

    async def end_first(generation_ids: list[str], max_preemptions: int) -> int:
        agent._holdings.drop("young")  # a step has brought its end, whose commit is under way
        return await preempt(generation_ids, max_preemptions)

    with mock.patch.object(claims, "preempt", end_first):
        await agent._make_room()
    assert claims.preempted == ["young"]
    end = NewEvent(generation_id="young", body=EventBody(), completion_tokens=4, terminal=JobState.DONE)
    metrics.committed([end], ())
    assert value(registry, "torchrelay_request_success_total", model_name="test", finished_reason="done") == 1
    assert value(registry, "torchrelay_jobs_dropped_total", model_name="test", reason="PREEMPTED") == 0


async def test_what_was_made_room_for_and_did_not_come_stops_preemption_for_a_while() -> None:
    claims = Crowded(jobs=[*LOW, make_claimed("other", priority=1)])
    await run_crowded(claims)
    assert claims.preempted == ["young"]
    assert claims.asked == 1


async def test_nothing_is_asked_again_and_again_where_no_room_can_be_made() -> None:
    claims = Crowded(jobs=LOW, wants=10**6)
    await run_crowded(claims)
    assert (claims.preempted, claims.asked) == ([], 1)


@pytest.mark.parametrize("fields", [{"priority": 0}, {"priority": 2, "by_share": True}, {"num_preemptions": 4}])
async def test_where_nobody_may_give_way_nothing_is_asked(fields: dict[str, Any]) -> None:
    claims = Crowded(jobs=[make_claimed(name, **fields) for name in "ab"])
    await run_crowded(claims)
    assert claims.asked == 0


async def test_nothing_gives_way_while_the_worker_may_not_claim() -> None:
    claims = Crowded(jobs=list(LOW), is_paused=True)
    await run_crowded(claims)
    assert (claims.preempted, claims.asked) == ([], 0)


async def test_preemption_can_be_switched_off() -> None:
    claims = Crowded(jobs=LOW)
    await run_crowded(claims, preempt=False)
    assert claims.asked == 0


def test_a_job_of_a_due_share_is_not_starved_by_higher_classes_in_the_engine() -> None:
    holdings = Holdings(16)
    assert holdings.add(make_claimed("a", priority=2, by_share=True), 0.0).priority == 0
    request = holdings.add(make_claimed("b", priority=2, weight=3.0), 0.0)
    assert (request.priority, request.tenant, request.weight) == (2, "acme", 3.0)


# -- gathering


@dataclass
class Stepping(Idle):
    """An engine whose steps the test makes."""

    results: asyncio.Queue[StepResult] = field(default_factory=asyncio.Queue)
    acknowledged: int = 0

    async def next_result(self) -> StepResult:
        return await self.results.get()

    def ack(self, step: int) -> None:
        self.acknowledged = step

    def step(self, number: int) -> None:
        """Each of what was submitted gets a token."""
        delta = OutputDelta(output_index=0, first_token_index=number - 1, token_ids=(number,), text="a")
        self.results.put_nowait(StepResult(number, tuple(RequestOutput(id_, (delta,)) for id_ in self.submitted)))


@dataclass
class Storing(Claims):
    """A queue that keeps what is committed."""

    stored: list[list[NewEvent]] = field(default_factory=list)

    async def commit(self, events: Any) -> CommitResult:
        self.stored.append([*events])
        return CommitResult()


async def test_tokens_that_gather_are_committed_though_no_step_follows() -> None:
    claims, engine = Storing([make_claimed("a")]), Stepping(hangs=False)
    agent = make_agent(claims, engine, hang_s=10, max_events_per_s=1)
    running = asyncio.create_task(agent.run())

    async def commits(number: int) -> None:
        async def are_there() -> bool:
            return len(claims.stored) >= number

        await until(are_there, what=f"{number} commits")

    async def has_submitted() -> bool:
        return bool(engine.submitted)

    await until(has_submitted, what="work")
    for number in (1, 2):
        engine.step(number)
        await commits(number)
    assert [len(events) for events in claims.stored] == [1, 0]  # the lease is renewed, and a lost job would be told
    await commits(3)
    (event,) = claims.stored[2]
    assert isinstance(event.body, EventBody)
    assert [delta.token_ids for delta in event.body.deltas] == [(2,)]
    assert engine.acknowledged == 2
    agent.stop()
    await asyncio.wait_for(running, 10)


class OneStep(Idle):
    """Has taken one step."""

    def __init__(self, result: StepResult) -> None:
        super().__init__(hangs=False)
        self.results = [result]
        self.acknowledged: list[int] = []

    async def next_result(self) -> StepResult:
        return self.results.pop() if self.results else await super().next_result()

    def ack(self, step: int) -> None:
        self.acknowledged.append(step)


async def test_a_step_is_counted_while_its_commit_is_on_its_way() -> None:
    """Whoever reads its tokens waits for the commit, and nobody for the count."""
    order: list[str] = []

    class Storing(Claims):
        async def commit(self, events: list[Any]) -> CommitResult:
            order.append("sent")
            await asyncio.sleep(0.01)
            order.append("stored")
            return CommitResult()

    class Noting(WorkerMetrics):
        def stepped(self, result: StepResult) -> None:
            order.append("counted")
            super().stepped(result)

    registry = CollectorRegistry()
    engine = OneStep(StepResult(1, (), 0.5, num_tokens=3, num_sequences=1))
    agent = Agent(
        cast(Any, Storing(jobs=[])),
        cast(Any, engine),
        WorkerSettings(drain_s=0),
        WorkerInfo,
        Noting(registry, "test", 10),
        max_num_seqs=2,
        beat_interval_s=BEAT_S,
    )

    async def is_acknowledged() -> bool:
        return engine.acknowledged == [1]

    running = asyncio.create_task(agent.run())
    await until(is_acknowledged, what="an acknowledgement")
    agent.stop()
    await asyncio.wait_for(running, 10)
    assert order == ["sent", "counted", "stored"]
    assert registry.get_sample_value("torchrelay_step_duration_seconds_count", {"model_name": "test"}) == 1


@dataclass
class Asked(Claims):
    """Notes how it is asked for jobs; the first commit ends what is held, and tells how many wait."""

    waits: list[bool] = field(default_factory=list)
    num_queued: int = 0

    async def claim(self, max_jobs: int, free: int, total: int, *, wait: bool = False) -> list[ClaimedJob]:
        self.waits.append(wait)
        return await super().claim(max_jobs, free, total, wait=wait)

    async def commit(self, events: Any) -> CommitResult:
        return CommitResult(queued=(0, self.num_queued, 0))


@pytest.mark.parametrize("num_queued", [0, 1])
async def test_a_worker_through_with_its_jobs_waits_for_the_bell_unless_it_knows_of_more(num_queued: int) -> None:
    """A claim that finds nothing writes to the server's disk, just when the next caller comes."""
    claims = Asked([make_claimed("a")], num_queued=num_queued)
    engine = Stepping(hangs=False)
    agent = make_agent(claims, engine, hang_s=10, beat_interval_s=60)
    running = asyncio.create_task(agent.run())

    async def has_submitted() -> bool:
        return bool(engine.submitted)

    async def has_asked_again() -> bool:
        return len(claims.waits) > 1

    await until(has_submitted, what="work")
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    engine.results.put_nowait(StepResult(1, (RequestOutput(engine.submitted[0], (), usage=usage),)))
    await until(has_asked_again, what="a claim")
    assert claims.waits[:2] == [True, not num_queued]
    agent.stop()
    await asyncio.wait_for(running, 10)
