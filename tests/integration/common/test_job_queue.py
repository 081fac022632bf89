from __future__ import annotations

import pytest
import redis as redis_sync

from common import keys
from common.errors import (
    BackendFull,
    BackendRefused,
    DeadlineExceeded,
    GenerationNotFound,
    IdempotencyKeyReused,
    InvalidRequest,
    QueueFull,
    ResultLost,
    SequenceOutOfRange,
)
from common.generation import EventBody, OutputDelta
from common.job_claims import JobClaims
from common.job_queue import START_CURSOR, JobQueue
from common.jobs import ItemKind, JobState, NewEvent, Reason
from common.settings import QueueSettings
from tests.builders_common import FlakyRedis, make_event, make_job
from tests.integration.common.calls import ROOM, other_queue, run_to
from tests.integration.common.conftest import SHARD


async def test_an_accepted_job_waits_in_its_place(queue: JobQueue) -> None:
    first = await queue.enqueue(SHARD, make_job())
    second = await queue.enqueue(SHARD, make_job())
    urgent = await queue.enqueue(SHARD, make_job(priority=0))
    assert [first.place, second.place, urgent.place] == [1, 2, 1]
    assert (await queue.get(second.generation_id, "acme")).place == 3
    assert keys.shard_of(first.generation_id) == SHARD


async def test_the_same_idempotency_key_gives_the_same_generation(queue: JobQueue) -> None:
    job = make_job(idempotency_key="k", request_digest=b"1")
    first = await queue.enqueue(SHARD, job)
    again = await queue.enqueue(SHARD, job)
    assert (again.generation_id, first.duplicate, again.duplicate) == (first.generation_id, False, True)
    assert len(await queue.list_inflight(SHARD)) == 1
    with pytest.raises(IdempotencyKeyReused):
        await queue.enqueue(SHARD, make_job(idempotency_key="k", request_digest=b"2"))


async def test_an_idempotency_key_belongs_to_its_tenant(queue: JobQueue) -> None:
    one = await queue.enqueue(SHARD, make_job("a", idempotency_key="k"))
    two = await queue.enqueue(SHARD, make_job("b", idempotency_key="k"))
    assert one.generation_id != two.generation_id


async def test_an_idempotency_key_is_found_in_every_revision_of_a_model(queue: JobQueue) -> None:
    older = keys.shard_name("tiny", "r0")
    accepted = await queue.enqueue(older, make_job(idempotency_key="k", request_digest=b"d"))
    assert await queue.lookup_idempotency([SHARD, older], "acme", "k", b"d") == accepted.generation_id
    assert await queue.lookup_idempotency([SHARD, older], "other", "k", b"d") is None
    assert await queue.lookup_idempotency([SHARD], "acme", "k", b"d") is None
    with pytest.raises(IdempotencyKeyReused):
        await queue.lookup_idempotency([SHARD, older], "acme", "k", b"e")


async def test_a_key_lives_as_long_as_its_job_and_the_retention_after_it(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    accepted = await queue.enqueue(SHARD, make_job(idempotency_key="k"))
    name = keys.idempotency(SHARD, keys.idempotency_digest("acme", "k"))
    assert superuser.pttl(name) == -1
    await run_to(claims, accepted.generation_id, 1, end=True)
    assert 0 < superuser.pttl(name) <= QueueSettings().retention_ms
    assert (await queue.enqueue(SHARD, make_job(idempotency_key="k"))).duplicate


async def test_a_lost_reply_to_enqueue_makes_no_second_job(queue: JobQueue, gateway_redis: FlakyRedis) -> None:
    gateway_redis.num_to_lose = 2
    accepted = await queue.enqueue(SHARD, make_job())
    assert not accepted.duplicate
    assert [job.generation_id for job in await queue.list_inflight(SHARD)] == [accepted.generation_id]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_queued": 2}, "QUEUE_FULL"),
        ({"max_queued_per_tenant": 2}, "TENANT_QUEUE_FULL"),
        ({"max_live_per_tenant": 2}, "TENANT_CONCURRENCY"),
    ],
)
async def test_a_full_queue_refuses_and_says_when_to_come_back(
    gateway_redis: FlakyRedis, settings: dict[str, int], reason: str
) -> None:
    queue = other_queue(gateway_redis, **settings)
    for priority in (0, 1):
        await queue.enqueue(SHARD, make_job(priority=priority))
    with pytest.raises(QueueFull) as caught:
        await queue.enqueue(SHARD, make_job(priority=2))
    assert caught.value.reason == reason
    assert caught.value.retry_after_ms
    assert len(await queue.list_inflight(SHARD)) == 2


async def test_one_tenants_bound_does_not_hold_another(gateway_redis: FlakyRedis) -> None:
    queue = other_queue(gateway_redis, max_queued_per_tenant=1, max_live_per_tenant=1)
    await queue.enqueue(SHARD, make_job("a"))
    await queue.enqueue(SHARD, make_job("b"))


async def test_running_jobs_count_against_the_tenants_cap_until_they_end(
    gateway_redis: FlakyRedis, claims: JobClaims
) -> None:
    queue = other_queue(gateway_redis, max_live_per_tenant=1)
    first = await queue.enqueue(SHARD, make_job())
    await run_to(claims, first.generation_id, 1)
    with pytest.raises(QueueFull):
        await queue.enqueue(SHARD, make_job())
    await run_to(claims, first.generation_id, 0, end=True)
    await queue.enqueue(SHARD, make_job())


async def test_no_new_job_when_the_server_is_out_of_memory_but_running_ones_finish(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    accepted = await queue.enqueue(SHARD, make_job())
    await claims.claim(1, ROOM, ROOM)
    superuser.config_set("maxmemory", "1")
    try:
        with pytest.raises(BackendFull):
            await queue.enqueue(SHARD, make_job())
        await claims.commit([make_event(accepted.generation_id, (1,), terminal=JobState.DONE)])
        assert (await queue.get(accepted.generation_id, "acme")).state is JobState.DONE
    finally:
        superuser.config_set("maxmemory", "0")


async def test_a_time_limit_is_cut_to_the_longest_lifetime(gateway_redis: FlakyRedis) -> None:
    queue = other_queue(gateway_redis, default_lifetime_ms=1000, max_lifetime_ms=5000)
    for wanted, given in ((None, 1000), (2000, 2000), (10**9, 5000)):
        accepted = await queue.enqueue(SHARD, make_job(time_limit_ms=wanted))
        record = await queue.get(accepted.generation_id, "acme")
        assert record.deadline_ms - record.created_ms == given
    with pytest.raises(DeadlineExceeded) as caught:
        await queue.enqueue(SHARD, make_job(time_limit_ms=0))
    assert caught.value.reason == "DEADLINE_TOO_SHORT"


@pytest.mark.parametrize(
    "fields",
    [
        {"tenant": ""},
        {"tenant": "a\nb"},
        {"tenant": "x" * 257},
        {"key_id": "a:b"},
        {"idempotency_key": ""},
        {"idempotency_key": "k" * 129},
        {"priority": 3},
        {"weight": 0.0},
        {"kv_tokens": 0},
    ],
)
def test_a_job_that_does_not_fit_the_store_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        make_job(**fields)  # type: ignore[arg-type]


async def test_a_stream_is_resumed_after_any_event(queue: JobQueue, claims: JobClaims) -> None:
    accepted = await queue.enqueue(SHARD, make_job(echo=b"config"))
    generation_id = accepted.generation_id
    await run_to(claims, generation_id, 4)
    await claims.release([generation_id])  # a second epoch in the log
    await run_to(claims, generation_id, 0)
    await claims.commit([make_event(generation_id, (4,), first=4)])
    whole = await queue.attach(generation_id, "acme")
    assert [event.sequence for event in whole.events] == [1, 2, 3, 4, 5]
    assert {event.epoch for event in whole.events} == {1, 3}
    assert whole.record.echo == b"config"
    for after in range(1, 6):
        tail = await queue.attach(generation_id, "acme", after, whole.events[after - 1].chain_hash)
        assert tail.events == whole.events[after:]


async def test_a_long_log_comes_in_parts(gateway_redis: FlakyRedis, claims: JobClaims) -> None:
    queue = other_queue(gateway_redis, max_attach_events=70)
    accepted = await queue.enqueue(SHARD, make_job(max_tokens=200))
    await run_to(claims, accepted.generation_id, 150, end=True)
    sequences: list[int] = []
    more = True
    while more:
        part = await queue.read_log(accepted.generation_id, "acme", len(sequences))
        sequences += [event.sequence for event in part.events]
        more = part.more
    assert sequences == list(range(1, 152))
    assert (await queue.read_log(accepted.generation_id, "acme", 151)).events == ()


async def test_a_resume_beyond_the_log_is_out_of_range(queue: JobQueue, claims: JobClaims) -> None:
    accepted = await queue.enqueue(SHARD, make_job())
    await run_to(claims, accepted.generation_id, 2)
    with pytest.raises(SequenceOutOfRange):
        await queue.attach(accepted.generation_id, "acme", 3)


async def test_what_the_server_has_lost_is_not_mixed_with_another_result(queue: JobQueue, claims: JobClaims) -> None:
    accepted = await queue.enqueue(SHARD, make_job())
    await run_to(claims, accepted.generation_id, 2)
    for after, after_hash in ((2, b"\1" * 8), (3, b"\1" * 8), (0, b"\1" * 8)):
        with pytest.raises(ResultLost):
            await queue.attach(accepted.generation_id, "acme", after, after_hash)


async def test_foreign_absent_and_made_up_ids_are_answered_alike(queue: JobQueue) -> None:
    accepted = await queue.enqueue(SHARD, make_job("a"))
    texts = set()
    for generation_id in (accepted.generation_id, keys.new_generation_id(SHARD), "nonsense"):
        for operation in (queue.attach, queue.read_log, queue.cancel, queue.get):
            with pytest.raises(GenerationNotFound) as caught:
                await operation(generation_id, "b")
            texts.add((caught.value.reason, caught.value.message))
    assert len(texts) == 1
    assert (await queue.get(accepted.generation_id, "a")).state is JobState.QUEUED


async def test_events_reach_the_gateway_in_one_entry_per_commit(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    ids = [(await queue.enqueue(SHARD, make_job())).generation_id for _ in range(3)]
    await claims.claim(3, ROOM, ROOM)
    _, cursors = await queue.replies({SHARD: START_CURSOR}, 10)
    before = superuser.xlen(keys.reply_stream(SHARD, queue.gateway_id))
    await claims.commit([make_event(generation_id, (7,)) for generation_id in ids])
    assert superuser.xlen(keys.reply_stream(SHARD, queue.gateway_id)) == before + 1
    items, _ = await queue.replies(cursors, 10)
    assert [(item.generation_id, item.sequence) for item in items] == [(generation_id, 1) for generation_id in ids]
    assert all(item.body == EventBody(deltas=(OutputDelta(0, 0, (7,)),)) for item in items)


async def test_replies_of_many_shards_come_together_and_silence_is_no_error(
    queue: JobQueue, worker_redis: FlakyRedis
) -> None:
    shards = [keys.shard_name("m", str(i)) for i in range(3)]
    cursors = dict.fromkeys(shards, START_CURSOR)
    assert await queue.replies(cursors, 1) == ([], {})
    for shard in shards[:2]:
        await queue.enqueue(shard, make_job())
        await JobClaims(worker_redis, shard, keys.random_id(), QueueSettings()).claim(1, ROOM, ROOM)
    items, moved = await queue.replies(cursors, 10)
    assert {keys.shard_of(item.generation_id) for item in items} == set(moved) == set(shards[:2])
    assert {item.kind for item in items} == {ItemKind.STARTED}


async def test_a_large_event_is_named_in_the_reply_and_read_from_the_log(queue: JobQueue, claims: JobClaims) -> None:
    accepted = await queue.enqueue(SHARD, make_job())
    generation_id = accepted.generation_id
    await claims.claim(1, ROOM, ROOM)
    await claims.commit([make_event(generation_id, (1,), text="x" * 5000)])
    await claims.commit([make_event(generation_id, (2,), first=1, text="y" * 5000, terminal=JobState.DONE)])
    items, _ = await queue.replies({SHARD: START_CURSOR}, 10)
    large = [item for item in items if item.sequence]
    assert [(item.sequence, item.kind, item.body) for item in large] == [
        (1, ItemKind.EVENT, None),
        (2, ItemKind.DONE, None),
    ]
    events = (await queue.read_log(generation_id, "acme")).events
    assert [event.chain_hash for event in events] == [item.chain_hash for item in large]
    assert [event.body.deltas[0].text[:1] for event in events if event.body] == ["x", "y"]


async def test_a_waiting_job_ends_at_its_deadline_without_any_worker(
    queue: JobQueue, superuser: redis_sync.Redis
) -> None:
    accepted = await queue.enqueue(SHARD, make_job())
    superuser.zadd(keys.deadlines(SHARD), {accepted.generation_id: 1})
    assert (await queue.sweep(SHARD)).expired == 1
    record = await queue.get(accepted.generation_id, "acme")
    assert (record.state, record.reason, record.started) == (JobState.EXPIRED, Reason.NEVER_STARTED, False)
    assert record.usage.prompt_tokens == 0  # nothing was computed
    items, _ = await queue.replies({SHARD: START_CURSOR}, 10)
    assert [item.kind for item in items] == [ItemKind.EXPIRED]


async def test_a_started_job_that_its_worker_forgot_ends_with_its_time_limit(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    accepted = await queue.enqueue(SHARD, make_job(time_limit_ms=1000))
    await run_to(claims, accepted.generation_id, 2)
    record = await queue.get(accepted.generation_id, "acme")
    score = superuser.zscore(keys.deadlines(SHARD), accepted.generation_id)
    assert score == record.deadline_ms + QueueSettings().deadline_slack_ms  # the worker's turn comes first
    superuser.zadd(keys.deadlines(SHARD), {accepted.generation_id: 1})
    await queue.sweep(SHARD)
    record = await queue.get(accepted.generation_id, "acme")
    assert (record.state, record.reason, record.usage.completion_tokens) == (JobState.EXPIRED, Reason.TIME_LIMIT, 2)


async def test_cancel_twice_and_after_the_end_is_the_same(queue: JobQueue, claims: JobClaims) -> None:
    accepted = await queue.enqueue(SHARD, make_job())
    first = await queue.cancel(accepted.generation_id, "acme")
    assert first == await queue.cancel(accepted.generation_id, None)
    assert (first.state, first.sequence) == (JobState.CANCELLED, 1)
    done = await queue.enqueue(SHARD, make_job())
    await run_to(claims, done.generation_id, 1, end=True)
    assert (await queue.cancel(done.generation_id, "acme")).state is JobState.DONE


async def test_usage_is_counted_by_key_and_tenant(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    accepted = await queue.enqueue(SHARD, make_job("a:b", key_id="K1", prompt=(1,) * 7))
    await claims.claim(1, ROOM, ROOM)
    event = make_event(accepted.generation_id, (1, 2, 3), terminal=JobState.DONE)
    cached = NewEvent(**{name: getattr(event, name) for name in event.__slots__} | {"cached_prompt_tokens": 4})
    await claims.commit([cached])
    (key,) = superuser.keys(f"{{{SHARD}}}:usage:*")
    assert superuser.hgetall(key) == {
        b"generations:K1:a:b": b"1",
        b"prompt_tokens:K1:a:b": b"7",
        b"cached_prompt_tokens:K1:a:b": b"4",
        b"completion_tokens:K1:a:b": b"3",
    }
    assert superuser.ttl(key) > 30 * 86400


async def test_another_programs_data_is_not_touched(queue: JobQueue, superuser: redis_sync.Redis) -> None:
    superuser.hset(keys.meta(SHARD), "schema", "99")
    with pytest.raises(BackendRefused):
        await queue.enqueue(SHARD, make_job())
    assert superuser.keys("*") == [keys.meta(SHARD).encode()]
