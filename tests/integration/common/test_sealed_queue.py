"""The queue with encryption: nothing that a caller or a model wrote lies readable in the server."""

from __future__ import annotations

from itertools import pairwise

import pytest
import redis as redis_sync

from common import keys
from common.dead_letters import DeadLetters, Outcome
from common.errors import SealBroken
from common.generation import EventBody, JobBody, OutputDelta, SamplingParams
from common.job_claims import JobClaims
from common.job_queue import START_CURSOR, JobQueue
from common.jobs import JobState, NewEvent, Reason
from common.records import open_item
from common.sealing import MasterKeys, Sealer
from common.settings import QueueSettings
from tests.builders_common import FlakyRedis, make_event, make_job
from tests.integration.common.calls import ROOM
from tests.integration.common.conftest import FAST_RETRY, SHARD

CANARY = "zyx-canary-wvu"
KEYS = MasterKeys({"k2": bytes(range(32)), "k1": bytes(32)})
SETTINGS = QueueSettings()


@pytest.fixture
def sealer() -> Sealer:
    return Sealer(lambda: KEYS, accept_plaintext=False)


@pytest.fixture
def queue(gateway_redis: FlakyRedis, sealer: Sealer) -> JobQueue:
    return JobQueue(gateway_redis, keys.random_id(), SETTINGS, retry=FAST_RETRY, sealer=sealer)


@pytest.fixture
def claims(worker_redis: FlakyRedis, sealer: Sealer) -> JobClaims:
    return JobClaims(worker_redis, SHARD, keys.random_id(), SETTINGS, retry=FAST_RETRY, sealer=sealer)


def sealed_job(**fields: object):  # type: ignore[no-untyped-def]
    job = make_job(**fields)  # type: ignore[arg-type]
    body = JobBody(prompt_token_ids=(7, 7, 7), sampling=SamplingParams(max_tokens=9, stop_strings=(CANARY,)))
    return type(job)(**{**{name: getattr(job, name) for name in job.__slots__}, "body": body, "echo": CANARY.encode()})


def everything(superuser: redis_sync.Redis) -> bytes:
    """All that the server holds, readable as it lies there."""
    found = []
    for key in superuser.keys("*"):  # type: ignore[union-attr]
        kind = superuser.type(key)
        if kind == b"hash":
            found += [part for pair in superuser.hgetall(key).items() for part in pair]  # type: ignore[union-attr]
        elif kind == b"stream":
            found += [part for _, fields in superuser.xrange(key) for pair in fields.items() for part in pair]  # type: ignore[union-attr]
        elif kind == b"string":
            found.append(superuser.get(key))
        elif kind == b"zset":
            found += superuser.zrange(key, 0, -1)  # type: ignore[operator]
    return b"|".join(found)  # type: ignore[arg-type]


async def test_a_generation_reads_as_it_was_written_and_the_server_cannot_read_it(
    queue: JobQueue, claims: JobClaims, sealer: Sealer, superuser: redis_sync.Redis
) -> None:
    accepted = await queue.enqueue(SHARD, sealed_job())
    await queue.heartbeat({SHARD: START_CURSOR})
    (job,) = await claims.claim(1, ROOM, ROOM)
    assert job.body.sampling.stop_strings == (CANARY,)
    body = EventBody((OutputDelta(0, 0, (1, 2), CANARY),))
    await claims.commit([NewEvent(generation_id=job.generation_id, body=body, completion_tokens=2)])
    items, _ = await queue.replies({SHARD: START_CURSOR}, 10)
    opener = sealer.of("acme", accepted.generation_id)
    assert body in [open_item(item, opener).body for item in items]
    end = NewEvent(generation_id=job.generation_id, body=EventBody(), completion_tokens=2, terminal=JobState.DONE)
    await claims.commit([end])
    found = await queue.attach(accepted.generation_id, "acme")
    assert [event.body for event in found.events] == [body, EventBody()]
    assert found.record.echo == CANARY.encode()
    assert (await queue.get(accepted.generation_id, "acme")).echo == CANARY.encode()
    assert CANARY.encode() not in everything(superuser)


async def test_another_worker_goes_on_with_what_the_first_has_sealed(
    queue: JobQueue, claims: JobClaims, worker_redis: FlakyRedis, sealer: Sealer
) -> None:
    accepted = await queue.enqueue(SHARD, sealed_job())
    await claims.claim(1, ROOM, ROOM)
    await claims.commit([make_event(accepted.generation_id, (1, 2), text=CANARY)])
    await claims.release([accepted.generation_id])
    other = JobClaims(worker_redis, SHARD, keys.random_id(), SETTINGS, retry=FAST_RETRY, sealer=sealer)
    (job,) = await other.claim(1, ROOM, ROOM)
    assert [event.body for event in job.events] == [EventBody((OutputDelta(0, 0, (1, 2), CANARY),))]


async def test_a_body_that_was_exchanged_for_another_fails_alone_and_nothing_is_computed(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    first, second, third = [await queue.enqueue(SHARD, sealed_job()) for _ in range(3)]
    names = [keys.job(SHARD, one.generation_id) for one in (first, second)]
    bodies = [superuser.hget(name, "b") for name in names]
    for name, body in zip(names, reversed(bodies), strict=True):
        superuser.hset(name, "b", body)  # type: ignore[arg-type]
    jobs = await claims.claim(3, ROOM, ROOM)
    assert [job.generation_id for job in jobs] == [third.generation_id]
    for exchanged in (first, second):
        record = await queue.get(exchanged.generation_id, "acme")
        assert (record.state, record.reason) == (JobState.FAILED, Reason.WORKER_FAILED)
    assert claims.held == {third.generation_id}


async def test_the_end_of_an_unreadable_job_is_sent_again_when_its_reply_was_lost(
    queue: JobQueue, claims: JobClaims, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    accepted = await queue.enqueue(SHARD, sealed_job())
    superuser.hset(keys.job(SHARD, accepted.generation_id), "b", b"\xc1nothing")
    assert await claims.claim(1, ROOM, ROOM) == []
    await claims.commit([])
    assert (await queue.get(accepted.generation_id, "acme")).state is JobState.FAILED
    assert claims.held == frozenset()


async def test_a_dead_letter_is_sent_again_under_its_new_name(
    queue: JobQueue, claims: JobClaims, gateway_redis: FlakyRedis, sealer: Sealer
) -> None:
    accepted = await queue.enqueue(SHARD, sealed_job())
    await claims.claim(1, ROOM, ROOM)
    failed = make_event(accepted.generation_id, (), terminal=JobState.FAILED, reason=Reason.WORKER_FAILED)
    await claims.commit([failed])
    letters = DeadLetters(gateway_redis, SETTINGS, retry=FAST_RETRY, sealer=sealer)
    (result,) = await letters.retry([accepted.generation_id])
    assert result.outcome is Outcome.RETRIED
    (job,) = await claims.claim(1, ROOM, ROOM)
    assert (job.generation_id, job.body.sampling.stop_strings) == (result.new_generation_id, (CANARY,))
    assert (await queue.get(result.new_generation_id, "acme")).echo == CANARY.encode()
    assert (await letters.retry([keys.new_generation_id(SHARD)]))[0].outcome is Outcome.NOT_FOUND


async def test_what_is_plain_is_not_believed(
    queue: JobQueue, gateway_redis: FlakyRedis, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    plain = JobQueue(gateway_redis, keys.random_id(), SETTINGS, retry=FAST_RETRY)
    accepted = await plain.enqueue(SHARD, sealed_job())
    assert CANARY.encode() in everything(superuser)
    assert await claims.claim(1, ROOM, ROOM) == []
    with pytest.raises(SealBroken):
        await queue.get(accepted.generation_id, "acme")
    assert (await queue.list_inflight(SHARD))[0].state is JobState.QUEUED


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def worker(redis: FlakyRedis, sealer: Sealer, clock: Clock | None = None) -> JobClaims:
    settings = QueueSettings(max_claims=2)
    return JobClaims(
        redis, SHARD, keys.random_id(), settings, retry=FAST_RETRY, sealer=sealer, monotonic=clock or Clock()
    )


@pytest.mark.parametrize(
    "keyless",
    [Sealer(), Sealer(lambda: MasterKeys({"k0": bytes(32)}), accept_plaintext=True)],
    ids=["no keys", "another key"],
)
async def test_a_worker_without_the_key_gives_every_job_back_and_pauses(
    queue: JobQueue, claims: JobClaims, worker_redis: FlakyRedis, keyless: Sealer, superuser: redis_sync.Redis
) -> None:
    accepted = {(await queue.enqueue(SHARD, sealed_job())).generation_id for _ in range(3)}
    clock = Clock()
    unable = worker(worker_redis, keyless, clock)
    for pause_s in (5.0, 10.0, 20.0, 40.0, 60.0, 60.0):  # more often than a job may be claimed
        assert await unable.claim(3, ROOM, ROOM) == []
        assert (unable.held, unable.is_paused) == (frozenset(), True)
        before = superuser.info("commandstats")["cmdstat_evalsha"]["calls"]  # type: ignore[index]
        clock.now_s += pause_s - 1
        assert await unable.claim(3, ROOM, ROOM) == []
        assert superuser.info("commandstats")["cmdstat_evalsha"]["calls"] == before  # type: ignore[index]
        clock.now_s += 1
        assert not unable.is_paused
    for generation_id in accepted:
        record = await queue.get(generation_id, "acme")
        assert (record.state, record.attempts, record.num_claims) == (JobState.QUEUED, 0, 0)
    assert superuser.llen(keys.bell(SHARD))  # another worker is rung for
    assert {job.generation_id for job in await claims.claim(3, ROOM, ROOM)} == accepted


async def test_a_worker_that_takes_no_plain_records_leaves_them_to_one_that_does(
    gateway_redis: FlakyRedis, claims: JobClaims, worker_redis: FlakyRedis
) -> None:
    plain = JobQueue(gateway_redis, keys.random_id(), SETTINGS, retry=FAST_RETRY)
    accepted = await plain.enqueue(SHARD, sealed_job())
    assert await claims.claim(1, ROOM, ROOM) == []
    able = worker(worker_redis, Sealer(lambda: KEYS, accept_plaintext=True))
    assert [job.generation_id for job in await able.claim(1, ROOM, ROOM)] == [accepted.generation_id]


async def test_what_was_only_given_back_counts_as_never_started_and_costs_its_tenant_nothing(
    queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    accepted = await queue.enqueue(SHARD, sealed_job())
    charged = superuser.zscore(f"{{{SHARD}}}:vtc", "acme")
    assert await worker(worker_redis, Sealer()).claim(1, ROOM, ROOM) == []
    assert (await queue.get(accepted.generation_id, "acme")).started_ms in (None, 0)
    credit = float(superuser.hget(f"{{{SHARD}}}:credit", "acme") or 0)  # type: ignore[arg-type]
    assert superuser.zscore(f"{{{SHARD}}}:vtc", "acme") - credit == charged  # type: ignore[operator]
    superuser.hset(keys.job(SHARD, accepted.generation_id), "dl", 1)
    superuser.zadd(f"{{{SHARD}}}:dl", {accepted.generation_id: 1})
    await queue.sweep(SHARD)
    record = await queue.get(accepted.generation_id, "acme")
    assert (record.state, record.reason, record.usage.prompt_tokens) == (JobState.EXPIRED, Reason.NEVER_STARTED, 0)


async def test_a_claim_that_goes_back_leaves_the_earlier_ones_counted(
    queue: JobQueue, claims: JobClaims, worker_redis: FlakyRedis
) -> None:
    accepted = await queue.enqueue(SHARD, sealed_job())
    await claims.claim(1, ROOM, ROOM)
    await claims.commit([make_event(accepted.generation_id, (1, 2), text=CANARY)])
    await claims.release([accepted.generation_id])
    before = await queue.get(accepted.generation_id, "acme")
    assert await worker(worker_redis, Sealer()).claim(1, ROOM, ROOM) == []
    after = await queue.get(accepted.generation_id, "acme")
    assert (after.num_claims, after.attempts, after.started_ms) == (1, 0, before.started_ms)
    assert after.started_ms


async def test_what_opens_is_computed_while_the_rest_goes_back(
    queue: JobQueue, gateway_redis: FlakyRedis, worker_redis: FlakyRedis
) -> None:
    plain = JobQueue(gateway_redis, keys.random_id(), SETTINGS, retry=FAST_RETRY)
    sealed = await queue.enqueue(SHARD, sealed_job())
    readable = await plain.enqueue(SHARD, sealed_job())
    unable = worker(worker_redis, Sealer())
    assert [job.generation_id for job in await unable.claim(2, ROOM, ROOM)] == [readable.generation_id]
    assert (unable.held, unable.is_paused) == ({readable.generation_id}, True)
    await unable.commit([make_event(readable.generation_id, (), terminal=JobState.DONE)])
    assert (await queue.get(sealed.generation_id, "acme")).state is JobState.QUEUED


async def test_a_job_that_could_not_be_given_back_is_found_again_and_given_back(
    queue: JobQueue, worker_redis: FlakyRedis, gateway_redis: FlakyRedis, sealer: Sealer
) -> None:
    accepted = await queue.enqueue(SHARD, sealed_job())
    # The keyless worker's claim took effect, its reply was lost.
    taker = worker(worker_redis, sealer)
    await taker.claim(1, ROOM, ROOM)
    again = JobClaims(worker_redis, SHARD, taker.worker_id, SETTINGS, retry=FAST_RETRY, sealer=Sealer())
    assert await again.owned() == []
    assert (again.held, again.is_paused) == (frozenset(), True)
    record = await queue.get(accepted.generation_id, "acme")
    assert (record.state, record.num_claims) == (JobState.QUEUED, 0)


# -- encryption is switched on while the fleet runs: at each step some processes are still at the one before

STEPS = {
    "no keys": Sealer,
    "keys, seal=false": lambda: Sealer(lambda: KEYS, seal=False, accept_plaintext=True),
    "seal=true": lambda: Sealer(lambda: KEYS, accept_plaintext=True),
    "accept_plaintext=false": lambda: Sealer(lambda: KEYS, accept_plaintext=False),
}
NEXT_TO_EACH_OTHER = [pair for one, two in pairwise(STEPS) for pair in ((one, two), (two, one))]


@pytest.mark.parametrize(("gateway_step", "worker_step"), NEXT_TO_EACH_OTHER)
async def test_processes_a_step_apart_serve_each_other(
    gateway_redis: FlakyRedis, worker_redis: FlakyRedis, gateway_step: str, worker_step: str
) -> None:
    here, there = STEPS[gateway_step](), STEPS[worker_step]()
    queue, other = (
        JobQueue(gateway_redis, keys.random_id(), SETTINGS, retry=FAST_RETRY, sealer=sealer) for sealer in (here, there)
    )
    first = await queue.enqueue(SHARD, sealed_job())
    claims, successor = worker(worker_redis, there), worker(worker_redis, here)
    (job,) = await claims.claim(1, ROOM, ROOM)
    assert job.body.sampling.stop_strings == (CANARY,)
    await claims.commit([make_event(first.generation_id, (1, 2), text=CANARY)])
    await claims.release([first.generation_id])
    (job,) = await successor.claim(1, ROOM, ROOM)
    body = EventBody((OutputDelta(0, 0, (1, 2), CANARY),))
    assert [event.body for event in job.events] == [body]
    await successor.commit([make_event(first.generation_id, (), terminal=JobState.FAILED, reason=Reason.WORKER_FAILED)])
    for reader in (queue, other):
        found = await reader.attach(first.generation_id, "acme")
        assert (found.events[0].body, found.record.echo) == (body, CANARY.encode())
        assert (await reader.get(first.generation_id, "acme")).echo == CANARY.encode()
    letters = DeadLetters(gateway_redis, SETTINGS, retry=FAST_RETRY, sealer=there)
    (result,) = await letters.retry([first.generation_id])
    assert result.outcome is Outcome.RETRIED
    (job,) = await worker(worker_redis, here).claim(1, ROOM, ROOM)
    assert job.body.sampling.stop_strings == (CANARY,)
    assert (await queue.get(result.new_generation_id, "acme")).echo == CANARY.encode()


async def test_nothing_is_sealed_before_sealing_is_switched_on(
    gateway_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    for step, sealer in STEPS.items():
        superuser.flushdb()
        queue = JobQueue(gateway_redis, keys.random_id(), SETTINGS, retry=FAST_RETRY, sealer=sealer())
        await queue.enqueue(SHARD, sealed_job())
        assert (CANARY.encode() in everything(superuser)) == (step in ("no keys", "keys, seal=false"))


async def test_letters_that_do_not_open_stay_and_hold_no_other_up(
    queue: JobQueue, gateway_redis: FlakyRedis, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    ids = [(await queue.enqueue(SHARD, sealed_job())).generation_id for _ in range(3)]
    await claims.claim(3, ROOM, ROOM)
    failed = {"terminal": JobState.FAILED, "reason": Reason.WORKER_FAILED}
    await claims.commit([make_event(name, (), **failed) for name in ids])  # type: ignore[arg-type]
    superuser.hset(keys.job(SHARD, ids[1]), "b", b"\xc1nothing")
    letters = DeadLetters(
        gateway_redis, SETTINGS, retry=FAST_RETRY, sealer=Sealer(lambda: KEYS, accept_plaintext=False)
    )
    outcomes = [result.outcome for result in await letters.retry(ids)]
    assert outcomes == [Outcome.RETRIED, Outcome.UNREADABLE, Outcome.RETRIED]
    assert [record.generation_id for record in (await letters.newest([SHARD], 9))[0]] == [ids[1]]
    keyless = DeadLetters(gateway_redis, SETTINGS, retry=FAST_RETRY)
    assert [result.outcome for result in await keyless.retry(ids[1:2])] == [Outcome.UNREADABLE]


async def test_a_gateway_without_the_key_says_so(queue: JobQueue, gateway_redis: FlakyRedis) -> None:
    accepted = await queue.enqueue(SHARD, sealed_job())
    keyless = JobQueue(gateway_redis, keys.random_id(), SETTINGS, retry=FAST_RETRY)
    with pytest.raises(SealBroken) as missing:
        await keyless.get(accepted.generation_id, "acme")
    assert missing.value.reason == "ENCRYPTION_KEY_MISSING"
