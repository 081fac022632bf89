"""What operators and metrics see of a queue: how much waits, whose it is, and for how long."""

from __future__ import annotations

import pytest
import redis as redis_sync

from common import keys
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import JobState, QueueShape, Reason, WaitingClass, WorkerInfo
from common.settings import QueueSettings
from tests.builders_common import FlakyRedis, make_event, make_job
from tests.integration.common.calls import ROOM, other_queue
from tests.integration.common.conftest import SHARD
from tests.integration.common.test_job_claims import end_lease, enqueue, worker

NOTHING_WAITS = tuple(WaitingClass(priority, 0, None, None) for priority in range(keys.PRIORITY_CLASSES))
SLACK_MS = 60_000  # what a test may take, far below the ages that it makes


def age(superuser: redis_sync.Redis, generation_id: str, hours: int) -> None:
    """Accepted so many hours ago."""
    now_ms = int(superuser.time()[0]) * 1000
    superuser.hset(keys.job(SHARD, generation_id), "cr", now_ms - hours * 3_600_000)


def hours(shape: QueueShape) -> list[tuple[int, str, int, int]]:
    """Priority, tenant, waiting jobs and age of the oldest in hours, of each part."""
    return [
        (part.priority, part.tenant, part.num_waiting, (part.oldest_ms + SLACK_MS) // 3_600_000)
        for part in shape.tenants
    ]


def oldest_hours(shape: QueueShape) -> list[int | None]:
    ages = [one.oldest_ms for one in shape.classes]
    return [None if ms is None else (ms + SLACK_MS) // 3_600_000 for ms in ages]


async def test_a_shard_that_nobody_has_used_is_empty_and_stays_so(queue: JobQueue, superuser: redis_sync.Redis) -> None:
    shape = await queue.shape(SHARD)
    assert (shape.classes, shape.tenants, shape.has_more_tenants) == (NOTHING_WAITS, (), False)
    assert (shape.num_waiting, shape.num_running, shape.num_dead_letters) == (0, 0, 0)
    assert shape.expected_wait_ms is None
    assert abs(shape.time_ms - int(superuser.time()[0]) * 1000) < SLACK_MS
    assert superuser.keys() == []


async def test_it_counts_what_waits_by_class_and_tenant_and_what_runs_and_what_failed(
    queue: JobQueue, claims: JobClaims
) -> None:
    for tenant, priority, count in (("acme", 0, 3), ("acme", 1, 2), ("other:x", 1, 4), ("other:x", 2, 1)):
        for _ in range(count):
            await queue.enqueue(SHARD, make_job(tenant, priority=priority))
    failed, *held = await claims.claim(3, ROOM, ROOM)
    end = make_event(failed.generation_id, (1,), terminal=JobState.FAILED, reason=Reason.WORKER_FAILED)
    await claims.commit([end])
    shape = await queue.shape(SHARD)
    assert [(one.priority, one.num_waiting) for one in shape.classes] == [(0, 0), (1, 6), (2, 1)]
    assert {(priority, tenant, count) for priority, tenant, count, _ in hours(shape)} == {
        (1, "acme", 2), (1, "other:x", 4), (2, "other:x", 1),
    }  # fmt: skip
    assert (shape.num_waiting, shape.num_running, shape.num_dead_letters) == (7, len(held), 1)
    assert oldest_hours(shape) == [None, 0, 0]


async def test_the_oldest_job_is_found_behind_a_younger_one_that_was_given_back(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    """A job passes an older one that does not fit, and is put before it when its worker is lost."""
    older = (await queue.enqueue(SHARD, make_job(kv_tokens=500))).generation_id
    young = (await queue.enqueue(SHARD, make_job(kv_tokens=10))).generation_id
    (passed,) = await (victim := worker(worker_redis)).claim(10, 100, 100)
    assert passed.generation_id == young
    await victim.release([young])
    age(superuser, young, 1)
    age(superuser, older, 5)
    assert hours(await queue.shape(SHARD)) == [(1, "acme", 2, 5)]
    age(superuser, young, 7)  # nor is it forgotten when it is the older one
    shape = await queue.shape(SHARD)
    assert (hours(shape), oldest_hours(shape)) == ([(1, "acme", 2, 7)], [None, 7, None])


async def test_jobs_that_may_only_run_alone_count_with_the_others(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    (suspect,) = await enqueue(queue)
    for _ in range(2):
        await (victim := worker(worker_redis)).claim(1, ROOM, ROOM)
        end_lease(superuser, victim)
        await queue.reap(SHARD)
    assert superuser.zcard(f"{{{SHARD}}}:alone:1") == 1
    other = (await queue.enqueue(SHARD, make_job("other"))).generation_id
    age(superuser, suspect, 3)
    age(superuser, other, 2)
    shape = await queue.shape(SHARD)
    assert sorted(hours(shape)) == [(1, "acme", 1, 3), (1, "other", 1, 2)]
    assert (shape.classes[1].num_waiting, oldest_hours(shape)) == (2, [None, 3, None])
    await enqueue(queue)  # the tenant has jobs in both indexes now
    assert sorted(hours(await queue.shape(SHARD))) == [(1, "acme", 2, 3), (1, "other", 1, 2)]


async def test_of_more_tenants_than_are_looked_at_the_first_and_the_last_in_turn_are_taken(
    gateway_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    queue = other_queue(gateway_redis)
    for index in range(9):
        await queue.enqueue(SHARD, make_job(f"t{index}"))
        superuser.zadd(f"{{{SHARD}}}:act:1", {f"t{index}": index})
    shape = await queue.shape(SHARD, max_tenants=5)
    assert [part.tenant for part in shape.tenants] == ["t0", "t1", "t2", "t8", "t7"]
    assert shape.has_more_tenants
    assert shape.classes[1].num_waiting == 9
    assert not (await queue.shape(SHARD, max_tenants=9)).has_more_tenants
    (only,) = (await queue.shape(SHARD, max_tenants=1)).tenants
    assert only.tenant == "t0"
    await queue.enqueue(SHARD, make_job("t0", priority=0))
    shape = await queue.shape(SHARD, max_tenants=4)  # two for each class that has any
    assert [(part.priority, part.tenant) for part in shape.tenants] == [(0, "t0"), (1, "t0"), (1, "t8")]


async def test_the_expected_wait_is_that_of_the_last_in_line_as_it_was_told_it(
    queue: JobQueue, claims: JobClaims
) -> None:
    await enqueue(queue, 12)
    assert (await queue.shape(SHARD)).expected_wait_ms is None  # nothing was handed out yet
    await claims.heartbeat(WorkerInfo())
    for _ in range(3):
        await claims.claim(1, ROOM, ROOM)
    last = await queue.enqueue(SHARD, make_job())
    shape = await queue.shape(SHARD)
    assert last.expected_wait_ms is not None
    assert shape.classes[1].expected_wait_ms == shape.expected_wait_ms == last.expected_wait_ms
    lower = await queue.enqueue(SHARD, make_job(priority=2))
    shape = await queue.shape(SHARD)
    assert shape.classes[2].expected_wait_ms == shape.expected_wait_ms == lower.expected_wait_ms
    assert shape.classes[0].expected_wait_ms is None


async def test_a_job_whose_hash_was_deleted_by_hand_has_no_age(queue: JobQueue, superuser: redis_sync.Redis) -> None:
    (gone,) = await enqueue(queue)
    superuser.delete(keys.job(SHARD, gone))
    shape = await queue.shape(SHARD)
    assert (shape.classes[1], shape.tenants) == (WaitingClass(1, 1, None, None), ())


async def test_dead_letters_that_have_expired_are_not_counted(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    (failed,) = await enqueue(queue)
    await claims.claim(1, ROOM, ROOM)
    await claims.commit([make_event(failed, (), terminal=JobState.FAILED, reason=Reason.WORKER_FAILED)])
    assert (await queue.shape(SHARD)).num_dead_letters == 1
    superuser.zincrby(keys.dead_letters(SHARD), -QueueSettings().dead_letter_retention_ms - SLACK_MS, failed)
    assert (await queue.shape(SHARD)).num_dead_letters == 0


@pytest.mark.parametrize(("setting", "usual"), [("maxmemory", "0"), ("min-replicas-to-write", "0")])
async def test_it_is_told_where_memory_is_short_and_where_nothing_may_be_written(
    queue: JobQueue, superuser: redis_sync.Redis, setting: str, usual: str
) -> None:
    await enqueue(queue)
    superuser.config_set(setting, "1")
    try:
        assert (await queue.shape(SHARD)).num_waiting == 1
    finally:
        superuser.config_set(setting, usual)
