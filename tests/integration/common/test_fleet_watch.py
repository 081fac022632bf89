"""Watching the fleet and draining workers, over a real server: what snapshots hold and cost, and who is asked to go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import pytest
import redis as redis_sync
from google.protobuf.duration_pb2 import Duration

from common import keys
from common.dead_letters import DeadLetters
from common.errors import BackendUnavailable, InvalidRequest, ModelNotFound, Unavailable, WorkerNotFound
from common.grants import Grants
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import LiveWorker, WorkerInfo
from common.registry import ModelCard, ModelEntry
from common.settings import QueueSettings
from gateway.admin.fleet import FleetServicer
from gateway.admin.fleet_messages import worker_message
from gateway.admin.fleet_snapshots import FleetSnapshots
from gateway.identity.caller import CALLER, Caller
from tests.builders_common import FlakyRedis, make_event, make_job
from tests.integration.common.calls import ROOM
from tests.integration.common.conftest import FAST_RETRY, SHARD
from tests.integration.common.test_dead_letters import fail
from tests.integration.common.test_job_claims import end_lease, enqueue, worker
from torchrelay.admin.v1beta1 import fleet_pb2 as pb
from torchrelay.v1 import generation_pb2, model_pb2

CONTEXT: Any = None  # of the call; the methods do not look at it
OLD_SHARD = keys.shard_name("tiny", "r0")
OTHER_SHARD = keys.shard_name("other", "r1")


def card(name: str, revision: str) -> ModelCard:
    shard = keys.shard_name(name, revision)
    return ModelCard(
        name=name, revision=revision, shard=shard, vocab_size=10, context_tokens=100, max_output_tokens=100
    )


class ThreeRevisions:
    """A catalog of two revisions of a model, the older of which is not used by new requests, and of another model."""

    def all_entries(self) -> list[ModelEntry]:
        return [ModelEntry(card(*key), 0) for key in (("other", "r1"), ("tiny", "r0"), ("tiny", "r1"))]

    def entries(self) -> list[ModelEntry]:
        return [entry for entry in self.all_entries() if entry.card.revision == "r1"]


@pytest.fixture
def fleet(queue: JobQueue, gateway_redis: FlakyRedis) -> FleetServicer:
    letters = DeadLetters(gateway_redis, QueueSettings(), retry=FAST_RETRY)
    return FleetServicer(cast(Any, ThreeRevisions()), queue, letters, num_streams=lambda: 7)


@pytest.fixture(autouse=True)
def caller() -> Iterator[None]:
    token = CALLER.set(Caller("ops", "key-1", Grants()))
    yield
    CALLER.reset(token)


async def first(fleet: FleetServicer, **request: Any) -> pb.FleetSnapshot:
    stream = cast(AsyncIterator[pb.WatchFleetResponse], fleet.WatchFleet(pb.WatchFleetRequest(**request), CONTEXT))
    async for response in stream:
        return response.snapshot
    raise AssertionError("no snapshot")


async def test_a_snapshot_tells_of_workers_queues_failures_and_what_runs(
    fleet: FleetServicer, queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    await fail(queue, claims)
    long, short = await enqueue(queue, 2)
    await claims.claim(1, ROOM, ROOM)
    await claims.claim(1, ROOM, ROOM)
    await claims.commit([make_event(long, (1, 2, 3))])
    superuser.hincrby(keys.job(SHARD, long), "sc", -1000)
    await queue.enqueue(SHARD, make_job("big", priority=2))
    stats = {"ttft_p50_ms": 12.5, "ttft_p95_ms": 80.0, "busy_ratio": 0.0, "memory_used_bytes": 5e9, "num_blocks": 40.0}
    await claims.heartbeat(WorkerInfo(model="tiny", host="h:1", num_running=2, stats=stats))
    found = await first(fleet, include_generations=True)

    (one,) = found.workers
    assert (one.worker_id, one.model, one.num_jobs, one.num_running) == (claims.worker_id, "tiny", 2, 2)
    assert (one.time_to_first_token_p50.ToMicroseconds(), one.time_to_first_token_p95.ToMilliseconds()) == (12500, 80)
    assert one.HasField("busy_ratio")
    assert (one.memory_used_bytes, one.memory_total_bytes, one.num_blocks) == (5_000_000_000, 0, 40)
    assert abs(one.report_time.ToMilliseconds() - found.time.ToMilliseconds()) < 60_000
    assert (found.gateway.gateway_id, found.gateway.num_streams) == (queue.gateway_id, 7)

    other, tiny = found.models  # the older revision has nothing to tell
    assert (other.model, other.state, other.num_workers) == ("other", model_pb2.MODEL_STATE_COLD, 0)
    assert (tiny.model, tiny.model_revision, tiny.state) == ("tiny", "r1", model_pb2.MODEL_STATE_READY)
    assert (tiny.num_workers, tiny.num_running, tiny.num_dead_letters) == (1, 2, 1)
    assert [one.num_waiting for one in tiny.classes] == [0, 0, 1]
    assert [one.HasField("oldest_wait") for one in tiny.classes] == [False, False, True]
    (waiting,) = tiny.tenants
    assert (waiting.priority, waiting.tenant, waiting.num_waiting) == (generation_pb2.PRIORITY_LOW, "big", 1)

    assert [info.generation_id for info in found.generations] == [long, short]
    assert found.generations[0].usage.completion_tokens == 3
    assert {info.worker_id for info in found.generations} == {claims.worker_id}
    assert found.num_running == 2


async def test_a_watcher_gets_what_it_asked_for(fleet: FleetServicer, queue: JobQueue, claims: JobClaims) -> None:
    ids = await enqueue(queue, 3)
    await claims.claim(3, ROOM, ROOM)
    await queue.enqueue(OTHER_SHARD, make_job())
    await queue.enqueue(OLD_SHARD, make_job())
    assert not (await first(fleet)).generations
    page = await first(fleet, include_generations=True, page_size=2)
    assert (len(page.generations), page.num_running) == (2, len(ids))
    assert [(one.model, one.model_revision) for one in page.models] == [("other", "r1"), ("tiny", "r0"), ("tiny", "r1")]
    other = await first(fleet, model="other", include_generations=True)
    assert ([one.model for one in other.models], other.workers, other.num_running) == (["other"], [], 0)
    unknown = await first(fleet, model="unknown")
    assert (len(unknown.models), unknown.HasField("gateway")) == (0, True)


async def test_watchers_share_what_is_read(queue: JobQueue, superuser: redis_sync.Redis) -> None:
    now = 100.0
    snapshots = FleetSnapshots(cast(Any, ThreeRevisions()), queue, lambda: 0, monotonic=lambda: now)

    def num_calls() -> int:
        stats: Any = superuser.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "eval"))

    await snapshots.get("", 0)
    superuser.config_resetstat()
    await asyncio.gather(*(snapshots.get(model, 0) for model in ("", "tiny", "other") * 10))
    assert num_calls() == 0
    now += 0.45
    await asyncio.gather(*(snapshots.get(model, 0) for model in ("", "tiny", "other") * 10))
    assert num_calls() == 2 * 3  # workers and queue of each revision, once


async def test_watchers_share_a_failure_and_the_next_one_begins_anew(
    queue: JobQueue, gateway_redis: FlakyRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each would wait for the time-outs of all before it, while the server is away."""
    snapshots = FleetSnapshots(cast(Any, ThreeRevisions()), queue, lambda: 0)
    attempts = 0

    async def shape(shard: str) -> Any:
        nonlocal attempts
        attempts += 1
        await asyncio.sleep(0.01)
        raise BackendUnavailable("the queue's server does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(queue, "shape", shape)
        calls = [asyncio.create_task(snapshots.get("", 0)) for _ in range(20)]
        await asyncio.sleep(0)
        calls[0].cancel()  # it goes away, and the others get their answer all the same
        found = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(one) for one in found] == [asyncio.CancelledError] + [BackendUnavailable] * 19
    assert attempts == 3, "one for each revision"
    assert len((await snapshots.get("", 0)).models) == 2


async def test_a_stream_goes_on_until_its_gateway_stops(fleet: FleetServicer) -> None:
    request = pb.WatchFleetRequest(interval=Duration(nanos=500_000_000))
    stream = cast(AsyncIterator[pb.WatchFleetResponse], fleet.WatchFleet(request, CONTEXT))
    times = [(await anext(stream)).snapshot.time.ToMilliseconds() for _ in range(2)]
    assert times[0] < times[1]
    waiting = asyncio.ensure_future(anext(stream))
    fleet.stop()
    with pytest.raises(Unavailable) as caught:
        await asyncio.wait_for(waiting, 5)
    assert caught.value.reason == "GATEWAY_STOPPING"


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        (Duration(), "at least 500 ms"),
        (Duration(nanos=499_000_000), "at least 500 ms"),
        (Duration(seconds=61), "at most 60 s"),
        (Duration(seconds=-1), "valid, non-negative"),
    ],
)
async def test_an_interval_out_of_range_is_refused(fleet: FleetServicer, interval: Duration, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        await first(fleet, interval=interval)
    assert caught.value.metadata["field"] == "interval"


async def test_what_an_older_worker_does_not_tell_is_not_set() -> None:
    entry = ModelEntry(card("tiny", "r1"), 1)
    message = worker_message(entry, LiveWorker("w", 100, 0, WorkerInfo(num_running=1)))
    assert message.num_running == 1
    for name in ("report_time", "time_to_first_token_p50", "busy_ratio"):
        assert not message.HasField(cast(Any, name))


# -- draining


async def test_a_worker_learns_with_its_next_heartbeat_that_it_is_to_drain_and_who_asked(
    fleet: FleetServicer, claims: JobClaims, worker_redis: FlakyRedis
) -> None:
    other = worker(worker_redis)
    for one in (claims, other):
        assert (await one.heartbeat(WorkerInfo())).drain_requested_by == ""
    response = await fleet.DrainWorker(pb.DrainWorkerRequest(worker_id=claims.worker_id), CONTEXT)
    assert [one.worker_id for one in response.workers] == [claims.worker_id]
    CALLER.set(Caller("ops", "key-2", Grants()))
    again = await fleet.DrainWorker(pb.DrainWorkerRequest(worker_id=claims.worker_id), CONTEXT)
    assert [one.drain_requested_by for one in again.workers] == ["key-1"]
    for _ in range(2):
        assert (await claims.heartbeat(WorkerInfo())).drain_requested_by == "key-1"
    assert (await other.heartbeat(WorkerInfo())).drain_requested_by == ""


async def test_all_workers_of_a_model_are_asked_of_every_revision(
    fleet: FleetServicer, claims: JobClaims, worker_redis: FlakyRedis
) -> None:
    old = JobClaims(worker_redis, OLD_SHARD, keys.random_id(), QueueSettings(), retry=FAST_RETRY)
    foreign = JobClaims(worker_redis, OTHER_SHARD, keys.random_id(), QueueSettings(), retry=FAST_RETRY)
    for one in (claims, old, foreign):
        await one.heartbeat(WorkerInfo())
    CALLER.set(Caller("", "", Grants(), method="local"))
    response = await fleet.DrainWorker(pb.DrainWorkerRequest(model="tiny"), CONTEXT)
    assert {one.worker_id for one in response.workers} == {claims.worker_id, old.worker_id}
    assert {one.drain_requested_by for one in response.workers} == {"local"}
    assert (await foreign.heartbeat(WorkerInfo())).drain_requested_by == ""
    await claims.leave()
    await old.leave()
    assert not (await fleet.DrainWorker(pb.DrainWorkerRequest(model="tiny"), CONTEXT)).workers


async def test_a_worker_that_left_or_was_started_again_is_not_drained(
    fleet: FleetServicer, claims: JobClaims, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    await claims.heartbeat(WorkerInfo())
    await fleet.DrainWorker(pb.DrainWorkerRequest(worker_id=claims.worker_id), CONTEXT)
    await claims.leave()
    successor = worker(worker_redis)
    assert (await successor.heartbeat(WorkerInfo())).drain_requested_by == ""
    for worker_id in (claims.worker_id, keys.random_id(), "no id at all"):
        with pytest.raises(WorkerNotFound, match="another id"):
            await fleet.DrainWorker(pb.DrainWorkerRequest(worker_id=worker_id), CONTEXT)
    assert not list(superuser.scan_iter("*:drain"))


async def test_a_worker_that_was_silent_for_long_still_learns_of_it(
    fleet: FleetServicer, queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    """Its lease ended and its jobs went elsewhere, while it could not reach the server."""
    await claims.heartbeat(WorkerInfo())
    await fleet.DrainWorker(pb.DrainWorkerRequest(worker_id=claims.worker_id), CONTEXT)
    end_lease(superuser, claims)
    await queue.reap(SHARD)
    assert await queue.workers(SHARD) == []
    assert (await claims.heartbeat(WorkerInfo())).drain_requested_by == "key-1"


@pytest.mark.parametrize(
    ("choice", "reason"),
    [({}, "FIELD_REQUIRED"), ({"worker_id": "w", "model": "tiny"}, "FIELD_CONFLICT")],
)
async def test_a_drain_names_a_worker_or_a_model(fleet: FleetServicer, choice: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await fleet.DrainWorker(pb.DrainWorkerRequest(**choice), CONTEXT)
    assert (caught.value.reason, caught.value.metadata["field"]) == (reason, "worker_id")


async def test_a_model_that_does_not_exist_is_not_drained(fleet: FleetServicer) -> None:
    with pytest.raises(ModelNotFound):
        await fleet.DrainWorker(pb.DrainWorkerRequest(model="unknown"), CONTEXT)
