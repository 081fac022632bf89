"""Priority classes: the highest goes first, and each below it still gets its share of the service while it waits."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

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
MAX_PROMPT, MAX_TOKENS = 40, 20
MAX_COST = MAX_PROMPT + 2 * MAX_TOKENS


@dataclass
class Ledger:
    """What was handed out, and the two laws of shares, held after each job."""

    share: float
    waiting: list[int] = field(default_factory=lambda: [0, 0, 0])
    total: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # since the class has jobs waiting
    own: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    credit: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # as much as the scripts may count
    num_by_share: int = 0

    def hand_out(self, job: ClaimedJob) -> None:
        cost = len(job.body.prompt_token_ids) + 2 * job.body.sampling.max_tokens
        is_passing = any(self.waiting[: job.priority])
        if is_passing:
            assert self.credit[job.priority] >= cost - 1e-6, "a class goes before a higher one without credit"
            self.num_by_share += 1
        assert job.by_share == is_passing
        self.waiting[job.priority] -= 1
        for c in (1, 2):
            mine = cost if c == job.priority else 0
            self.total[c] += cost
            self.own[c] += mine
            self.credit[c] = max(0.0, self.credit[c] + self.share * cost - mine)
            if not self.waiting[c]:
                self.total[c] = self.own[c] = self.credit[c] = 0.0
            lag = self.share * self.total[c] - self.own[c]
            # Its first job, and its part of what goes to another class that is due at the same time.
            assert lag <= 2 * MAX_COST, f"class {c} does not get its share"


async def run_history(queue: JobQueue, claims: JobClaims, share: float, seed: int) -> Ledger:
    """Random arrivals, sometimes of one class alone, and claims of one to four jobs."""
    rng = random.Random(seed)
    ledger = Ledger(share)
    target = [rng.choice([0, 1, 4]) for _ in range(3)]
    for _ in range(150):
        if rng.random() < 0.05:
            target = [rng.choice([0, 1, 4]) for _ in range(3)]
        for c in range(3):
            while ledger.waiting[c] < target[c]:
                job = make_job(
                    rng.choice("ab"),
                    prompt=(1,) * rng.randint(1, MAX_PROMPT),
                    max_tokens=rng.randint(1, MAX_TOKENS),
                    priority=c,
                    weight=rng.choice([1.0, 3.0]),
                )
                await queue.enqueue(SHARD, job)
                ledger.waiting[c] += 1
        jobs = await claims.claim(rng.randint(1, 4), ROOM, ROOM)
        for job in jobs:
            ledger.hand_out(job)
        if jobs:
            await claims.commit([make_event(job.generation_id, (1,), terminal=JobState.DONE) for job in jobs])
    return ledger


def parties(redis: FlakyRedis, share: float, overrides: dict[str, Script] | None = None) -> tuple[JobQueue, JobClaims]:
    settings = QueueSettings(priority_floor=share)
    runner = ScriptRunner(redis, overrides)
    return (
        JobQueue(redis, keys.random_id(), settings, retry=FAST_RETRY, scripts=runner),
        JobClaims(redis, SHARD, keys.random_id(), settings, retry=FAST_RETRY, scripts=runner),
    )


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25])
async def test_every_class_gets_its_share_and_the_highest_goes_first_otherwise(
    worker_redis: FlakyRedis, superuser: redis_sync.Redis, share: float
) -> None:
    num_by_share = 0
    for seed in range(6):
        superuser.flushall()
        num_by_share += (await run_history(*parties(worker_redis, share), share, seed)).num_by_share
    assert num_by_share > 10


MUTANTS = {
    "no share": mutate("claim", "local gain = share * amount -- mutant: share", "local gain = 0"),
    "a share without credit": mutate("claim", "elseif credit and cost(j) > credit then", "elseif false then"),
    "credit that is kept when a class empties": mutate("lib_jobs", "'share:' .. j.c, 'floor:'", "'floor:'"),
}


@pytest.mark.parametrize("name", MUTANTS)
async def test_scripts_without_a_rule_of_shares_are_found(
    worker_redis: FlakyRedis, superuser: redis_sync.Redis, name: str
) -> None:
    async def run_all() -> None:
        for seed in range(6):
            superuser.flushall()
            await run_history(*parties(worker_redis, 0.1, MUTANTS[name]), 0.1, seed)

    with pytest.raises(AssertionError):
        await run_all()


async def test_without_a_share_lower_classes_wait_for_ever(worker_redis: FlakyRedis) -> None:
    queue, claims = parties(worker_redis, 0.0)
    await queue.enqueue(SHARD, make_job(priority=2))
    for _ in range(50):
        await queue.enqueue(SHARD, make_job(priority=0))
        (job,) = await claims.claim(1, ROOM, ROOM)
        assert job.priority == 0
        await claims.commit([make_event(job.generation_id, (1,), terminal=JobState.DONE)])


async def test_what_is_due_and_does_not_fit_holds_back_the_higher_classes(worker_redis: FlakyRedis) -> None:
    queue, claims = parties(worker_redis, 0.25)
    large = make_job(priority=2, prompt=(1,) * 10, kv_tokens=500)
    await queue.enqueue(SHARD, large)
    for _ in range(20):
        await queue.enqueue(SHARD, make_job(priority=0))  # costs 19 each: the large one costs 26
    taken = await claims.claim(20, 499, ROOM)
    assert [job.priority for job in taken] == [0] * 6  # a quarter of six is more than 26
    assert await claims.claim(20, 499, ROOM) == []
    taken = await claims.claim(20, 1000, ROOM)
    assert [job.priority for job in taken] == [2, *[0] * 14]
    assert [job.by_share for job in taken] == [True, *[False] * 14]


async def test_what_no_worker_can_hold_saves_nothing_up(worker_redis: FlakyRedis, superuser: redis_sync.Redis) -> None:
    queue, claims = parties(worker_redis, 0.25)
    await queue.enqueue(SHARD, make_job(priority=2, prompt=(1,) * 10, kv_tokens=ROOM))
    for _ in range(40):
        await queue.enqueue(SHARD, make_job(priority=0))
        assert [job.priority for job in await claims.claim(1, 1000, 1000)] == [0]
    assert float(superuser.hget(keys.meta(SHARD), "share:2")) <= 26 + 0.25 * 19


async def test_a_preempted_job_needs_its_share_again(worker_redis: FlakyRedis) -> None:
    queue, claims = parties(worker_redis, 0.05)
    accepted = await queue.enqueue(SHARD, make_job(priority=2))
    await claims.claim(1, ROOM, ROOM)
    for _ in range(3):
        await queue.enqueue(SHARD, make_job(priority=0))
    assert await claims.preempt([accepted.generation_id], 4) == 1
    jobs = await claims.claim(10, ROOM, ROOM)
    assert [(job.priority, job.num_preemptions) for job in jobs] == [(0, 0), (0, 0), (0, 0), (2, 1)]


async def test_small_jobs_may_pass_a_share_that_is_due_and_does_not_fit_where_that_is_allowed(
    worker_redis: FlakyRedis,
) -> None:
    settings = QueueSettings(priority_floor=0.25, bypass_kv_tokens=32)
    queue = JobQueue(worker_redis, keys.random_id(), settings, retry=FAST_RETRY)
    claims = JobClaims(worker_redis, SHARD, keys.random_id(), settings, retry=FAST_RETRY)
    await queue.enqueue(SHARD, make_job(priority=2, prompt=(1,) * 10, kv_tokens=500))
    for number in range(12):
        await queue.enqueue(SHARD, make_job(priority=0, kv_tokens=16 if number < 9 else 48))
    taken = await claims.claim(20, 400, ROOM)
    assert [job.priority for job in taken] == [0] * 9  # those of 48 slots wait for the share
    assert [job.priority for job in await claims.claim(20, 600, ROOM)] == [2, 0, 0]


async def test_a_share_of_jobs_that_may_only_run_alone_saves_nothing_up(
    worker_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    queue, claims = parties(worker_redis, 0.25)
    await queue.enqueue(SHARD, make_job(priority=0))
    assert len(await claims.claim(1, ROOM, ROOM)) == 1  # a worker with other work leaves it to the one that is kept
    suspect = (await queue.enqueue(SHARD, make_job(priority=2))).generation_id
    for _ in range(2):
        victim = parties(worker_redis, 0.25)[1]
        await victim.claim(1, ROOM, ROOM)
        superuser.zadd(keys.worker_leases(SHARD), {victim.worker_id: 1})
        await queue.reap(SHARD)
        superuser.hset(keys.meta(SHARD), "grace", 0)
        await queue.reap(SHARD)
    assert superuser.zcard(f"{{{SHARD}}}:alone:2") == 1
    superuser.hset(keys.meta(SHARD), "alone", f"{victim.worker_id} {10**15} -")  # another worker is kept for it
    superuser.zadd(keys.worker_leases(SHARD), {victim.worker_id: 10**15})
    for _ in range(20):
        await queue.enqueue(SHARD, make_job(priority=0))
        await claims.claim(1, ROOM, ROOM)
    assert float(superuser.hget(keys.meta(SHARD), "share:2") or 0) <= 0.25 * 19
    assert (await queue.get(suspect, "acme")).state is JobState.QUEUED
