from __future__ import annotations

import asyncio
import time

import pytest
import redis as redis_sync

from common import keys
from common.chain import GENESIS, next_hash
from common.errors import BackendUnavailable
from common.generation import EventBody, OutputDelta, Usage
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import JobState, LostReason, NewEvent, Reason, Swept, WorkerInfo
from common.redis import Retry
from common.settings import QueueSettings
from tests.builders_common import FlakyRedis, make_event, make_job
from tests.integration.common.conftest import FAST_RETRY, SHARD

ROOM = 10_000


def worker(redis: FlakyRedis, *, retry: Retry = FAST_RETRY, **settings: int) -> JobClaims:
    return JobClaims(redis, SHARD, keys.random_id(), QueueSettings(**settings), retry=retry)


async def enqueue(queue: JobQueue, number: int = 1, **fields: object) -> list[str]:
    return [(await queue.enqueue(SHARD, make_job(**fields))).generation_id for _ in range(number)]  # type: ignore[arg-type]


def end_lease(superuser: redis_sync.Redis, claims: JobClaims) -> None:
    """Let a worker's lease be over, and the grace after the server's start too."""
    superuser.zadd(keys.worker_leases(SHARD), {claims.worker_id: 1}, xx=True)
    superuser.hset(keys.meta(SHARD), mapping={"grace": 0, "reaped": int(time.time() * 1000)})


async def test_a_claimed_job_comes_whole(queue: JobQueue, claims: JobClaims) -> None:
    job = make_job(prompt=(5, 6, 7), time_limit_ms=30_000, priority=0)
    accepted = await queue.enqueue(SHARD, job)
    (claimed,) = await claims.claim(1, ROOM, ROOM)
    assert (claimed.generation_id, claimed.body, claimed.events) == (accepted.generation_id, job.body, ())
    assert (claimed.epoch, claimed.sequence, claimed.chain_hash, claimed.priority) == (1, 0, GENESIS, 0)
    assert 29_000 < claimed.remaining_ms <= 30_000
    assert await claims.claim(1, ROOM, ROOM) == []
    record = await queue.get(accepted.generation_id, "acme")
    assert (record.state, record.worker_id, record.place) == (JobState.RUNNING, claims.worker_id, 0)


async def test_classes_then_arrival_decide_the_order(queue: JobQueue, claims: JobClaims) -> None:
    late = await enqueue(queue, 2, priority=2)
    urgent = await enqueue(queue, 2, priority=0)
    normal = await enqueue(queue, 1)
    claimed = await claims.claim(10, ROOM, ROOM)
    assert [job.generation_id for job in claimed] == urgent + normal + late


async def test_backlogged_tenants_are_served_by_their_weights(queue: JobQueue, claims: JobClaims) -> None:
    for tenant, weight in (("a", 1.0), ("b", 1.0), ("c", 3.0)):
        await enqueue(queue, 60, tenant=tenant, weight=weight)
    claimed = await claims.claim(100, 10**9, 10**9)
    assert [sum(job.tenant == tenant for job in claimed) for tenant in "abc"] == [20, 20, 60]


async def test_a_tenant_that_was_idle_has_earned_no_credit(queue: JobQueue, claims: JobClaims) -> None:
    await enqueue(queue, 40, tenant="busy")
    await claims.claim(20, 10**9, 10**9)
    await enqueue(queue, 40, tenant="new")
    claimed = await claims.claim(20, 10**9, 10**9)
    assert 9 <= sum(job.tenant == "new" for job in claimed) <= 11


async def test_a_tenant_is_charged_what_it_really_used(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    (generation_id,) = await enqueue(queue, prompt=(1,) * 10, max_tokens=100, weight=2.0)
    await claims.claim(1, ROOM, ROOM)
    assert superuser.zscore(keys.service_counters(SHARD), "acme") == (10 + 2 * 100) / 2
    await claims.release([generation_id])
    await claims.claim(1, ROOM, ROOM)  # not charged again
    assert superuser.zscore(keys.service_counters(SHARD), "acme") == (10 + 2 * 100) / 2
    await claims.commit([make_event(generation_id, (1, 2, 3), terminal=JobState.DONE)])
    assert superuser.zscore(keys.service_counters(SHARD), "acme") == (10 + 2 * 3) / 2


async def test_tenants_that_are_long_gone_are_forgotten(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    for number in range(30):
        (generation_id,) = await enqueue(queue, tenant=f"passing-{number}")
        await claims.claim(1, ROOM, ROOM)
        await claims.commit([make_event(generation_id, (1,), terminal=JobState.DONE)])
    for _ in range(2):  # the second claim raises the floor to what the first has cost
        (generation_id,) = await enqueue(queue, tenant="regular", prompt=(1,) * 100)
        await claims.claim(1, ROOM, ROOM)
        await claims.commit([make_event(generation_id, (1,), terminal=JobState.DONE)])
    await queue.sweep(SHARD)
    assert superuser.zrange(keys.service_counters(SHARD), 0, -1) == [b"regular"]


async def test_a_job_that_does_not_fit_now_holds_back_its_class_and_those_below(
    queue: JobQueue, claims: JobClaims
) -> None:
    (large,) = await enqueue(queue, kv_tokens=500)
    (small,) = await enqueue(queue, kv_tokens=16)
    (below,) = await enqueue(queue, kv_tokens=16, priority=2)
    (above,) = await enqueue(queue, kv_tokens=16, priority=0)
    assert [job.generation_id for job in await claims.claim(10, 100, 1000)] == [above]
    assert [job.generation_id for job in await claims.claim(10, 600, 1000)] == [large, small, below]


async def test_small_jobs_of_lower_classes_may_pass_where_that_is_allowed(
    queue: JobQueue, worker_redis: FlakyRedis
) -> None:
    await enqueue(queue, kv_tokens=500)
    (larger,) = await enqueue(queue, kv_tokens=32, priority=2)
    (small,) = await enqueue(queue, kv_tokens=16, priority=2)
    claims = worker(worker_redis, bypass_kv_tokens=16)
    assert [job.generation_id for job in await claims.claim(10, 100, 1000)] == [small]
    assert (await queue.get(larger, "acme")).state is JobState.QUEUED


async def test_a_job_too_large_for_this_worker_is_left_for_another(queue: JobQueue, claims: JobClaims) -> None:
    (huge,) = await enqueue(queue, kv_tokens=16, peak_kv_tokens=5000)
    (other,) = await enqueue(queue, tenant="b")
    (behind,) = await enqueue(queue)
    assert {job.generation_id for job in await claims.claim(10, 1000, 1000)} == {other, behind}
    assert (await queue.get(huge, "acme")).state is JobState.QUEUED
    assert [job.generation_id for job in await claims.claim(10, ROOM, ROOM)] == [huge]


async def test_emitted_tokens_count_when_a_job_is_taken_over(queue: JobQueue, claims: JobClaims) -> None:
    (generation_id,) = await enqueue(queue, kv_tokens=16, max_tokens=100)
    await claims.claim(1, 16, ROOM)
    await claims.commit([make_event(generation_id, tuple(range(20)))])
    await claims.release([generation_id])
    assert await claims.claim(1, 35, ROOM) == []
    assert len(await claims.claim(1, 36, ROOM)) == 1


async def test_a_claim_is_bounded_by_bytes_but_never_empty_for_it(queue: JobQueue, worker_redis: FlakyRedis) -> None:
    await enqueue(queue, 3, prompt=tuple(range(1000)))
    claims = worker(worker_redis, max_claim_bytes=100)
    assert [len(await claims.claim(3, ROOM, ROOM)) for _ in range(4)] == [1, 1, 1, 0]


async def test_an_expired_job_is_ended_instead_of_handed_out(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    (generation_id,) = await enqueue(queue)
    superuser.hset(keys.job(SHARD, generation_id), "dl", 1)
    assert await claims.claim(1, ROOM, ROOM) == []
    record = await queue.get(generation_id, "acme")
    assert (record.state, record.reason) == (JobState.EXPIRED, Reason.NEVER_STARTED)


async def test_a_claim_whose_reply_was_lost_is_answered_again(
    queue: JobQueue, claims: JobClaims, worker_redis: FlakyRedis
) -> None:
    ids = await enqueue(queue, 3)
    worker_redis.num_to_lose = 1
    assert [job.generation_id for job in await claims.claim(2, ROOM, ROOM)] == ids[:2]
    assert (await queue.get(ids[2], "acme")).state is JobState.QUEUED


async def test_jobs_of_a_claim_that_was_given_up_are_adopted(queue: JobQueue, worker_redis: FlakyRedis) -> None:
    ids = await enqueue(queue, 2)
    claims = worker(worker_redis, retry=Retry(deadline_ms=0))
    worker_redis.num_to_lose = 1
    with pytest.raises(BackendUnavailable):
        await claims.claim(2, ROOM, ROOM)
    assert claims.held == frozenset()
    assert (await claims.commit()).has_unknown_jobs
    assert {job.generation_id for job in await claims.owned()} == set(ids)
    assert not (await claims.commit()).has_unknown_jobs


async def test_events_continue_number_and_hash(queue: JobQueue, claims: JobClaims) -> None:
    (generation_id,) = await enqueue(queue)
    await claims.claim(1, ROOM, ROOM)
    deltas = [OutputDelta(0, 0, (4, 5), "ab"), OutputDelta(0, 2, (), "c"), OutputDelta(0, 2, (6,), "d")]
    for delta in deltas:
        await claims.commit([NewEvent(generation_id=generation_id, body=EventBody((delta,)), completion_tokens=3)])
    events = (await queue.read_log(generation_id, "acme")).events
    expected = GENESIS
    for number, (event, delta) in enumerate(zip(events, deltas, strict=True), 1):
        expected = next_hash(expected, [delta])
        assert (event.sequence, event.chain_hash, event.body) == (number, expected, EventBody((delta,)))


async def test_a_commit_whose_reply_was_lost_is_not_written_twice(
    queue: JobQueue, claims: JobClaims, worker_redis: FlakyRedis
) -> None:
    (generation_id,) = await enqueue(queue)
    await claims.claim(1, ROOM, ROOM)
    for terminal in (None, JobState.DONE):
        worker_redis.num_to_lose = 2
        first = 0 if terminal is None else 1
        result = await claims.commit([make_event(generation_id, (9,), first=first, terminal=terminal)])
        assert result.lost == {}
    attachment = await queue.read_log(generation_id, "acme")
    assert [event.sequence for event in attachment.events] == [1, 2]
    assert attachment.record.usage.completion_tokens == 2


async def test_events_of_a_commit_that_was_given_up_are_kept(queue: JobQueue, worker_redis: FlakyRedis) -> None:
    (generation_id,) = await enqueue(queue)
    claims = worker(worker_redis, retry=Retry(deadline_ms=0))
    await claims.claim(1, ROOM, ROOM)
    for token in (1, 2):
        worker_redis.num_requests_to_lose = 1
        with pytest.raises(BackendUnavailable):
            await claims.commit([make_event(generation_id, (token,), first=token - 1)])
    await claims.commit([make_event(generation_id, (3,), first=2)])
    events = (await queue.read_log(generation_id, "acme")).events
    tokens = [token for event in events if event.body for delta in event.body.deltas for token in delta.token_ids]
    assert tokens == [1, 2, 3]


async def test_events_from_before_a_job_was_lost_are_not_added_after_it_was_claimed_again(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    (generation_id,) = await enqueue(queue)
    claims = worker(worker_redis, retry=Retry(deadline_ms=0))
    await claims.claim(1, ROOM, ROOM)
    for token in (1, 2):  # the first is pending then, the second behind it
        worker_redis.num_requests_to_lose = 1
        with pytest.raises(BackendUnavailable):
            await claims.commit([make_event(generation_id, (token,), first=token - 1)])
    end_lease(superuser, claims)
    await queue.reap(SHARD)
    (job,) = await claims.claim(1, ROOM, ROOM)
    assert (job.epoch, job.sequence) == (3, 0)
    await claims.commit([make_event(generation_id, (7,))])
    events = (await queue.read_log(generation_id, "acme")).events
    assert [delta.token_ids for event in events if event.body for delta in event.body.deltas] == [(7,)]


async def test_a_commit_cancelled_half_way_is_finished_by_the_next(
    queue: JobQueue, claims: JobClaims, worker_redis: FlakyRedis
) -> None:
    (generation_id,) = await enqueue(queue)
    await claims.claim(1, ROOM, ROOM)
    for token in range(20):
        task = asyncio.create_task(claims.commit([make_event(generation_id, (token,), first=token)]))
        for _ in range(token):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await claims.commit()
    events = (await queue.read_log(generation_id, "acme")).events
    tokens = [token for event in events if event.body for delta in event.body.deltas for token in delta.token_ids]
    assert tokens == sorted(tokens)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))


async def test_one_jobs_fault_leaves_the_rest_of_the_batch_alone(queue: JobQueue, claims: JobClaims) -> None:
    ids = await enqueue(queue, 3)
    await claims.claim(3, ROOM, ROOM)
    await queue.cancel(ids[1], "acme")
    result = await claims.commit([make_event(generation_id, (1,)) for generation_id in ids])
    assert result.lost == {ids[1]: LostReason.CANCELLED}
    sequences = [(await queue.get(generation_id, "acme")).sequence for generation_id in ids]
    assert sequences == [1, 1, 1]  # the second one's is the cancellation
    assert claims.held == {ids[0], ids[2]}


async def test_a_cancel_reaches_a_job_that_has_no_event_in_this_step(queue: JobQueue, claims: JobClaims) -> None:
    prefilling, running = await enqueue(queue, 2)
    await claims.claim(2, ROOM, ROOM)
    await queue.cancel(prefilling, "acme")
    assert (await claims.commit([make_event(running, (1,))])).lost == {prefilling: LostReason.CANCELLED}


async def test_a_heartbeat_tells_of_lost_jobs_too(queue: JobQueue, claims: JobClaims) -> None:
    (generation_id,) = await enqueue(queue)
    await claims.claim(1, ROOM, ROOM)
    assert (await claims.heartbeat(WorkerInfo())).lost == {}
    await queue.cancel(generation_id, "acme")
    assert (await claims.heartbeat(WorkerInfo())).lost == {generation_id: LostReason.CANCELLED}
    assert claims.held == frozenset()


async def test_a_commit_tells_how_many_wait(queue: JobQueue, claims: JobClaims) -> None:
    for priority, number in ((0, 1), (2, 3)):
        await enqueue(queue, number, priority=priority)
    assert (await claims.commit()).queued == (1, 0, 3)


async def test_a_log_that_grows_too_large_ends_its_job_alone(queue: JobQueue, worker_redis: FlakyRedis) -> None:
    large, small = await enqueue(queue, 2)
    claims = worker(worker_redis, max_log_bytes=300)
    await claims.claim(2, ROOM, ROOM)
    for index in range(3):
        await claims.commit(
            [make_event(large, (index,), first=index, text="x" * 100), make_event(small, (index,), first=index)]
        )
    attachment = await queue.read_log(large, "acme")
    assert (attachment.record.state, attachment.record.reason) == (JobState.FAILED, Reason.LOG_LIMIT)
    assert sum(len(event.body.deltas) for event in attachment.events if event.body) == 2
    assert (await queue.get(small, "acme")).state is JobState.RUNNING


async def test_a_dead_workers_jobs_go_on_elsewhere_where_they_stood(
    queue: JobQueue, claims: JobClaims, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    (generation_id,) = await enqueue(queue)
    await enqueue(queue, 2)  # behind it
    await claims.claim(1, ROOM, ROOM)
    await claims.commit([make_event(generation_id, (1, 2))])
    end_lease(superuser, claims)
    assert (await queue.reap(SHARD)).requeued == 1
    other = worker(worker_redis)
    (job,) = await other.claim(1, ROOM, ROOM)
    assert (job.generation_id, job.sequence, job.attempts, len(job.events)) == (generation_id, 1, 0, 1)
    assert job.usage == Usage(3, 0, 2)
    await other.commit([make_event(generation_id, (3,), first=2)])
    assert (await claims.commit([make_event(generation_id, (99,), first=2)])).lost == {generation_id: LostReason.TAKEN}
    events = (await queue.read_log(generation_id, "acme")).events
    assert [delta.token_ids for event in events if event.body for delta in event.body.deltas] == [(1, 2), (3,)]


async def test_a_commit_without_events_writes_nothing_until_a_tenth_of_the_lease_is_gone(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    """What writes nothing need not be synced to disk."""

    def written() -> int:
        return int(superuser.info("persistence")["rdb_changes_since_last_save"])

    (generation_id,) = await enqueue(queue)
    await claims.claim(1, ROOM, ROOM)
    await asyncio.sleep(0.01)  # the lease could be another one
    before = written()
    assert (await claims.commit()).lost == {}
    assert written() == before
    lease_ms = QueueSettings().worker_lease_ms
    for left_ms in (0.8 * lease_ms, 1.2 * lease_ms):  # and where the clock was put back
        superuser.zadd(keys.worker_leases(SHARD), {claims.worker_id: time.time() * 1000 + left_ms})
        before = written()
        await claims.commit()
        assert written() == before + 1
        till = superuser.zscore(keys.worker_leases(SHARD), claims.worker_id)
        assert till is not None
        assert 0.95 * lease_ms < till - time.time() * 1000 <= lease_ms
    before = written()
    await claims.commit([make_event(generation_id, (1,))])
    assert written() > before


async def test_after_a_restart_of_the_server_workers_get_a_lease_of_grace(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    await enqueue(queue)
    await claims.claim(1, ROOM, ROOM)
    superuser.zadd(keys.worker_leases(SHARD), {claims.worker_id: 1})
    assert await queue.reap(SHARD) == Swept()  # nobody had reaped for a long time: the server may have been away
    assert await queue.reap(SHARD) == Swept()
    assert (await claims.commit()).lost == {}
    end_lease(superuser, claims)
    assert (await queue.reap(SHARD)).requeued == 1


async def test_progress_without_output_keeps_an_attempt_from_counting(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    (generation_id,) = await enqueue(queue)
    await claims.claim(1, ROOM, ROOM)
    await claims.commit([make_event(generation_id, (), progress=True)])
    end_lease(superuser, claims)
    await queue.reap(SHARD)
    assert (await queue.get(generation_id, "acme")).attempts == 0


async def test_even_a_job_that_makes_progress_is_not_handed_out_for_ever(
    gateway_redis: FlakyRedis, worker_redis: FlakyRedis
) -> None:
    settings = QueueSettings(max_claims=4)
    queue = JobQueue(gateway_redis, keys.random_id(), settings, retry=FAST_RETRY)
    claims = worker(worker_redis, max_claims=4)
    (generation_id,) = await enqueue(queue)
    for _ in range(4):
        assert len(await claims.claim(1, ROOM, ROOM)) == 1
        await claims.release([generation_id])
    assert await claims.claim(1, ROOM, ROOM) == []
    assert (await queue.get(generation_id, "acme")).reason is Reason.ATTEMPTS_EXHAUSTED


async def test_released_jobs_return_to_the_head_without_a_counted_attempt(
    queue: JobQueue, claims: JobClaims, worker_redis: FlakyRedis
) -> None:
    ids = await enqueue(queue, 4)
    await claims.claim(2, ROOM, ROOM)
    worker_redis.num_to_lose = 1  # and a repeat releases nothing else
    await claims.release(reversed(ids[:2]))
    jobs = await worker(worker_redis).claim(4, ROOM, ROOM)
    assert [job.generation_id for job in jobs] == ids
    assert [job.attempts for job in jobs] == [0] * 4


async def test_a_worker_that_leaves_is_gone_at_once(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    ids = await enqueue(queue, 2)
    await claims.claim(2, ROOM, ROOM)
    await claims.heartbeat(WorkerInfo(model="tiny"))
    await claims.release(ids[:1])
    assert await claims.leave() == 1
    superuser.hset(keys.meta(SHARD), mapping={"grace": 0, "reaped": int(time.time() * 1000)})
    assert (await queue.reap(SHARD)).requeued == 1
    assert await queue.workers(SHARD) == []


async def test_workers_are_seen_with_what_they_say_of_themselves(queue: JobQueue, claims: JobClaims) -> None:
    await enqueue(queue)
    await claims.claim(1, ROOM, ROOM)
    info = WorkerInfo(model="tiny", device="cpu", num_running=3, stats={"steps_per_second": 2.5})
    await claims.heartbeat(info)
    (seen,) = await queue.workers(SHARD)
    assert (seen.worker_id, seen.num_jobs, seen.info) == (claims.worker_id, 1, info)
    assert 0 < seen.lease_left_ms <= QueueSettings().worker_lease_ms


async def test_a_failed_generation_is_a_dead_letter_with_its_reason(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    (generation_id,) = await enqueue(queue)
    await claims.claim(1, ROOM, ROOM)
    await claims.commit([make_event(generation_id, (1,), terminal=JobState.FAILED, reason=Reason.WORKER_FAILED)])
    record = await queue.get(generation_id, "acme")
    assert (record.state, record.reason) == (JobState.FAILED, Reason.WORKER_FAILED)
    assert superuser.zcard(keys.dead_letters(SHARD)) == 1


async def test_a_thousand_jobs_fit_into_one_commit(queue: JobQueue, claims: JobClaims) -> None:
    ids = await enqueue(queue, 1100, kv_tokens=1)
    for _ in range(3):
        await claims.claim(600, 10**6, 10**6)
    result = await claims.commit([make_event(generation_id, (1,)) for generation_id in ids])
    assert result.lost == {}
    assert not result.has_unknown_jobs
    assert (await queue.get(ids[-1], "acme")).sequence == 1


async def test_nothing_is_left_behind_but_what_expires(
    queue: JobQueue, claims: JobClaims, gateway_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    ids = await enqueue(queue, 3, idempotency_key=None)
    await claims.claim(3, ROOM, ROOM)
    await claims.commit([make_event(generation_id, (1,), terminal=JobState.DONE) for generation_id in ids])
    await claims.leave()
    await queue.leave([SHARD])
    await JobQueue(gateway_redis, keys.random_id(), QueueSettings()).sweep(SHARD)
    lasting = {key.decode().partition(":")[2] for key in superuser.keys("*") if superuser.pttl(key) == -1}
    assert lasting <= {"meta", "len", "wc"}
