"""Fair shares between tenants: weights, newcomers, refunds. Costs are in token units: prompt once, output twice."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator

import pytest
import redis as redis_sync

from common import keys
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import ClaimedJob, JobState
from common.scripts import Script, ScriptRunner
from common.settings import QueueSettings
from tests.builders_common import FlakyRedis, make_event, make_job, mutate
from tests.integration.common.conftest import FAST_RETRY, SHARD

ROOM = 10**6
NUM_SLOTS = 4


class Service:
    """One worker with some slots, all of which are taken; each turn some jobs end and as many are claimed."""

    def __init__(self, redis: FlakyRedis, overrides: dict[str, Script] | None = None) -> None:
        runner = ScriptRunner(redis, overrides)
        self.queue = JobQueue(redis, keys.random_id(), QueueSettings(), retry=FAST_RETRY, scripts=runner)
        self.claims = JobClaims(redis, SHARD, keys.random_id(), QueueSettings(), retry=FAST_RETRY, scripts=runner)
        self.running: list[ClaimedJob] = []

    async def enqueue(self, tenant: str, number: int = 1, **fields: object) -> None:
        for _ in range(number):
            await self.queue.enqueue(SHARD, make_job(tenant, **fields))  # type: ignore[arg-type]

    async def claim(self) -> list[ClaimedJob]:
        jobs = await self.claims.claim(NUM_SLOTS - len(self.running), ROOM, ROOM)
        self.running += jobs
        return jobs

    async def end(self, number: int, num_tokens: int) -> None:
        """The oldest jobs end with so many tokens, or as many as they may have."""
        ended, self.running = self.running[:number], self.running[number:]
        events = []
        for job in ended:
            token_ids = (1,) * min(num_tokens, job.body.sampling.max_tokens)
            events.append(make_event(job.generation_id, token_ids, terminal=JobState.DONE))
        await self.claims.commit(events)


async def newcomers(service: Service, seed: int) -> AsyncIterator[tuple[int, list[str]]]:
    """A flood, and now and then one job of another tenant, not before the flood has had a turn after the last one.

    Yields how many slots ended and whose jobs were handed out next.
    """
    rng = random.Random(seed)
    await service.enqueue("flood", 300, max_tokens=20)
    await service.claim()
    for number in range(20):
        for _ in range(rng.randint(1, 3)):
            await service.end(rng.randint(1, NUM_SLOTS), rng.randint(1, 20))
            await service.claim()
        await service.enqueue(f"{'az'[number % 2]}-{number}", max_tokens=20)
        num_ended = rng.randint(1, NUM_SLOTS)
        await service.end(num_ended, rng.randint(1, 20))
        yield num_ended, [job.tenant for job in await service.claim()]


async def test_a_newcomer_gets_the_next_slot_whatever_a_flood_has_queued(worker_redis: FlakyRedis) -> None:
    async for num_ended, tenants in newcomers(Service(worker_redis), seed=1):
        assert tenants[0] != "flood"
        assert tenants[1:] == ["flood"] * (num_ended - 1)


MUTANTS = {
    "counters that fall": mutate("lib_jobs", "if active and amount < 0 then", "if false then"),
    "newcomers behind the turn of those who wait": mutate(
        "lib_jobs", "local reached = call('HGET', KEYS[1], 'floor:' .. class)", "local reached = nil"
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
async def test_scripts_that_let_a_newcomer_wait_longer_are_found(worker_redis: FlakyRedis, name: str) -> None:
    assert any([tenants[0] == "flood" async for _, tenants in newcomers(Service(worker_redis, MUTANTS[name]), seed=1)])


async def turns_of_the_patient(service: Service) -> int:
    """Turns that a tenant with many jobs gets in 100, when each turn another one comes with its first job."""
    await service.enqueue("zz", 100)
    await service.claim()
    turns: Counter[str] = Counter()
    for number in range(100):
        await service.enqueue(f"new-{number}")
        await service.end(1, 8)
        turns.update(job.tenant for job in await service.claim())
    return turns["zz"]


async def test_any_number_of_newcomers_keeps_nobody_from_his_turn(worker_redis: FlakyRedis) -> None:
    assert await turns_of_the_patient(Service(worker_redis)) >= 5


async def test_newcomers_that_do_not_move_the_floor_would_starve_others(worker_redis: FlakyRedis) -> None:
    still = mutate("lib_jobs", "next_turn + 2 * AHEAD_OF_TIES", "reached")
    assert await turns_of_the_patient(Service(worker_redis, still)) == 0


async def largest_difference(service: Service, seed: int, *, others: bool = True) -> float:
    """Of service over weight of two tenants that always have jobs waiting, in token units; weights change at random.

    Jobs cost 1 to 70, weights are 1 to 4; every other job ends with fewer tokens than it was charged.
    """
    rng = random.Random(seed)
    served = {"a": 0.0, "b": 0.0}
    waiting = {"a": 0, "b": 0}
    weight_of: dict[str, float] = {}
    charge_of: dict[str, int] = {}
    worst = 0.0
    for number in range(150):
        for tenant in waiting:
            while waiting[tenant] <= NUM_SLOTS:
                weight, prompt = rng.uniform(1, 4), (1,) * rng.randint(1, 30)
                job = make_job(tenant, prompt=prompt, max_tokens=rng.randint(1, 20), weight=weight)
                name = (await service.queue.enqueue(SHARD, job)).generation_id
                weight_of[name], charge_of[name] = weight, len(prompt) + 2 * job.body.sampling.max_tokens
                waiting[tenant] += 1
        if others and number % 7 == 0:
            await service.enqueue(f"other-{number % 5}")
        await service.end(rng.randint(1, NUM_SLOTS), rng.choice([1, 20]))
        for job in await service.claim():
            if job.tenant in served:
                waiting[job.tenant] -= 1
                served[job.tenant] += charge_of[job.generation_id] / weight_of[job.generation_id]
        worst = max(worst, abs(served["a"] - served["b"]))
    return worst


@pytest.mark.parametrize("seed", range(4))
async def test_the_service_of_two_backlogged_tenants_differs_by_a_few_jobs_only(
    worker_redis: FlakyRedis, superuser: redis_sync.Redis, seed: int
) -> None:
    """Charged service: real tokens differ from it by what is credited, which is at most what the jobs in slots cost."""
    assert await largest_difference(Service(worker_redis), seed) <= 70 * (2 + 2 * NUM_SLOTS)
    credited = superuser.hgetall(f"{{{SHARD}}}:credit")
    assert all(0 < float(credit) <= 70 * NUM_SLOTS for credit in credited.values())


async def test_refunds_that_nobody_gets_are_found(worker_redis: FlakyRedis, superuser: redis_sync.Redis) -> None:
    greedy = mutate("lib_jobs", "credit, amount = credit - used, amount - used", "amount = amount - used")
    await largest_difference(Service(worker_redis, greedy), 0)
    credited = superuser.hgetall(f"{{{SHARD}}}:credit")
    assert any(float(credit) > 70 * NUM_SLOTS for credit in credited.values())


async def test_without_charges_one_tenant_gets_everything(worker_redis: FlakyRedis) -> None:
    free = mutate("lib_jobs", "charged = counter + amount", "charged = counter")
    assert await largest_difference(Service(worker_redis, free), 0) > 70 * (2 + 2 * NUM_SLOTS)


async def test_jobs_that_wait_for_hours_keep_their_tenants_counters(
    worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    """A cold model: the counters have expired when its first worker comes, the jobs have not."""
    service = Service(worker_redis)
    await service.enqueue("a", 20)
    await service.enqueue("b", 20)
    for _ in range(5):
        await service.claim()
        await service.end(NUM_SLOTS, 8)
    superuser.delete(keys.service_counters(SHARD))
    turns: Counter[str] = Counter()
    for _ in itertools.repeat(None, 4):
        turns.update(job.tenant for job in await service.claim())
        await service.end(NUM_SLOTS, 8)
    assert turns == {"a": 8, "b": 8}


async def test_what_a_tenant_did_not_use_is_credited_when_it_comes_back(
    worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    service = Service(worker_redis)
    await service.enqueue("a", 6, max_tokens=100)
    await service.claim()
    await service.end(2, 1)
    assert float(superuser.hget(f"{{{SHARD}}}:credit", "a")) == 2 * 2 * 99
    await service.claim()  # the last two waiting ones take it up
    assert superuser.hget(f"{{{SHARD}}}:credit", "a") is None
    assert superuser.zscore(keys.service_counters(SHARD), "a") == 6 * 203 - 2 * 2 * 99
    await service.end(4, 1)
    assert superuser.zscore(keys.service_counters(SHARD), "a") == 6 * (3 + 2)
