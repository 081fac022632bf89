"""The expected wait: the pace at which jobs are handed out while others wait, times the place in line."""

from __future__ import annotations

import pytest
import redis as redis_sync

from common import keys
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import JobState
from tests.builders_common import FlakyRedis, make_event, make_job
from tests.integration.common.conftest import SHARD
from tests.integration.common.test_job_claims import ROOM, end_lease, enqueue, worker

TURN_MS = 1000


async def turn(claims: JobClaims, superuser: redis_sync.Redis, number: int) -> None:
    """Some slots end after a while, which is set in the store instead of waited for, and as many jobs are claimed."""
    handed = superuser.hget(keys.meta(SHARD), "handed")
    if handed is not None:
        superuser.hset(keys.meta(SHARD), "handed", int(handed) - TURN_MS)
    jobs = await claims.claim(number, ROOM, ROOM)
    await claims.commit([make_event(job.generation_id, (1,), terminal=JobState.DONE) for job in jobs])


@pytest.mark.parametrize("number", [1, 3])
async def test_the_expected_wait_of_a_steady_queue_is_right_within_a_factor_of_two(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis, number: int
) -> None:
    await enqueue(queue, 40)
    for _ in range(4):
        await turn(claims, superuser, number)
    last = await queue.enqueue(SHARD, make_job())
    num_turns = 0
    while (await queue.get(last.generation_id, "acme")).state is JobState.QUEUED:
        await turn(claims, superuser, number)
        num_turns += 1
    waited_ms = num_turns * TURN_MS
    assert num_turns >= 28 // number
    assert last.expected_wait_ms is not None
    assert waited_ms / 2 <= last.expected_wait_ms <= 2 * waited_ms


async def test_the_pace_follows_a_change(queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis) -> None:
    """Gaps are set in the store instead of waited for."""
    await enqueue(queue, 100)
    await claims.claim(1, ROOM, ROOM)
    for gap_ms in [100] * 20 + [1000] * 20:
        handed = int(superuser.hget(keys.meta(SHARD), "handed"))
        superuser.hset(keys.meta(SHARD), "handed", handed - gap_ms)
        await claims.claim(1, ROOM, ROOM)
        if gap_ms == 100:
            early = float(superuser.hget(keys.meta(SHARD), "gap"))
    late = float(superuser.hget(keys.meta(SHARD), "gap"))
    assert 80 <= early <= 400
    assert 900 <= late <= 2000


async def test_it_is_unknown_until_it_was_measured_and_while_no_worker_lives(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    first = await queue.enqueue(SHARD, make_job())
    assert first.expected_wait_ms is None
    await enqueue(queue, 3)
    await claims.claim(1, ROOM, ROOM)
    assert (await queue.get(first.generation_id, "acme")).expected_wait_ms is None  # it does not wait any more
    await claims.claim(1, ROOM, ROOM)
    waiting = await queue.enqueue(SHARD, make_job())
    assert waiting.expected_wait_ms is not None
    record = await queue.get(waiting.generation_id, "acme")
    assert record.place == 3
    assert record.expected_wait_ms is not None
    end_lease(superuser, claims)
    assert (await queue.get(waiting.generation_id, "acme")).expected_wait_ms is None


async def test_idle_time_is_not_taken_for_a_slow_queue(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    claims = worker(worker_redis)
    await enqueue(queue, 2)
    await claims.claim(1, ROOM, ROOM)
    await claims.claim(1, ROOM, ROOM)  # the queue is empty now
    assert superuser.hget(keys.meta(SHARD), "handed") is None
    before = superuser.hget(keys.meta(SHARD), "gap")
    await enqueue(queue, 1)
    await claims.claim(1, ROOM, ROOM)
    assert superuser.hget(keys.meta(SHARD), "gap") == before


async def test_a_queue_that_empties_by_cancelling_measures_nothing(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    _, second = await enqueue(queue, 2)
    await claims.claim(1, ROOM, ROOM)
    assert superuser.hget(keys.meta(SHARD), "handed") is not None
    await queue.cancel(second, "acme")
    assert superuser.hget(keys.meta(SHARD), "handed") is None
