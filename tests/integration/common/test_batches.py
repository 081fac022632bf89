"""Batches as they are stored, on a real server: every item has one result, whoever writes it, and however often."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
import redis as redis_sync
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import keys
from common.batches import (
    MAKING_MS,
    Batches,
    BatchRecord,
    BatchState,
    LeaseLost,
    NewBatch,
    Outcome,
    Owner,
    Result,
    has_bit,
)
from common.embedded import EmbeddedServer
from common.errors import (
    BatchNotFound,
    IdempotencyKeyReused,
    ResourceExhausted,
    SealBroken,
    SequenceOutOfRange,
    Unavailable,
)
from common.grants import Grants
from common.redis import connect
from common.scripts import ScriptRunner
from common.sealing import MasterKeys, Sealer
from common.settings import RedisSettings
from tests.builders_common import FlakyRedis, mutate
from tests.integration.common.conftest import FAST_RETRY
from tests.integration.common.test_sealed_queue import everything

TENANT = "acme"
OWNER = Owner(TENANT, "k1", grants=Grants(models=("tiny",)))
LEASE_MS = 60_000
CANARY = b"zyx-canary-wvu"
MASTER_KEYS = MasterKeys({"k1": bytes(32)})


@pytest.fixture
def batches(gateway_redis: FlakyRedis) -> Batches:
    return Batches(gateway_redis, keys.random_id(), retry=FAST_RETRY)


@pytest.fixture
def others(gateway_redis: FlakyRedis) -> Batches:
    """The same, as another gateway sees them."""
    return Batches(gateway_redis, keys.random_id(), retry=FAST_RETRY)


def new(batch_id: str, total: int, **fields: object) -> NewBatch:
    known: dict[str, object] = {"owner": OWNER, "priority": 2, "max_batches": 100, "retention_ms": 5000}
    return NewBatch(**{"batch_id": batch_id, "total": total, "lifetime_ms": 100_000, **known, **fields})  # type: ignore[arg-type]


async def make(batches: Batches, total: int, **fields: object) -> BatchRecord:
    batch_id = keys.new_batch_id()
    await batches.append(TENANT, batch_id, 0, [b"item %d" % index for index in range(total)])
    record, _ = await batches.start(new(batch_id, total, **fields))
    return record


async def taken(batches: Batches, record: BatchRecord) -> BatchRecord:
    lease = await batches.take(TENANT, record.batch_id, LEASE_MS)
    assert lease is not None
    return lease.batch


def result(index: int, outcome: Outcome = Outcome.SUCCEEDED, by: str = "") -> Result:
    return Result(index, outcome, f"result {index}{by}".encode())


async def test_a_batch_is_what_was_made_of_it(batches: Batches, superuser: redis_sync.Redis) -> None:
    record = await make(batches, 3, display_name="näme")
    assert record == await batches.get(TENANT, record.batch_id)
    assert (record.owner, record.total, record.priority, record.display_name) == (OWNER, 3, 2, "näme")
    assert (record.state, record.num_results, record.num_running) == (BatchState.RUNNING, 0, 0)
    assert record.deadline_ms - record.created_ms == 100_000
    assert await batches.items(TENANT, record.batch_id, 1, 10) == [b"item 1", b"item 2"]
    assert await batches.due() == [(TENANT, record.batch_id)]


async def test_no_call_takes_effect_twice_when_its_reply_is_lost(batches: Batches, gateway_redis: FlakyRedis) -> None:
    batch_id = keys.new_batch_id()
    for first in (0, 2):
        gateway_redis.num_to_lose = 2
        await batches.append(TENANT, batch_id, first, [b"item %d" % index for index in (first, first + 1)])
    gateway_redis.num_to_lose = 2
    record, replayed = await batches.start(new(batch_id, 4, idempotency_key="k", request_digest=b"d"))
    assert not replayed
    assert await batches.items(TENANT, batch_id, 0, 10) == [b"item %d" % index for index in range(4)]
    batch = await taken(batches, record)
    gateway_redis.num_to_lose = 2
    assert await batches.finish(batch, [result(0), result(1)]) is BatchState.RUNNING
    assert [body for _, body in (await batches.results(TENANT, batch_id, 0))[1]] == [b"result 0", b"result 1"]
    gateway_redis.num_to_lose = 1
    with contextlib.suppress(LeaseLost):  # the batch had ended when it was asked again
        await batches.finish(batch, [result(2), result(3)])
    assert (await batches.get(TENANT, batch_id)).state is BatchState.DONE


async def test_items_that_are_gone_are_missed(batches: Batches, superuser: redis_sync.Redis) -> None:
    batch_id = keys.new_batch_id()
    await batches.append(TENANT, batch_id, 0, [b"item 0"])
    key = keys.batch(TENANT, batch_id) + ":items"
    assert 0 < superuser.pttl(key) <= MAKING_MS  # type: ignore[operator]
    superuser.delete(key)
    with pytest.raises(Unavailable, match="lost"):
        await batches.append(TENANT, batch_id, 1, [b"item 1"])
    with pytest.raises(Unavailable, match="lost"):
        await batches.start(new(batch_id, 1))
    with pytest.raises(BatchNotFound):
        await batches.get(TENANT, batch_id)
    assert await batches.take(TENANT, batch_id, LEASE_MS) is None
    assert superuser.keys("*") == []


async def test_a_batch_whose_maker_dies_on_the_way_is_found_or_forgotten(
    batches: Batches, gateway_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    made, unmade = keys.new_batch_id(), keys.new_batch_id()
    for batch_id in (made, unmade):
        await batches.append(TENANT, batch_id, 0, [b"item 0"])
        await batches.start(new(batch_id, 1))
        superuser.zadd(keys.ACTIVE_BATCHES, {f"{batch_id} {TENANT}": 1})
    superuser.delete(keys.batch(TENANT, unmade))  # as if it had come no further than its place on the list
    assert await batches.take(TENANT, made, LEASE_MS) is not None
    assert await batches.take(TENANT, unmade, LEASE_MS) is None
    assert superuser.zcard(keys.ACTIVE_BATCHES) == 2, "it may yet be made"
    superuser.delete(keys.batch(TENANT, unmade) + ":items")
    assert await batches.take(TENANT, unmade, LEASE_MS) is None
    assert superuser.zcard(keys.ACTIVE_BATCHES) == 1


async def test_an_idempotency_key_makes_one_batch(batches: Batches, superuser: redis_sync.Redis) -> None:
    first = await make(batches, 2, idempotency_key="k", request_digest=b"same\n \x00")
    assert await batches.earlier(TENANT, "k") == (first.batch_id, b"same\n \x00")
    batch_id = keys.new_batch_id()
    await batches.append(TENANT, batch_id, 0, [b"item 0"])
    again, replayed = await batches.start(new(batch_id, 1, idempotency_key="k", request_digest=b"same\n \x00"))
    assert (again.batch_id, replayed) == (first.batch_id, True)
    await batches.append(TENANT, batch_id, 0, [b"item 0"])
    with pytest.raises(IdempotencyKeyReused):
        await batches.start(new(batch_id, 1, idempotency_key="k", request_digest=b"other"))
    assert not superuser.exists(keys.batch(TENANT, batch_id) + ":items")
    assert [record.batch_id for record in await batches.all_of(TENANT)] == [first.batch_id]
    assert await batches.all_of("other") == []


async def test_a_tenant_has_so_many_and_those_that_expired_do_not_count(
    batches: Batches, superuser: redis_sync.Redis
) -> None:
    first = await make(batches, 1, max_batches=2)
    await make(batches, 1, max_batches=2)
    with pytest.raises(ResourceExhausted, match="2 batches"):
        await make(batches, 1, max_batches=2)
    superuser.delete(keys.batch(TENANT, first.batch_id))  # as its expiry does
    await make(batches, 1, max_batches=2)
    assert len(await batches.all_of(TENANT)) == 2
    assert superuser.zcard(keys.batches(TENANT)) == 2


async def test_one_gateway_at_a_time_feeds_a_batch(
    batches: Batches, others: Batches, superuser: redis_sync.Redis
) -> None:
    record = await make(batches, 4)
    mine = await taken(batches, record)
    assert await others.take(TENANT, record.batch_id, LEASE_MS) is None
    assert await others.due() == []
    lease = await batches.renew(mine, LEASE_MS, num_running=2, fed_below=3)
    assert (lease.batch.num_running, lease.batch.fed_below) == (2, 3)
    superuser.hset(keys.batch(TENANT, record.batch_id), "le", 1)  # as if its time had passed
    theirs = await others.take(TENANT, record.batch_id, LEASE_MS)
    assert theirs is not None
    assert (theirs.batch.epoch, theirs.batch.fed_below, theirs.done) == (2, 3, b"")
    for late in (
        batches.renew(mine, LEASE_MS, num_running=0, fed_below=0),
        batches.finish(mine, [result(0, by=" of the first")]),
    ):
        with pytest.raises(LeaseLost):
            await late
    await others.finish(theirs.batch, [result(0, by=" of the second"), result(3)])
    await others.renew(theirs.batch, 0, num_running=0, fed_below=0)  # given up
    back = await batches.take(TENANT, record.batch_id, LEASE_MS)
    assert back is not None
    assert [has_bit(back.done, index) for index in range(4)] == [True, False, False, True]
    assert (await batches.results(TENANT, record.batch_id, 0))[1] == [(0, b"result 0 of the second"), (3, b"result 3")]


async def test_an_ended_batch_keeps_its_results_for_its_retention_and_nothing_else(
    batches: Batches, superuser: redis_sync.Redis
) -> None:
    record = await make(batches, 2, idempotency_key="k", request_digest=b"d")
    batch = await taken(batches, record)
    await batches.finish(batch, [result(1)])
    key = keys.batch(TENANT, record.batch_id)
    for name in ("", ":items", ":results", ":done"):
        assert 5000 < superuser.pttl(key + name) <= 105_000  # type: ignore[operator]
    assert await batches.finish(batch, [result(0, Outcome.FAILED)]) is BatchState.DONE
    kept = {key, f"{key}:results", keys.batch_idempotency(TENANT, keys.idempotency_digest(TENANT, "k"))}
    left = {found.decode() for found in superuser.keys("*")}  # type: ignore[union-attr]
    assert left == kept | {keys.batches(TENANT)}
    for name in kept:
        assert 0 < superuser.pttl(name) <= 5000  # type: ignore[operator]
    ended = await batches.get(TENANT, record.batch_id)
    assert (ended.num_succeeded, ended.num_failed) == (1, 1)
    assert ended.expires_ms == ended.ended_ms + 5000
    for late in (batches.finish(batch, [result(0)]), batches.renew(batch, LEASE_MS, num_running=0, fed_below=0)):
        with pytest.raises(LeaseLost):
            await late


async def test_results_are_read_in_pages_behind_any_index(batches: Batches) -> None:
    record = await make(batches, 40)
    batch = await taken(batches, record)
    large = [Result(index, Outcome.SUCCEEDED, bytes([index]) * 300_000) for index in range(8)]
    await batches.finish(batch, [*large, *(result(index) for index in range(8, 40))])
    for after in (0, 3, 8, 39, 40):
        _, found = await batches.results(TENANT, record.batch_id, after, 20)
        assert [index for index, _ in found] == list(range(40))[after : after + len(found)]
        assert len(found) == {0: 3, 3: 3, 8: 20, 39: 1, 40: 0}[after], "a megabyte at a time"
    with pytest.raises(SequenceOutOfRange):
        await batches.results(TENANT, record.batch_id, 41)


async def test_cancelling_is_seen_by_the_feeder_and_ends_with_the_last_result(batches: Batches) -> None:
    record = await make(batches, 2)
    batch = await taken(batches, record)
    assert (await batches.cancel(TENANT, record.batch_id)).state is BatchState.CANCELLING
    lease = await batches.renew(batch, LEASE_MS, num_running=0, fed_below=0)
    assert lease.batch.state is BatchState.CANCELLING
    both = [result(0), result(1, Outcome.CANCELLED)]
    assert await batches.finish(batch, both) is BatchState.CANCELLED
    assert (await batches.cancel(TENANT, record.batch_id)).state is BatchState.CANCELLED
    with pytest.raises(BatchNotFound):
        await batches.cancel("other", record.batch_id)


async def test_a_deleted_batch_is_its_feeders_alone_until_it_is_erased(
    batches: Batches, superuser: redis_sync.Redis
) -> None:
    record = await make(batches, 2, idempotency_key="k", request_digest=b"d")
    batch = await taken(batches, record)
    await batches.finish(batch, [result(0)])
    await batches.delete(TENANT, record.batch_id)
    for gone in (
        batches.get(TENANT, record.batch_id),
        batches.results(TENANT, record.batch_id, 0),
        batches.cancel(TENANT, record.batch_id),
        batches.delete(TENANT, record.batch_id),
    ):
        with pytest.raises(BatchNotFound):
            await gone
    assert await batches.earlier(TENANT, "k") is None
    assert await batches.all_of(TENANT) == []
    assert (await batches.renew(batch, LEASE_MS, num_running=0, fed_below=0)).batch.is_deleted
    assert await batches.items(TENANT, record.batch_id, 0, 10) == [b"item 0", b"item 1"]
    with pytest.raises(LeaseLost):
        await batches.finish(batch, [result(1)])
    await batches.erase(batch)
    assert superuser.keys("*") == []


async def test_nothing_of_a_batch_lies_readable_in_the_server(
    gateway_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    sealer = Sealer(lambda: MASTER_KEYS, accept_plaintext=False)
    batches = Batches(gateway_redis, keys.random_id(), retry=FAST_RETRY, sealer=sealer)
    batch_id = keys.new_batch_id()
    await batches.append(TENANT, batch_id, 0, [CANARY + b"0", CANARY + b"1"])
    record, _ = await batches.start(new(batch_id, 2, display_name=CANARY.decode()))
    batch = await taken(batches, record)
    await batches.finish(batch, [Result(0, Outcome.SUCCEEDED, CANARY)])
    key = keys.batch(TENANT, batch_id)
    lists = b"".join(entry for name in ("items", "results") for entry in superuser.lrange(f"{key}:{name}", 0, -1))  # type: ignore[union-attr]
    assert CANARY not in everything(superuser) + lists
    assert record.display_name == CANARY.decode()
    assert await batches.items(TENANT, batch_id, 0, 2) == [CANARY + b"0", CANARY + b"1"]
    assert (await batches.results(TENANT, batch_id, 0))[1] == [(0, CANARY)]
    entries = superuser.lrange(f"{key}:items", 0, -1)
    superuser.lset(f"{key}:items", 0, entries[1])  # type: ignore[index]
    superuser.hset(key, "nm", entries[0])  # type: ignore[index]
    assert (await batches.get(TENANT, batch_id)).display_name == ""
    moved, whole = await batches.items(TENANT, batch_id, 0, 2)
    assert isinstance(moved, SealBroken)
    assert whole == CANARY + b"1"


# -- the law of the result log


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


NUM_ITEMS = 6
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("finish"),
            st.integers(0, 1),  # by which gateway, with the lease that it had last
            st.lists(st.integers(0, NUM_ITEMS - 1), min_size=1, max_size=4),
            st.integers(0, 2),  # replies that are lost
        ),
        st.tuples(st.just("take"), st.integers(0, 1), st.just([]), st.integers(0, 1)),
        st.tuples(st.sampled_from(("expire", "cancel")), st.integers(0, 1), st.just([]), st.integers(0, 1)),
    ),
    max_size=14,
)


async def play(redis: FlakyRedis, scripts: ScriptRunner, steps: list[tuple[str, int, list[int], int]]) -> None:
    """Two gateways feed a batch, losing replies and leases: the log is what a model says."""
    await redis.flushall()
    gateways = [Batches(redis, keys.random_id(), retry=FAST_RETRY, scripts=scripts) for _ in range(2)]
    record = await make(gateways[0], NUM_ITEMS)
    leases: list[BatchRecord | None] = [None, None]
    expected: list[tuple[int, bytes]] = []
    is_cancelled = False
    for number, (kind, who, indices, num_to_lose) in enumerate(steps):
        gateway = gateways[who]
        is_over = len(expected) == NUM_ITEMS
        if kind == "expire":  # as if the time of the lease had passed
            await redis.hset(keys.batch(TENANT, record.batch_id), "le", 1)
            continue
        redis.num_to_lose = num_to_lose
        if kind == "take":
            lease = await gateway.take(TENANT, record.batch_id, LEASE_MS)
            leases[who] = leases[who] if lease is None else lease.batch
            if lease is not None:
                done = {index for index, _ in expected}
                assert {index for index in range(NUM_ITEMS) if has_bit(lease.done, index)} == done
        elif kind == "cancel":
            await gateway.cancel(TENANT, record.batch_id)
            is_cancelled = is_cancelled or not is_over
        else:
            mine, theirs = leases[who], leases[1 - who]
            if mine is None:
                redis.num_to_lose = 0
                continue
            holds = theirs is None or mine.epoch > theirs.epoch
            written = [Result(index, Outcome.SUCCEEDED, b"%d by %d" % (index, number)) for index in indices]
            if holds and not is_over:
                for one in written:
                    if one.item_index not in {index for index, _ in expected}:
                        expected.append((one.item_index, one.body))
            try:
                await gateway.finish(mine, written)
                assert holds
                assert not is_over
            except LeaseLost:
                assert not holds or len(expected) == NUM_ITEMS
        redis.num_to_lose = 0
        found, results = await gateway.results(TENANT, record.batch_id, 0)
        assert results == expected
        assert found.num_results == len(expected)
        assert found.state.is_final == (len(expected) == NUM_ITEMS)
        assert (found.state in (BatchState.CANCELLING, BatchState.CANCELLED)) == is_cancelled


def played(
    server: EmbeddedServer,
    loop: asyncio.AbstractEventLoop,
    steps: list[tuple[str, int, list[int], int]],
    mutant: tuple[str, str, str] | None = None,
) -> None:
    async def once() -> None:
        settings_of_server = RedisSettings(url=server.url)
        plain = connect(settings_of_server)
        redis = FlakyRedis(connection_pool=plain.connection_pool)
        try:
            await play(redis, ScriptRunner(redis, mutate(*mutant) if mutant else None), steps)
        finally:
            await redis.aclose()
            await plain.aclose()

    loop.run_until_complete(once())


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_every_item_gets_one_result_the_first_of_whoever_holds_the_lease(
    server: EmbeddedServer,
    superuser_for_session: redis_sync.Redis,
    loop: asyncio.AbstractEventLoop,
    steps: list[tuple[str, int, list[int], int]],
) -> None:
    played(server, loop, steps)


FIRST_TAKES_AND_WRITES_TWICE = [("take", 0, [], 0), ("finish", 0, [0, 1], 1), ("finish", 0, [1, 2], 0)]


@pytest.mark.parametrize(
    ("mutant", "steps"),
    [
        (
            ("batch_result", "if call('GETBIT', B .. ':done', index) == 0 then -- mutant: once", "if true then"),
            FIRST_TAKES_AND_WRITES_TWICE,
        ),
        (
            ("batch_result", "if fields[2] ~= ARGV[1] then return { 'LOST' } end", ""),
            [("take", 1, [], 0), ("expire", 0, [], 0), ("take", 0, [], 0), ("finish", 1, [0], 0)],
        ),
        (
            ("batch_result", "call('SETBIT', B .. ':done', index, 1)", ""),
            FIRST_TAKES_AND_WRITES_TWICE,
        ),
    ],
)
def test_the_law_sees_each_guard_that_is_taken_out(
    server: EmbeddedServer,
    superuser_for_session: redis_sync.Redis,
    loop: asyncio.AbstractEventLoop,
    mutant: tuple[str, str, str],
    steps: list[tuple[str, int, list[int], int]],
) -> None:
    played(server, loop, steps)
    with pytest.raises(AssertionError):
        played(server, loop, steps, mutant)
