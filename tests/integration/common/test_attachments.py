"""Who has a stream, and what happens to it when nobody does: gateways, leases, graces."""

from __future__ import annotations

import pytest
import redis as redis_sync

from common import keys
from common.errors import (
    Superseded,
)
from common.job_claims import JobClaims
from common.job_queue import START_CURSOR, JobQueue
from common.jobs import ItemKind, JobState, Reason, Swept
from common.settings import QueueSettings
from tests.builders_common import FlakyRedis, make_event, make_job
from tests.integration.common.calls import other_queue, run_to
from tests.integration.common.conftest import FAST_RETRY, SHARD


async def test_heartbeat_trims_what_was_read_and_says_when_the_stream_was_lost(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    assert await queue.heartbeat({SHARD: START_CURSOR}) == {SHARD}  # new: nothing was attached before
    accepted = await queue.enqueue(SHARD, make_job())
    await run_to(claims, accepted.generation_id, 5)
    _, cursors = await queue.replies({SHARD: START_CURSOR}, 10)
    assert await queue.heartbeat(cursors) == set()
    stream = keys.reply_stream(SHARD, queue.gateway_id)
    assert superuser.xlen(stream) == 1
    assert 0 < superuser.pttl(stream) <= QueueSettings().reply_ttl_ms
    superuser.delete(stream)
    assert await queue.heartbeat(cursors) == {SHARD}


async def test_a_second_gateway_supersedes_the_first(
    queue: JobQueue, gateway_redis: FlakyRedis, claims: JobClaims
) -> None:
    accepted = await queue.enqueue(SHARD, make_job())
    await run_to(claims, accepted.generation_id, 1)
    second = other_queue(gateway_redis)
    await second.attach(accepted.generation_id, "acme", 1)
    await claims.commit([make_event(accepted.generation_id, (1,), first=1)])
    at_first, _ = await queue.replies({SHARD: START_CURSOR}, 10)
    at_second, _ = await second.replies({SHARD: START_CURSOR}, 10)
    assert [item.kind for item in at_first] == [ItemKind.STARTED, ItemKind.EVENT, ItemKind.SUPERSEDED]
    assert [(item.kind, item.sequence) for item in at_second] == [(ItemKind.EVENT, 2)]
    await queue.detach(accepted.generation_id)  # too late to matter
    assert (await second.get(accepted.generation_id, "acme")).gateway_id == second.gateway_id


async def test_detach_without_grace_cancels_at_once_and_counts_what_was_done(
    queue: JobQueue, claims: JobClaims
) -> None:
    accepted = await queue.enqueue(SHARD, make_job(prompt=(1,) * 5))
    await run_to(claims, accepted.generation_id, 3)
    assert await queue.detach(accepted.generation_id) is JobState.CANCELLED
    record = await queue.get(accepted.generation_id, "acme")
    assert (record.reason, record.usage.prompt_tokens, record.usage.completion_tokens) == (Reason.DISCONNECTED, 5, 3)
    result = await claims.commit([make_event(accepted.generation_id, (3,), first=3)])
    assert set(result.lost) == {accepted.generation_id}


async def test_only_the_call_that_had_the_stream_last_attaches_again(
    queue: JobQueue, gateway_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    """After the lease of a gateway ended: a call that was overtaken before must not take the stream back."""
    later = JobQueue(gateway_redis, keys.random_id(), QueueSettings(), retry=FAST_RETRY)
    accepted = await queue.enqueue(SHARD, make_job(disconnect_grace_ms=5000), attach_id="first")
    name = accepted.generation_id
    await later.attach(name, "acme", attach_id="second")
    superuser.zadd(keys.gateway_leases(SHARD), {later.gateway_id: 0})
    assert (await queue.sweep(SHARD)).detached == 1
    with pytest.raises(Superseded):
        await queue.attach(name, "acme", attach_id="first", again=True)
    assert (await queue.get(name, "acme")).gateway_id == ""
    found = await later.attach(name, "acme", attach_id="second", again=True)
    assert found.record.gateway_id == later.gateway_id
    await queue.cancel(name, "acme")
    assert (await queue.attach(name, "acme", attach_id="first", again=True)).record.state is JobState.CANCELLED


async def test_a_detach_that_comes_late_leaves_the_stream_to_the_call_after_it(
    queue: JobQueue, claims: JobClaims
) -> None:
    """The same gateway, the same generation: only the call's own id tells the two apart."""
    accepted = await queue.enqueue(SHARD, make_job(), attach_id="first")
    await run_to(claims, accepted.generation_id, 1)
    await queue.attach(accepted.generation_id, "acme", 1, attach_id="second")
    assert await queue.detach(accepted.generation_id, attach_id="first") is JobState.RUNNING
    assert (await queue.get(accepted.generation_id, "acme")).gateway_id == queue.gateway_id
    assert await queue.detach(accepted.generation_id, attach_id="second") is JobState.CANCELLED


async def test_a_client_that_returns_within_its_grace_finds_its_stream(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    accepted = await queue.enqueue(SHARD, make_job(disconnect_grace_ms=60_000))
    await run_to(claims, accepted.generation_id, 1)
    assert await queue.detach(accepted.generation_id) is JobState.RUNNING
    await claims.commit([make_event(accepted.generation_id, (1,), first=1)])  # goes on meanwhile
    assert (await queue.sweep(SHARD)) == Swept()
    tail = await queue.attach(accepted.generation_id, "acme", 1)
    assert [event.sequence for event in tail.events] == [2]
    assert superuser.zcard(keys.detached(SHARD)) == 0


async def test_the_sweep_cancels_what_nobody_came_back_for(queue: JobQueue, superuser: redis_sync.Redis) -> None:
    accepted = await queue.enqueue(SHARD, make_job(disconnect_grace_ms=60_000))
    await queue.detach(accepted.generation_id)
    superuser.zadd(keys.detached(SHARD), {accepted.generation_id: 1})
    assert (await queue.sweep(SHARD)).cancelled == 1
    record = await queue.get(accepted.generation_id, "acme")
    assert (record.state, record.reason) == (JobState.CANCELLED, Reason.DISCONNECTED)


def server_ms(superuser: redis_sync.Redis) -> int:
    seconds, microseconds = superuser.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


def end_gateway_lease(superuser: redis_sync.Redis, queue: JobQueue) -> None:
    """Let a gateway's lease be over, and the grace after the server's start too."""
    superuser.zadd(keys.gateway_leases(SHARD), {queue.gateway_id: 1}, xx=True)
    superuser.hset(keys.meta(SHARD), mapping={"sweep_grace": 0, "swept": server_ms(superuser)})


async def test_jobs_of_a_dead_gateway_get_their_own_grace(
    queue: JobQueue, gateway_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    hasty = await queue.enqueue(SHARD, make_job(disconnect_grace_ms=0))
    patient = await queue.enqueue(SHARD, make_job(disconnect_grace_ms=60_000))
    moved = await queue.enqueue(SHARD, make_job(disconnect_grace_ms=0))
    other = other_queue(gateway_redis)
    await other.attach(moved.generation_id, "acme")
    end_gateway_lease(superuser, queue)
    assert (await other.sweep(SHARD)).detached == 2
    states = [(await other.get(job.generation_id, "acme")).state for job in (hasty, patient, moved)]
    assert states == [JobState.CANCELLED, JobState.QUEUED, JobState.QUEUED]
    assert not superuser.exists(keys.reply_stream(SHARD, queue.gateway_id))


async def test_a_server_that_was_down_takes_no_gateway_for_dead(
    queue: JobQueue, gateway_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    accepted = await queue.enqueue(SHARD, make_job(disconnect_grace_ms=0))
    end_gateway_lease(superuser, queue)
    superuser.hset(keys.meta(SHARD), "swept", server_ms(superuser) - 60_000)
    assert await other_queue(gateway_redis).sweep(SHARD) == Swept()
    assert (await queue.get(accepted.generation_id, "acme")).state is JobState.QUEUED
    assert int(superuser.hget(keys.meta(SHARD), "sweep_grace") or 0) > server_ms(superuser) + 5000
    superuser.hset(keys.meta(SHARD), "sweep_grace", 0)
    assert (await other_queue(gateway_redis).sweep(SHARD)).detached == 1


async def test_a_clock_that_went_back_leaves_no_lease_in_a_far_future(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    """The holders may be dead: they would be missed only when it is that late again."""
    await queue.enqueue(SHARD, make_job())
    await claims.claim(1, 1000, 1000)
    hour_ahead = server_ms(superuser) + 3_600_000
    superuser.zadd(keys.worker_leases(SHARD), {claims.worker_id: hour_ahead})
    superuser.zadd(keys.gateway_leases(SHARD), {queue.gateway_id: hour_ahead})
    marks = {"reaped": hour_ahead, "grace": hour_ahead, "swept": hour_ahead, "sweep_grace": hour_ahead}
    superuser.hset(keys.meta(SHARD), mapping=marks)
    await queue.reap(SHARD)
    await queue.sweep(SHARD)
    lease_ms = QueueSettings().worker_lease_ms
    soon = server_ms(superuser) + lease_ms
    for leases in (keys.worker_leases(SHARD), keys.gateway_leases(SHARD)):
        ((_, ends),) = superuser.zrange(leases, 0, -1, withscores=True)
        assert ends <= soon
    assert max(int(superuser.hget(keys.meta(SHARD), name) or 0) for name in marks) <= soon


async def test_a_gateway_that_leaves_gives_its_jobs_to_their_grace_at_once(
    queue: JobQueue, gateway_redis: FlakyRedis
) -> None:
    accepted = await queue.enqueue(SHARD, make_job(disconnect_grace_ms=60_000))
    await queue.leave([SHARD])
    other = other_queue(gateway_redis)
    assert (await other.sweep(SHARD)).detached == 1
    assert (await other.get(accepted.generation_id, "acme")).gateway_id == ""
