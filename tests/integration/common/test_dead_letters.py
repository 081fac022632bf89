from __future__ import annotations

import pytest
import redis as redis_sync

from common import keys
from common.dead_letters import DeadLetters, LetterMark, LetterResult, Outcome, mark_of
from common.errors import BackendFull, GenerationNotFound
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import JobState, Reason
from common.settings import QueueSettings
from tests.builders_common import FlakyRedis, make_event, make_job
from tests.integration.common import invariants
from tests.integration.common.conftest import FAST_RETRY, SHARD

ROOM = 10_000
OTHER_SHARD = keys.shard_name("tiny", "r2")


@pytest.fixture
def letters(gateway_redis: FlakyRedis) -> DeadLetters:
    return DeadLetters(gateway_redis, QueueSettings(), retry=FAST_RETRY)


async def fail(queue: JobQueue, claims: JobClaims, **fields: object) -> str:
    """A generation that a worker gave up after one token."""
    generation_id = (await queue.enqueue(SHARD, make_job(**fields))).generation_id  # type: ignore[arg-type]
    await claims.claim(1, ROOM, ROOM)
    await claims.commit([make_event(generation_id, (1,), terminal=JobState.FAILED, reason=Reason.WORKER_FAILED)])
    return generation_id


async def test_letters_are_listed_newest_first_in_pages(
    queue: JobQueue, claims: JobClaims, letters: DeadLetters, superuser: redis_sync.Redis
) -> None:
    ids = [await fail(queue, claims) for _ in range(7)]
    for ended, generation_id in zip((1, 2, 2, 2, 3, 4, 5), ids, strict=True):  # three in the same millisecond
        superuser.zadd(keys.dead_letters(SHARD), {generation_id: ended})
        superuser.hset(keys.job(SHARD, generation_id), "en", ended)
    seen: list[str] = []
    after: LetterMark | None = None
    while True:
        page, total = await letters.newest([SHARD, OTHER_SHARD], 2, after)
        assert total == 7
        if not page:
            break
        seen += [record.generation_id for record in page]
        after = mark_of(page[-1])
    assert seen == [*ids[:3:-1], *sorted(ids[1:4], reverse=True), ids[0]]


async def test_a_letter_tells_what_happened(queue: JobQueue, claims: JobClaims, letters: DeadLetters) -> None:
    generation_id = await fail(queue, claims, prompt=(4, 5, 6, 7))
    ((record,), total) = await letters.newest([SHARD], 10)
    assert (record.generation_id, record.tenant, record.reason) == (generation_id, "acme", Reason.WORKER_FAILED)
    assert (record.num_claims, record.sequence, record.usage.prompt_tokens, total) == (1, 1, 4, 1)
    assert 0 < record.created_ms <= record.ended_ms


async def test_only_what_can_be_sent_again_is_listed(
    queue: JobQueue, claims: JobClaims, letters: DeadLetters, superuser: redis_sync.Redis
) -> None:
    done, cancelled, expired = [(await queue.enqueue(SHARD, make_job())).generation_id for _ in range(3)]
    await claims.claim(1, ROOM, ROOM)
    await claims.commit([make_event(done, (1,), terminal=JobState.DONE)])
    await queue.cancel(cancelled, "acme")
    superuser.hset(keys.job(SHARD, expired), "dl", 1)
    await claims.claim(1, ROOM, ROOM)
    assert await letters.newest([SHARD], 10) == ([], 0)
    for generation_id in (done, cancelled, expired):
        assert await letters.retry([generation_id]) == [LetterResult(generation_id, Outcome.NOT_FOUND)]
        assert await letters.purge([generation_id]) == [LetterResult(generation_id, Outcome.NOT_FOUND)]
        assert (await queue.get(generation_id, "acme")).state.is_final


async def test_letters_are_kept_for_a_time_of_their_own(
    queue: JobQueue, claims: JobClaims, letters: DeadLetters, superuser: redis_sync.Redis
) -> None:
    generation_id = await fail(queue, claims)
    key = keys.job(SHARD, generation_id)
    assert QueueSettings().retention_ms < superuser.pttl(key) <= QueueSettings().dead_letter_retention_ms
    assert 0 < superuser.pttl(f"{key}:log") <= QueueSettings().retention_ms, "a retry needs no log, which may be large"
    superuser.pexpire(key, 1)
    superuser.delete(key)
    assert await letters.newest([SHARD], 10) == ([], 0)
    assert superuser.zcard(keys.dead_letters(SHARD)) == 0


async def test_the_oldest_letters_go_with_their_data(
    queue: JobQueue, claims: JobClaims, letters: DeadLetters, superuser: redis_sync.Redis
) -> None:
    oldest = await fail(queue, claims, idempotency_key="k")
    superuser.zadd(keys.dead_letters(SHARD), {oldest: 1})
    superuser.zadd(keys.dead_letters(SHARD), {f"{SHARD}.x{number}": 2 + number for number in range(999)})
    assert await letters.purge([f"{SHARD}.{'a' * 26}"]) == [LetterResult(f"{SHARD}.{'a' * 26}", Outcome.NOT_FOUND)]
    newest = await fail(queue, claims)
    assert superuser.zcard(keys.dead_letters(SHARD)) == 1000
    with pytest.raises(GenerationNotFound):
        await queue.get(oldest, "acme")
    assert superuser.exists(keys.job_log(SHARD, oldest)) == 0
    assert list(superuser.scan_iter(f"{{{SHARD}}}:i:*")) == []
    ((record,), _) = await letters.newest([SHARD], 10)
    assert record.generation_id == newest


async def test_a_retry_is_a_new_generation_from_the_beginning(
    queue: JobQueue, claims: JobClaims, letters: DeadLetters, superuser: redis_sync.Redis
) -> None:
    body = make_job(prompt=(9, 8, 7), max_tokens=5).body
    old_id = await fail(
        queue, claims, prompt=(9, 8, 7), max_tokens=5, priority=0, weight=2.5, key_id="k1", time_limit_ms=90_000,
        echo=b"accepted", kv_tokens=20,
    )  # fmt: skip
    old_log = (await queue.read_log(old_id, "acme")).events
    ((_, outcome, new_id),) = [(r.generation_id, r.outcome, r.new_generation_id) for r in await letters.retry([old_id])]
    assert outcome is Outcome.RETRIED
    record = await queue.get(new_id, "acme")
    assert (record.state, record.key_id, record.priority, record.echo) == (JobState.QUEUED, "k1", 0, b"accepted")
    assert (record.epoch, record.attempts, record.num_claims, record.sequence) == (0, 0, 0, 0)
    assert (record.deadline_ms - record.created_ms, record.gateway_id) == (90_000, "")
    old, new = (superuser.hgetall(keys.job(SHARD, generation_id)) for generation_id in (old_id, new_id))
    assert all(old[name] == new[name] for name in (b"wt", b"pt", b"mx", b"kv", b"pk", b"rt", b"rf", b"b", b"dg"))
    invariants.i8_a_job_is_in_exactly_one_place(invariants.take_snapshot(superuser, SHARD))

    (job,) = await claims.claim(1, ROOM, ROOM)
    assert (job.generation_id, job.body, job.events) == (new_id, body, ())
    await claims.commit([make_event(new_id, (1,), terminal=JobState.DONE)])
    assert (await queue.get(new_id, "acme")).state is JobState.DONE
    assert (await queue.read_log(old_id, "acme")).events == old_log
    assert (await letters.newest([SHARD], 10)) == ([], 0)
    assert 0 < superuser.pttl(keys.job(SHARD, old_id)) <= QueueSettings().retention_ms


async def test_a_retry_is_made_once_however_often_it_is_asked_for(
    queue: JobQueue, claims: JobClaims, letters: DeadLetters, gateway_redis: FlakyRedis
) -> None:
    old_id = await fail(queue, claims)
    gateway_redis.num_to_lose = 1
    (first,) = await letters.retry([old_id, old_id])
    assert await letters.retry([old_id]) == [first]
    assert [record.generation_id for record in await queue.list_inflight(SHARD)] == [first.new_generation_id]
    assert await letters.purge([old_id]) == [LetterResult(old_id, Outcome.NOT_FOUND)]


async def test_a_retry_that_fails_again_is_a_letter_again(
    queue: JobQueue, claims: JobClaims, letters: DeadLetters
) -> None:
    (result,) = await letters.retry([await fail(queue, claims)])
    await claims.claim(1, ROOM, ROOM)
    new_id = result.new_generation_id
    await claims.commit([make_event(new_id, (), terminal=JobState.FAILED, reason=Reason.WORKER_FAILED)])
    ((record,), _) = await letters.newest([SHARD], 10)
    assert record.generation_id == new_id


async def test_the_callers_idempotency_key_leads_to_the_retry(
    queue: JobQueue, claims: JobClaims, letters: DeadLetters, superuser: redis_sync.Redis
) -> None:
    old_id = await fail(queue, claims, idempotency_key="k", request_digest=b"d")
    (result,) = await letters.retry([old_id])
    again = await queue.enqueue(SHARD, make_job(idempotency_key="k", request_digest=b"d"))
    assert (again.generation_id, again.duplicate) == (result.new_generation_id, True)
    assert superuser.pttl(keys.idempotency(SHARD, keys.idempotency_digest("acme", "k"))) == -1


@pytest.mark.parametrize(
    ("settings", "outcome"),
    [
        ({"max_queued": 1}, Outcome.QUEUE_FULL),
        ({"max_queued_per_tenant": 1}, Outcome.TENANT_QUEUE_FULL),
        ({"max_live_per_tenant": 1}, Outcome.TENANT_CONCURRENCY),
    ],
)
async def test_a_retry_is_held_to_the_queues_bounds(
    queue: JobQueue, claims: JobClaims, gateway_redis: FlakyRedis, settings: dict[str, int], outcome: Outcome
) -> None:
    old_id = await fail(queue, claims)
    await queue.enqueue(SHARD, make_job())
    bounded = DeadLetters(gateway_redis, QueueSettings(**settings), retry=FAST_RETRY)
    assert await bounded.retry([old_id]) == [LetterResult(old_id, outcome)]
    ((record,), _) = await bounded.newest([SHARD], 10)
    assert record.generation_id == old_id


async def test_no_retry_when_the_server_is_out_of_memory_but_a_purge_makes_room(
    queue: JobQueue, claims: JobClaims, letters: DeadLetters, superuser: redis_sync.Redis
) -> None:
    old_id = await fail(queue, claims)
    superuser.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(BackendFull):
            await letters.retry([old_id])
        assert await letters.purge([old_id]) == [LetterResult(old_id, Outcome.PURGED)]
    finally:
        superuser.config_set("maxmemory", 0)


async def test_a_purge_leaves_nothing(
    queue: JobQueue, claims: JobClaims, letters: DeadLetters, superuser: redis_sync.Redis
) -> None:
    kept = await fail(queue, claims, idempotency_key="other")
    old_id = await fail(queue, claims, idempotency_key="k")
    assert await letters.purge([old_id]) == [LetterResult(old_id, Outcome.PURGED)]
    assert [key for key in superuser.keys("*") if old_id.encode() in key] == []
    assert superuser.exists(keys.idempotency(SHARD, keys.idempotency_digest("acme", "k"))) == 0
    ((record,), total) = await letters.newest([SHARD], 10)
    assert (record.generation_id, total) == (kept, 1)
    assert await letters.purge([old_id, "made-up"]) == [
        LetterResult(old_id, Outcome.NOT_FOUND),
        LetterResult("made-up", Outcome.NOT_FOUND),
    ]
    assert not (await queue.enqueue(SHARD, make_job(idempotency_key="k"))).duplicate


async def test_a_purge_whose_reply_was_lost_is_answered_as_if_nothing_had_been_there(
    queue: JobQueue, claims: JobClaims, letters: DeadLetters, gateway_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    old_id = await fail(queue, claims)
    gateway_redis.num_to_lose = 1
    assert await letters.purge([old_id]) == [LetterResult(old_id, Outcome.NOT_FOUND)]
    assert superuser.exists(keys.job(SHARD, old_id), keys.job_log(SHARD, old_id)) == 0
