"""Rates and the day's tokens, on a real server: never more than was granted, and what was not used comes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest
import redis as redis_sync
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import keys
from common.dead_letters import DeadLetters
from common.embedded import EmbeddedServer
from common.errors import InvalidRequest, QueueFull, QuotaExceeded, RateLimited
from common.grants import Quotas
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import JobState, Reason
from common.quotas import QuotaMeter, Reservation
from common.redis import connect
from common.scripts import ScriptRunner
from common.settings import QueueSettings, RedisSettings
from tests.builders_common import FlakyRedis, make_event, make_job, mutate
from tests.integration.common.calls import ROOM
from tests.integration.common.conftest import FAST_RETRY, SHARD

LIFETIME_MS = 60_000
NONE = Quotas()
Meters = Callable[[], QuotaMeter]


@pytest.fixture
def meter(gateway_redis: FlakyRedis) -> QuotaMeter:
    return QuotaMeter(gateway_redis, LIFETIME_MS, retry=FAST_RETRY)


def wanted(number: int, num_tokens: int = 10, *, key: str = "k1", tenant: str = "acme") -> Reservation:
    return Reservation(tenant, key, f"g{number}", num_tokens)


async def admitted(meter: QuotaMeter, numbers: range, of_tenant: Quotas, of_key: Quotas, **fields: str) -> int:
    count = 0
    for number in numbers:
        try:
            await meter.reserve(wanted(number, **fields), of_tenant, of_key)  # type: ignore[arg-type]
            count += 1
        except RateLimited:
            pass
    return count


def later(superuser: redis_sync.Redis, milliseconds: float, tenant: str = "acme") -> None:
    """As if so much time had passed for the rates of a tenant."""
    key = keys.quota(tenant)
    for field, drained in superuser.hgetall(key).items():  # type: ignore[union-attr]
        superuser.hset(key, field, float(drained) - milliseconds)  # type: ignore[arg-type]


@pytest.mark.parametrize("of", ["tenant", "key"])
async def test_a_minutes_worth_comes_at_once_and_no_more(of: str, meter: QuotaMeter) -> None:
    quotas = Quotas(tokens_per_minute=100)
    of_tenant, of_key = (quotas, NONE) if of == "tenant" else (NONE, quotas)
    assert await admitted(meter, range(30), of_tenant, of_key) == 10
    with pytest.raises(RateLimited) as limited:
        await meter.reserve(wanted(99), of_tenant, of_key)
    assert limited.value.subject == f"{of}:tokens_per_minute"
    assert limited.value.metadata == {"subject": f"{of}:tokens_per_minute", "limit": "100"}
    assert limited.value.retry_after_ms is not None
    assert 5000 < limited.value.retry_after_ms <= 6000, "ten of a hundred tokens a minute"


async def test_the_time_to_wait_is_exact(meter: QuotaMeter, superuser: redis_sync.Redis) -> None:
    quotas = Quotas(requests_per_minute=6)
    assert await admitted(meter, range(10), NONE, quotas) == 6
    with pytest.raises(RateLimited) as limited:
        await meter.reserve(wanted(10), NONE, quotas)
    wait_ms = limited.value.retry_after_ms
    assert wait_ms is not None
    later(superuser, wait_ms - 1000)
    with pytest.raises(RateLimited) as limited:
        await meter.reserve(wanted(11), NONE, quotas)
    assert limited.value.retry_after_ms is not None
    assert limited.value.retry_after_ms <= 1000
    later(superuser, limited.value.retry_after_ms)
    await meter.reserve(wanted(12), NONE, quotas)


async def test_what_one_quota_refuses_is_counted_in_none(meter: QuotaMeter) -> None:
    of_tenant, of_key = Quotas(tokens_per_minute=100, tokens_per_day=200), Quotas(requests_per_minute=1)
    assert await admitted(meter, range(5), of_tenant, of_key) == 1
    assert await admitted(meter, range(5, 30), of_tenant, NONE, key="k2") == 9, "refused ones cost the tenant nothing"


async def test_keys_and_tenants_do_not_pay_for_each_other(meter: QuotaMeter) -> None:
    quotas = Quotas(requests_per_minute=2)
    assert await admitted(meter, range(5), NONE, quotas, key="k1") == 2
    assert await admitted(meter, range(5, 10), NONE, quotas, key="k2") == 2
    assert await admitted(meter, range(10, 15), NONE, quotas, key="k1", tenant="other") == 2


async def test_a_repeat_is_counted_once(meter: QuotaMeter, gateway_redis: FlakyRedis) -> None:
    quotas = Quotas(requests_per_minute=2)
    gateway_redis.num_to_lose = 1  # executed, and sent again
    await meter.reserve(wanted(1), NONE, quotas)
    await meter.reserve(wanted(1), NONE, quotas)
    await meter.reserve(wanted(2), NONE, quotas)
    with pytest.raises(RateLimited):
        await meter.reserve(wanted(3), NONE, quotas)


async def test_racing_gateways_admit_no_more_than_one_would(gateway_redis: FlakyRedis) -> None:
    meters = [QuotaMeter(gateway_redis, LIFETIME_MS, retry=FAST_RETRY) for _ in range(2)]
    quotas = Quotas(tokens_per_minute=500)
    counts = await asyncio.gather(*(admitted(m, range(i, 200, 2), quotas, quotas) for i, m in enumerate(meters)))
    assert sum(counts) == 50


async def test_what_was_not_used_is_given_back_once(meter: QuotaMeter) -> None:
    quotas = Quotas(tokens_per_minute=100, tokens_per_day=150)
    await meter.reserve(wanted(1, 100), quotas, quotas)
    assert await meter.settle("acme", [("g1", 30)]) == 1
    assert await meter.settle("acme", [("g1", 30)]) == 0
    await meter.reserve(wanted(2, 70), quotas, quotas)
    with pytest.raises(RateLimited):
        await meter.reserve(wanted(3, 10), quotas, quotas)


async def test_a_request_that_did_not_begin_is_given_back_whole(meter: QuotaMeter) -> None:
    quotas = Quotas(requests_per_minute=1, tokens_per_day=10)
    for number in range(5):
        await meter.reserve(wanted(number), quotas, quotas)
        await meter.release("acme", f"g{number}")
    await meter.reserve(wanted(9), quotas, quotas)
    with pytest.raises((RateLimited, QuotaExceeded)):
        await meter.reserve(wanted(10), quotas, quotas)


async def test_giving_back_never_earns_more_than_a_minutes_worth(
    meter: QuotaMeter, superuser: redis_sync.Redis
) -> None:
    quotas = Quotas(tokens_per_minute=100)
    await meter.reserve(wanted(1, 100), NONE, quotas)
    later(superuser, 120_000)
    await meter.settle("acme", [("g1", 0)])
    assert await admitted(meter, range(2, 40), NONE, quotas) == 10


async def test_what_has_drained_is_not_given_back(meter: QuotaMeter, superuser: redis_sync.Redis) -> None:
    """Long-queued generations that are cancelled one after another between new ones must not open the gate."""
    assert await _admitted_between_old_ends(meter, superuser) == 100


async def test_giving_back_what_has_drained_is_found(gateway_redis: FlakyRedis, superuser: redis_sync.Redis) -> None:
    least = "math.min(amount * WINDOW_MS / limit, drains_at - moved - now)"
    scripts = ScriptRunner(gateway_redis, mutate("quota_settle", least, "amount * WINDOW_MS / limit"))
    broken = QuotaMeter(gateway_redis, LIFETIME_MS, retry=FAST_RETRY, scripts=scripts)
    assert await _admitted_between_old_ends(broken, superuser) > 300


async def _admitted_between_old_ends(meter: QuotaMeter, superuser: redis_sync.Redis) -> int:
    quotas = Quotas(tokens_per_minute=100)
    for number in range(5):
        await meter.reserve(wanted(number, 100), NONE, quotas)
        later_by(superuser, 65_000)
    total = 0
    for number in range(5):
        total += 10 * await admitted(meter, range(100 + 20 * number, 120 + 20 * number), NONE, quotas)
        await meter.settle("acme", [(f"g{number}", 0)])
    return total + 10 * await admitted(meter, range(300, 320), NONE, quotas)


def later_by(superuser: redis_sync.Redis, milliseconds: float) -> None:
    """As if so much time had passed for a tenant's rates and for what it has reserved."""
    later(superuser, milliseconds)
    for key in superuser.keys("{t:acme}:r:*"):  # type: ignore[union-attr]
        words = superuser.get(key).split()  # type: ignore[union-attr]
        for at in range(9, len(words), 2):
            if words[at] != b"0":
                words[at] = b"%.3f" % (float(words[at]) - milliseconds)
        superuser.set(key, b" ".join(words), keepttl=True)


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_order_of_asking_and_giving_back_admits_more_than_drains(
    server: EmbeddedServer, data: st.DataObject
) -> None:
    """Admitted in any time and not given back: at most a minute's worth, and what drains in that time."""
    assert asyncio.run(_most_over_the_law(server, data)) <= 0


async def _most_over_the_law(server: EmbeddedServer, data: st.DataObject) -> float:
    """Ask and give back at random; return by how many tokens a window's law is broken, at most 0 if none is."""
    redis = connect(RedisSettings(url=server.url))
    superuser = redis_sync.Redis(unix_socket_path=str(server.socket_path))
    try:
        superuser.flushall()
        meter, quotas = QuotaMeter(redis, LIFETIME_MS, retry=FAST_RETRY), Quotas(tokens_per_minute=600)
        admitted_at: dict[int, float] = {}
        counted: dict[int, int] = {}  # by reservation: what it reserves, or what it has used
        open_ones: set[int] = set()
        now_ms, worst = 0.0, -600.0
        for number in range(data.draw(st.integers(3, 12))):
            match data.draw(st.sampled_from(("ask", "ask", "give", "wait"))):
                case "ask":
                    tokens = data.draw(st.sampled_from((100, 300, 600)))
                    with contextlib.suppress(RateLimited):
                        await meter.reserve(wanted(number, tokens), NONE, quotas)
                        admitted_at[number], counted[number] = now_ms, tokens
                        open_ones.add(number)
                case "give" if open_ones:
                    chosen = data.draw(st.sampled_from(sorted(open_ones)))
                    open_ones.remove(chosen)
                    counted[chosen] = data.draw(st.sampled_from((0, counted[chosen] // 2, counted[chosen])))
                    await meter.settle("acme", [(f"g{chosen}", counted[chosen])])
                case _:
                    wait_ms = data.draw(st.sampled_from((5000, 20_000, 70_000)))
                    later_by(superuser, wait_ms)
                    now_ms += wait_ms
            for start in set(admitted_at.values()):
                inside = sum(counted[one] for one, at in admitted_at.items() if at >= start)
                # Real time passes too, seconds in all at most: fifty tokens.
                worst = max(worst, inside - 600 - (now_ms - start) / 100 - 50)
        return worst
    finally:
        superuser.close()
        await redis.aclose()


async def test_a_server_s_clock_that_goes_back_locks_nobody_out(meter: QuotaMeter, superuser: redis_sync.Redis) -> None:
    quotas = Quotas(tokens_per_minute=100)
    await meter.reserve(wanted(1, 100), NONE, quotas)
    later(superuser, -3_600_000)
    with pytest.raises(RateLimited) as limited:
        await meter.reserve(wanted(2, 100), NONE, quotas)
    assert limited.value.retry_after_ms is not None
    assert limited.value.retry_after_ms <= 60_000


async def test_the_days_tokens_end_and_no_wait_is_named(meter: QuotaMeter) -> None:
    quotas = Quotas(tokens_per_day=25)
    await meter.reserve(wanted(1), quotas, NONE)
    await meter.reserve(wanted(2), quotas, NONE)
    with pytest.raises(QuotaExceeded) as spent:
        await meter.reserve(wanted(3), quotas, NONE)
    assert spent.value.retry_after_ms is None
    assert spent.value.subject == "tenant:tokens_per_day"
    await meter.settle("acme", [("g1", 4)])
    await meter.reserve(wanted(4), quotas, NONE)


@pytest.mark.parametrize("quotas", [Quotas(tokens_per_minute=9), Quotas(tokens_per_day=9)], ids=["minute", "day"])
async def test_what_no_wait_would_help_is_refused_for_good(quotas: Quotas, meter: QuotaMeter) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await meter.reserve(wanted(1), NONE, quotas)
    assert (refused.value.reason, refused.value.metadata["limit"]) == ("REQUEST_TOO_LARGE", "9")


async def test_everything_that_a_quota_stores_expires(meter: QuotaMeter, superuser: redis_sync.Redis) -> None:
    quotas = Quotas(requests_per_minute=5, tokens_per_minute=100, tokens_per_day=100)
    await meter.reserve(wanted(1), quotas, quotas)
    stored = superuser.keys("{t:*")
    assert len(stored) == 3  # type: ignore[arg-type]
    assert all(superuser.pttl(key) > 0 for key in stored)  # type: ignore[operator,union-attr]


async def test_a_rate_that_is_not_compared_is_found(gateway_redis: FlakyRedis) -> None:
    overrides = mutate("quota_reserve", "if late > 0.001 and late > wait then", "if false then")
    broken = QuotaMeter(gateway_redis, LIFETIME_MS, retry=FAST_RETRY, scripts=ScriptRunner(gateway_redis, overrides))
    assert await admitted(broken, range(30), NONE, Quotas(tokens_per_minute=100)) == 30


# -- the end of a generation, and caps in number


async def test_the_end_of_a_generation_leaves_word_of_what_it_used(queue: JobQueue, claims: JobClaims) -> None:
    done, cancelled, unmetered = [
        await queue.enqueue(SHARD, make_job(has_reservation=reserved)) for reserved in (True, True, False)
    ]
    await claims.claim(1, ROOM, ROOM)
    await claims.commit([make_event(done.generation_id, (1, 2), terminal=JobState.DONE)])
    await queue.cancel(cancelled.generation_id, "acme")
    await queue.cancel(unmetered.generation_id, "acme")
    found = await queue.settlements(SHARD)
    assert {(one.generation_id, one.used_tokens, one.tenant) for one in found} == {
        (done.generation_id, 3 + 2, "acme"),
        (cancelled.generation_id, 0, "acme"),
    }
    await queue.forget_settlements(SHARD, found[:1])
    assert await queue.settlements(SHARD) == found[1:]


async def test_caps_of_a_key_count_its_own_jobs_alone(queue: JobQueue, claims: JobClaims) -> None:
    capped = {"quota_id": "k1", "max_queued_of_key": 2, "max_live_of_key": 3}
    first, second = [await queue.enqueue(SHARD, make_job(**capped)) for _ in range(2)]
    with pytest.raises(QueueFull) as full:
        await queue.enqueue(SHARD, make_job(**capped))
    assert full.value.reason == "KEY_QUEUE_FULL"
    await queue.enqueue(SHARD, make_job(**{**capped, "quota_id": "k2"}))
    await queue.enqueue(SHARD, make_job())
    assert await claims.claim(1, ROOM, ROOM)
    third = await queue.enqueue(SHARD, make_job(**capped))
    await claims.claim(9, ROOM, ROOM)
    with pytest.raises(QueueFull) as full:
        await queue.enqueue(SHARD, make_job(**capped))
    assert full.value.reason == "KEY_CONCURRENCY"
    for accepted in (first, second, third):
        await queue.cancel(accepted.generation_id, "acme")
    assert not (await queue.enqueue(SHARD, make_job(**capped))).duplicate


async def test_a_released_job_counts_as_queued_again(queue: JobQueue, claims: JobClaims) -> None:
    capped = {"quota_id": "k1", "max_queued_of_key": 1}
    accepted = await queue.enqueue(SHARD, make_job(**capped))
    await claims.claim(1, ROOM, ROOM)
    await claims.release([accepted.generation_id])
    with pytest.raises(QueueFull):
        await queue.enqueue(SHARD, make_job(**capped))


async def test_a_tenants_own_caps_are_tighter_than_the_queues(queue: JobQueue) -> None:
    await queue.enqueue(SHARD, make_job(max_queued=1))
    with pytest.raises(QueueFull) as full:
        await queue.enqueue(SHARD, make_job(max_queued=1))
    assert full.value.reason == "TENANT_QUEUE_FULL"
    with pytest.raises(QueueFull) as full:
        await queue.enqueue(SHARD, make_job(max_live=1))
    assert full.value.reason == "TENANT_CONCURRENCY"


async def test_a_tenants_results_are_kept_for_less_time_if_it_says_so_and_never_for_more(
    queue: JobQueue, superuser: redis_sync.Redis
) -> None:
    for wanted_ms, most_ms in ((60_000, 60_000), (None, 3_600_000), (10**9, 3_600_000)):
        accepted = await queue.enqueue(SHARD, make_job(retention_ms=wanted_ms))
        await queue.cancel(accepted.generation_id, "acme")
        for key in (keys.job(SHARD, accepted.generation_id), keys.job_log(SHARD, accepted.generation_id)):
            assert most_ms - 10_000 < superuser.pttl(key) <= most_ms  # type: ignore[operator]


async def test_counts_that_no_job_stands_behind_lock_no_key_out(queue: JobQueue, superuser: redis_sync.Redis) -> None:
    """Programs that do not know of them end jobs without counting down."""
    superuser.hset(f"{{{SHARD}}}:kl", "k1", 2)
    superuser.hset(f"{{{SHARD}}}:kq", "k1", 2)
    capped = {"quota_id": "k1", "max_queued_of_key": 1, "max_live_of_key": 2}
    await queue.enqueue(SHARD, make_job(**capped))
    with pytest.raises(QueueFull):
        await queue.enqueue(SHARD, make_job(**capped))


# -- erasing


async def test_erasing_a_dead_letter_erases_what_a_retry_made_of_it(
    queue: JobQueue, claims: JobClaims, gateway_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    accepted = await queue.enqueue(SHARD, make_job())
    await claims.claim(1, ROOM, ROOM)
    failed = make_event(accepted.generation_id, (), terminal=JobState.FAILED, reason=Reason.WORKER_FAILED)
    await claims.commit([failed])
    (retried,) = await DeadLetters(gateway_redis, QueueSettings(), retry=FAST_RETRY).retry([accepted.generation_id])
    await queue.delete(accepted.generation_id, "acme")
    for name in (accepted.generation_id, retried.new_generation_id):
        assert not [key for key in superuser.keys("*") if name.encode() in key]  # type: ignore[union-attr]
    assert await queue.list_inflight(SHARD) == []


async def test_erasing_leaves_nothing_but_what_was_used(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    running, done = [await queue.enqueue(SHARD, make_job(idempotency_key=key)) for key in ("a", "b")]
    await claims.claim(2, ROOM, ROOM)
    await claims.commit(
        [make_event(done.generation_id, (1,), terminal=JobState.DONE), make_event(running.generation_id, (1,))]
    )
    for accepted in (running, done):
        await queue.delete(accepted.generation_id, "acme")
        assert not [key for key in superuser.keys("*") if accepted.generation_id.encode() in key]  # type: ignore[union-attr]
    assert not superuser.keys("*:i:*")
    assert await queue.list_inflight(SHARD) == []
    assert sum(int(n) for key in superuser.keys("*:usage:*") for n in superuser.hgetall(key).values())  # type: ignore[union-attr]
    result = await claims.commit([])
    assert list(result.lost) == [running.generation_id]
