"""Reservations and jobs together: repeats, calls that end in between, and many ends at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from common import keys
from common.errors import IdempotencyKeyReused, InvalidRequest, QuotaExceeded, RateLimited
from common.grants import Grants, Quotas, TenantPolicy
from common.job_queue import JobQueue
from common.jobs import NewJob
from common.quotas import QuotaMeter
from gateway.admission import Admission
from gateway.identity.caller import Caller
from tests.builders_common import FlakyRedis, make_job
from tests.integration.common.conftest import FAST_RETRY, SHARD

COST = 3 + 8  # of a job


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(queue: JobQueue, gateway_redis: FlakyRedis, clock: Clock) -> Admission:
    return Admission(queue, QuotaMeter(gateway_redis, 60_000, retry=FAST_RETRY), unknown_s=5, clock=clock)


def caller(**quotas: int) -> Caller:
    return Caller("acme", "k1", Grants(quotas=Quotas(**quotas)), TenantPolicy())


def job(**fields: object) -> NewJob:
    made = make_job(has_reservation=True, quota_id="k1", generation_id=keys.new_generation_id(SHARD))
    return msgspec.structs.replace(made, **fields)


@pytest.mark.parametrize(
    "quotas",
    [{"requests_per_minute": 1}, {"tokens_per_minute": COST}, {"tokens_per_day": COST}],
    ids=["requests", "tokens", "day"],
)
async def test_a_repeat_finds_its_generation_when_the_quota_is_spent(
    quotas: dict[str, int], admission: Admission
) -> None:
    who = caller(**quotas)
    first = await admission.enqueue(SHARD, job(idempotency_key="k", request_digest=b"d"), who)
    again = await admission.enqueue(SHARD, job(idempotency_key="k", request_digest=b"d"), who)
    assert (again.generation_id, again.duplicate) == (first.generation_id, True)
    with pytest.raises(IdempotencyKeyReused):
        await admission.enqueue(SHARD, job(idempotency_key="k", request_digest=b"e"), who)
    for fresh in (job(), job(idempotency_key="other")):
        with pytest.raises((RateLimited, QuotaExceeded)):
            await admission.enqueue(SHARD, fresh, who)
    with pytest.raises(InvalidRequest):
        await admission.enqueue(SHARD, job(), caller(tokens_per_day=COST - 1))


async def leave_after(
    enqueue: Callable[..., Awaitable[object]],
    admission: Admission,
    queue: JobQueue,
    who: Caller,
    patch: pytest.MonkeyPatch,
) -> None:
    """A caller that goes away after the queue has done this, and before its answer has come."""
    is_done = asyncio.Event()

    async def without_an_answer(*args: object, **options: object) -> None:
        await enqueue(*args, **options)
        is_done.set()
        await asyncio.sleep(3600)

    patch.setattr(queue, "enqueue", without_an_answer)
    task = asyncio.create_task(admission.enqueue(SHARD, job(), who))
    await is_done.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_was_reserved_for_a_job_that_never_came_is_given_back(
    admission: Admission, queue: JobQueue, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = caller(tokens_per_day=2 * COST)

    async def nothing(*args: object, **options: object) -> None:
        pass

    with monkeypatch.context() as patch:
        await leave_after(nothing, admission, queue, who, patch)
    kept = await admission.enqueue(SHARD, job(), who)
    with pytest.raises(QuotaExceeded):
        await admission.enqueue(SHARD, job(), who)
    await admission.settle([SHARD])
    with pytest.raises(QuotaExceeded):
        await admission.enqueue(SHARD, job(), who)
    clock.now = 6
    await admission.settle([SHARD])
    await admission.enqueue(SHARD, job(), who)
    with pytest.raises(QuotaExceeded):
        await admission.enqueue(SHARD, job(), who)
    assert (await queue.get(kept.generation_id, "acme")).state


async def test_a_job_that_did_come_keeps_its_reservation(
    admission: Admission, queue: JobQueue, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = caller(tokens_per_day=COST)
    with monkeypatch.context() as patch:
        await leave_after(queue.enqueue, admission, queue, who, patch)
    clock.now = 6
    await admission.settle([SHARD])
    with pytest.raises(QuotaExceeded):
        await admission.enqueue(SHARD, job(), who)


async def test_many_ends_are_settled_in_one_round(admission: Admission, queue: JobQueue) -> None:
    who = caller(tokens_per_day=500 * COST)
    made = [await admission.enqueue(SHARD, job(), who) for _ in range(500)]
    await asyncio.gather(*(queue.cancel(one.generation_id, "acme") for one in made))
    assert await admission.settle([SHARD]) == 500
    assert await queue.settlements(SHARD) == []
    await admission.enqueue(SHARD, job(), who)
