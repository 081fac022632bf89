"""A job that ends its workers, and who was beside it, run alone: it ends as a dead letter, they finish."""

from __future__ import annotations

import pytest
import redis as redis_sync

from common import keys
from common.dead_letters import DeadLetters
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import ClaimedJob, JobState, Reason, WorkerInfo
from common.scripts import Script, ScriptRunner
from common.settings import QueueSettings
from tests.builders_common import FlakyRedis, make_event, mutate
from tests.integration.common import invariants
from tests.integration.common.conftest import FAST_RETRY, SHARD
from tests.integration.common.test_job_claims import ROOM, end_lease, enqueue, worker


async def die(queue: JobQueue, superuser: redis_sync.Redis, *victims: JobClaims) -> None:
    """The workers end without another word."""
    for victim in victims:
        end_lease(superuser, victim)
    await queue.reap(SHARD)


async def make_suspects(queue: JobQueue, redis: FlakyRedis, superuser: redis_sync.Redis, ids: list[str]) -> None:
    """Two workers in a row end with all that waits, before any of it makes progress."""
    for _ in range(2):
        victim = worker(redis)
        assert {job.generation_id for job in await victim.claim(100, 10**6, 10**6)} == set(ids)
        await die(queue, superuser, victim)


def names(jobs: list[ClaimedJob]) -> list[str]:
    return [job.generation_id for job in jobs]


async def test_a_poisonous_job_becomes_a_dead_letter_and_its_neighbours_live(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    poison, neighbour = await enqueue(queue, 2)
    for attempt in range(2):
        victim = worker(worker_redis)
        assert names(await victim.claim(2, ROOM, ROOM)) == [poison, neighbour]
        await victim.commit([make_event(neighbour, (attempt,), first=attempt)])
        await die(queue, superuser, victim)
    victim = worker(worker_redis)
    (alone,) = await victim.claim(2, ROOM, ROOM)
    assert (alone.generation_id, alone.attempts) == (poison, 2)
    end_lease(superuser, victim)
    swept = await queue.reap(SHARD)
    assert (swept.requeued, swept.dead_lettered) == (0, 1)
    record = await queue.get(poison, "acme")
    assert (record.state, record.reason, record.attempts) == (JobState.FAILED, Reason.ATTEMPTS_EXHAUSTED, 3)
    (job,) = await worker(worker_redis).claim(2, ROOM, ROOM)
    assert (job.generation_id, job.attempts, job.sequence) == (neighbour, 0, 2)


@pytest.mark.parametrize("at", [0, 2, 4])
async def test_those_who_died_beside_it_are_isolated_in_turn_and_finish(
    queue: JobQueue, worker_redis: FlakyRedis, gateway_redis: FlakyRedis, superuser: redis_sync.Redis, at: int
) -> None:
    ids = await enqueue(queue, 5)
    poison = ids[at]
    await make_suspects(queue, worker_redis, superuser, ids)
    current = worker(worker_redis)
    order = []
    for _ in range(len(ids)):
        (job,) = await current.claim(10, ROOM, ROOM)
        order.append(job.generation_id)
        assert await current.claim(10, ROOM, ROOM) == []  # nothing beside it
        if job.generation_id == poison:
            await die(queue, superuser, current)
            current = worker(worker_redis)
        else:
            await current.commit([make_event(job.generation_id, (1,), terminal=JobState.DONE)])
    assert order == ids
    states = {name: (await queue.get(name, "acme")).state for name in ids}
    assert states == {name: JobState.FAILED if name == poison else JobState.DONE for name in ids}
    letters, _ = await DeadLetters(gateway_redis, QueueSettings(), retry=FAST_RETRY).newest([SHARD], 10)
    assert [record.generation_id for record in letters] == [poison]
    assert await queue.num_queued(SHARD) == 0
    assert not superuser.exists(*(f"{{{SHARD}}}:alone:{c}" for c in range(3)))


async def test_a_suspect_that_makes_progress_may_have_company_again(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    suspect, other_suspect = await enqueue(queue, 2)
    await make_suspects(queue, worker_redis, superuser, [suspect, other_suspect])
    innocents = await enqueue(queue, 2)
    first, second = worker(worker_redis), worker(worker_redis)
    assert names(await first.claim(10, ROOM, ROOM)) == [suspect]
    assert names(await second.claim(10, ROOM, ROOM)) == innocents  # the other suspect waits for its turn
    await first.commit([make_event(suspect, (1,))])
    (company,) = await enqueue(queue)
    assert names(await first.claim(10, ROOM, ROOM)) == [company]  # it rests from suspects for a lease
    (late,) = await enqueue(queue)
    superuser.hset(keys.meta(SHARD), "rest", 1)
    assert await first.claim(10, ROOM, ROOM) == []  # is reserved now for the other suspect, and must get empty
    await first.commit([make_event(suspect, (2,), first=1, terminal=JobState.DONE)])
    await first.commit([make_event(company, (1,), terminal=JobState.DONE)])
    assert names(await first.claim(10, ROOM, ROOM)) == [other_suspect]
    assert names(await second.claim(10, ROOM, ROOM)) == [late]
    await first.commit([make_event(other_suspect, (1,))])
    (newcomer,) = await enqueue(queue)
    assert names(await first.claim(10, ROOM, ROOM)) == [newcomer]


@pytest.mark.parametrize("rest_ms", [5_000, 3_600_000], ids=["within a lease", "from before the clock went back"])
async def test_a_rest_from_suspects_is_a_lease_at_most(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis, rest_ms: int
) -> None:
    (suspect,) = await enqueue(queue)
    busy = worker(worker_redis)
    await make_suspects(queue, worker_redis, superuser, [suspect])
    (held,) = await enqueue(queue)
    superuser.hset(keys.meta(SHARD), "rest", int(superuser.time()[0]) * 1000 + 5_000)
    superuser.zrem(f"{{{SHARD}}}:alone:1", suspect)  # out of sight while the worker takes other work
    assert names(await busy.claim(10, ROOM, ROOM)) == [held]
    superuser.zadd(f"{{{SHARD}}}:alone:1", {suspect: 1})
    (more,) = await enqueue(queue)
    superuser.hset(keys.meta(SHARD), "rest", int(superuser.time()[0]) * 1000 + rest_ms)
    assert names(await busy.claim(10, ROOM, ROOM)) == ([more] if rest_ms < 10_000 else [])


async def test_a_suspect_in_the_queue_reserves_one_worker_and_stalls_no_other(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    (suspect,) = await enqueue(queue)
    busy, others = worker(worker_redis), [worker(worker_redis) for _ in range(3)]
    await make_suspects(queue, worker_redis, superuser, [suspect])
    hold = await enqueue(queue, 4, priority=0)
    superuser.delete(f"{{{SHARD}}}:alone:1")  # out of the way, while all get something to do
    for claims in (busy, *others):
        assert len(await claims.claim(1, ROOM, ROOM)) == 1
    superuser.zadd(f"{{{SHARD}}}:alone:1", {suspect: 1})

    assert await busy.claim(10, ROOM, ROOM) == []  # the first that meets it
    waiting = await enqueue(queue, 6)
    for claims in others:
        assert len(await claims.claim(2, ROOM, ROOM)) == 2  # the others pass over it
    assert await busy.claim(10, ROOM, ROOM) == []
    more = await enqueue(queue, 3)
    await busy.commit([make_event(hold[0], (1,), terminal=JobState.DONE)])
    assert names(await busy.claim(10, ROOM, ROOM)) == [suspect]
    assert names(await others[0].claim(10, ROOM, ROOM)) == more
    assert all([(await queue.get(name, "acme")).state is JobState.RUNNING for name in waiting])


async def test_a_suspect_does_not_starve_under_constant_load(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    """Of the lowest class, with a flood of a higher one from a tenant that is always served first."""
    (suspect,) = await enqueue(queue, priority=2)
    await make_suspects(queue, worker_redis, superuser, [suspect])
    claims = worker(worker_redis)
    superuser.hset(keys.job(SHARD, suspect), "dl", 10**15)
    running = await enqueue(queue, 3, tenant="flood", priority=0)
    superuser.delete(f"{{{SHARD}}}:alone:2")
    assert names(await claims.claim(10, ROOM, ROOM)) == running
    superuser.zadd(f"{{{SHARD}}}:alone:2", {suspect: 1})
    taken: list[str] = []
    for step in range(8):
        await enqueue(queue, 5, tenant="flood", priority=0)
        taken += names(await claims.claim(10, ROOM, ROOM))
        if taken:
            break
        ends = [make_event(running[step], (1,), terminal=JobState.DONE)] if step < len(running) else []
        await claims.commit(ends)
    assert taken == [suspect]


async def test_an_empty_worker_need_not_wait_for_a_reserved_one(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    busy, empty = worker(worker_redis), worker(worker_redis)
    (suspect,) = await enqueue(queue)
    await make_suspects(queue, worker_redis, superuser, [suspect])
    (long,) = await enqueue(queue, priority=0)
    superuser.delete(f"{{{SHARD}}}:alone:1")
    await busy.claim(1, ROOM, ROOM)
    superuser.zadd(f"{{{SHARD}}}:alone:1", {suspect: 1})
    (waiting,) = await enqueue(queue)
    assert await busy.claim(10, ROOM, ROOM) == []
    assert names(await empty.claim(10, ROOM, ROOM)) == [suspect]
    assert names(await busy.claim(10, ROOM, ROOM)) == [waiting]
    assert busy.held == {long, waiting}


@pytest.mark.parametrize("ends", ["lease", "time", "leave"])
async def test_the_reservation_of_a_worker_that_is_gone_ends(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis, ends: str
) -> None:
    gone, other = worker(worker_redis), worker(worker_redis)
    ids = await enqueue(queue)
    await make_suspects(queue, worker_redis, superuser, ids)
    hold = await enqueue(queue, 2, priority=0)
    superuser.delete(f"{{{SHARD}}}:alone:1")
    for claims in (gone, other):
        await claims.claim(1, ROOM, ROOM)
    superuser.zadd(f"{{{SHARD}}}:alone:1", {ids[0]: 1})
    assert await gone.claim(10, ROOM, ROOM) == []
    assert superuser.hget(keys.meta(SHARD), "alone").split()[0] == gone.worker_id.encode()
    (waiting,) = await enqueue(queue)
    assert names(await other.claim(10, ROOM, ROOM)) == [waiting]
    if ends == "lease":
        superuser.zadd(keys.worker_leases(SHARD), {gone.worker_id: 1})
    elif ends == "time":  # it lives, but a worker whose cache is full claims nothing
        superuser.hset(keys.meta(SHARD), "alone", f"{gone.worker_id} 1 -")
        await gone.heartbeat(WorkerInfo())
    else:
        await gone.leave()
    await enqueue(queue)
    assert await other.claim(10, ROOM, ROOM) == []
    await other.commit([make_event(name, (1,), terminal=JobState.DONE) for name in (hold[1], waiting)])
    assert names(await other.claim(10, ROOM, ROOM)) == ids


async def test_a_suspect_that_is_cancelled_or_expires_frees_its_worker(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    cancelled, expired = await enqueue(queue, 2)
    await make_suspects(queue, worker_redis, superuser, [cancelled, expired])
    claims = worker(worker_redis)
    assert names(await claims.claim(10, ROOM, ROOM)) == [cancelled]
    await queue.cancel(cancelled, "acme")
    superuser.hset(keys.job(SHARD, expired), "dl", 1)
    (innocent,) = await enqueue(queue)
    assert names(await claims.claim(10, ROOM, ROOM)) == [innocent]
    assert (await queue.get(expired, "acme")).state is JobState.EXPIRED
    assert superuser.hget(keys.meta(SHARD), "alone") is None


async def test_a_suspect_that_is_released_stays_one(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    (suspect,) = await enqueue(queue)
    await make_suspects(queue, worker_redis, superuser, [suspect])
    first, second = worker(worker_redis), worker(worker_redis)
    await first.claim(10, ROOM, ROOM)
    await first.release([suspect])
    await enqueue(queue)
    assert names(await second.claim(10, ROOM, ROOM)) == [suspect]


async def test_a_suspect_too_large_for_a_worker_is_left_for_another(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    (large,) = await enqueue(queue, kv_tokens=16, peak_kv_tokens=5000)
    await make_suspects(queue, worker_redis, superuser, [large])
    (small,) = await enqueue(queue)
    assert names(await worker(worker_redis).claim(10, 1000, 1000)) == [small]
    assert names(await worker(worker_redis).claim(10, ROOM, ROOM)) == [large]


async def test_a_lost_reply_hands_out_the_suspect_again_and_nothing_beside_it(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    ids = await enqueue(queue, 2)
    await make_suspects(queue, worker_redis, superuser, ids)
    claims = worker(worker_redis)
    worker_redis.num_to_lose = 1
    assert names(await claims.claim(10, ROOM, ROOM)) == ids[:1]


async def test_a_suspect_that_an_older_program_queued_among_the_others_is_isolated(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    ids = await enqueue(queue, 3)
    superuser.hset(keys.job(SHARD, ids[1]), "at", 2)
    claims = worker(worker_redis)
    assert names(await claims.claim(10, ROOM, ROOM)) == [ids[0], ids[2]]
    invariants.i8_a_job_is_in_exactly_one_place(invariants.take_snapshot(superuser, SHARD))
    await claims.commit([make_event(name, (1,), terminal=JobState.DONE) for name in (ids[0], ids[2])])
    assert names(await claims.claim(10, ROOM, ROOM)) == [ids[1]]


async def test_an_old_job_never_needs_more_slots_than_it_needs_to_end(
    queue: JobQueue, worker_redis: FlakyRedis
) -> None:
    """Many outputs, one after another: what they emitted together must not keep the job from an empty worker."""
    (generation_id,) = await enqueue(queue, kv_tokens=64, peak_kv_tokens=64, max_tokens=1000)
    first = worker(worker_redis)
    await first.claim(1, 64, 64)
    await first.commit([make_event(generation_id, tuple(range(500)))])
    await first.release([generation_id])
    assert names(await worker(worker_redis).claim(1, 64, 64)) == [generation_id]


MUTANTS: dict[str, dict[str, Script]] = {
    "isolation": mutate("lib_jobs", "MAX_ATTEMPTS_IN_COMPANY = 2", "MAX_ATTEMPTS_IN_COMPANY = 1e9"),
    "company": mutate("claim", "if running then return holder == wid end", "if running then return false end"),
}


@pytest.mark.parametrize("name", MUTANTS)
async def test_without_isolation_a_neighbour_would_be_lost(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis, name: str
) -> None:
    poison, neighbour = await enqueue(queue, 2)
    runner = ScriptRunner(worker_redis, MUTANTS[name])

    def broken() -> JobClaims:
        return JobClaims(worker_redis, SHARD, keys.random_id(), QueueSettings(), retry=FAST_RETRY, scripts=runner)

    queue = JobQueue(worker_redis, keys.random_id(), QueueSettings(), retry=FAST_RETRY, scripts=runner)
    for _ in range(2):
        victim = broken()
        await victim.claim(10, ROOM, ROOM)
        await die(queue, superuser, victim)
    (newcomer,) = await enqueue(queue)
    victim = broken()
    await victim.claim(10, ROOM, ROOM)
    await victim.claim(10, ROOM, ROOM)
    assert len(victim.held & {poison, neighbour, newcomer}) > 1
