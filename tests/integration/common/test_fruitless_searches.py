"""Work that is held back until its end, and workers that die in the midst of it: when an attempt was in vain."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest
import redis as redis_sync

from common import keys
from common.generation import EventBody, JobBody, SamplingParams
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import JobState, Reason
from common.settings import QueueSettings
from tests.builders_common import FlakyRedis, make_job
from tests.builders_engine import PaperRunner, make_engine
from tests.integration.common.conftest import FAST_RETRY, SHARD
from tests.integration.common.test_job_claims import ROOM, end_lease
from worker.holdings import Holdings

BEAMS = SamplingParams(max_tokens=12, num_beams=3)
BEST_OF = SamplingParams(max_tokens=12, num_outputs=3, num_best=1, temperature=1.0, seed=3)
SAMPLED = SamplingParams(max_tokens=12)
PROMPT = (1, 2, 3)


class Attempts:
    """Workers, one after another, that claim one job and die after so many events."""

    def __init__(self, queue: JobQueue, redis: FlakyRedis, superuser: redis_sync.Redis) -> None:
        self._queue, self._redis, self._superuser = queue, redis, superuser

    async def enqueue(self, sampling: SamplingParams, prompt: tuple[int, ...] = PROMPT) -> str:
        body = JobBody(prompt_token_ids=prompt, sampling=sampling)
        return (await self._queue.enqueue(SHARD, msgspec.structs.replace(make_job(), body=body))).generation_id

    async def die_after(self, nums_events: Iterable[int], token_budget: int = 64) -> None:
        for num_events in nums_events:
            claims = JobClaims(self._redis, SHARD, keys.random_id(), QueueSettings(), retry=FAST_RETRY)
            (job,) = await claims.claim(1, ROOM, ROOM)
            engine, holdings = make_engine(PaperRunner(num_blocks=100), token_budget=token_budget), Holdings(4)
            engine.add(holdings.add(job, 0.0))
            for _ in range(num_events):
                await claims.commit(holdings.events([engine.step(0.0)]))
            end_lease(self._superuser, claims)
            await self._queue.reap(SHARD)


@pytest.fixture
def attempts(queue: JobQueue, worker_redis: FlakyRedis, superuser: redis_sync.Redis) -> Attempts:
    return Attempts(queue, worker_redis, superuser)


@pytest.mark.parametrize("sampling", [BEAMS, BEST_OF], ids=["beams", "best_of"])
async def test_held_back_work_that_never_comes_further_is_given_up(
    attempts: Attempts, queue: JobQueue, sampling: SamplingParams
) -> None:
    generation_id = await attempts.enqueue(sampling)
    await attempts.die_after([4])
    assert (await queue.get(generation_id, "acme")).attempts == 0
    await attempts.die_after([2, 4])  # the second is further than the first, and no further than the one before
    assert (await queue.get(generation_id, "acme")).attempts == 2
    await attempts.die_after([3])
    record = await queue.get(generation_id, "acme")
    assert (record.state, record.reason, record.num_claims) == (JobState.FAILED, Reason.ATTEMPTS_EXHAUSTED, 4)


@pytest.mark.parametrize("sampling", [BEAMS, BEST_OF], ids=["beams", "best_of"])
async def test_held_back_work_that_comes_further_each_time_goes_on(
    attempts: Attempts, queue: JobQueue, sampling: SamplingParams
) -> None:
    generation_id = await attempts.enqueue(sampling)
    await attempts.die_after([1, 2, 1, 3, 4, 5])
    record = await queue.get(generation_id, "acme")
    assert (record.state, record.attempts, record.num_claims) == (JobState.QUEUED, 0, 6)


async def test_what_is_in_the_log_always_counts(attempts: Attempts, queue: JobQueue) -> None:
    generation_id = await attempts.enqueue(SAMPLED)
    await attempts.die_after([3, 1, 1, 1, 1])
    record = await queue.get(generation_id, "acme")
    assert (record.attempts, record.usage.completion_tokens) == (0, 7)
    attachment = await queue.attach(generation_id, "acme", 0)
    events = [event.body for event in attachment.events]
    assert sum(len(delta.token_ids) for body in events if isinstance(body, EventBody) for delta in body.deltas) == 7


async def test_scores_of_a_prompt_are_in_the_log_though_its_outputs_are_not(
    attempts: Attempts, queue: JobQueue
) -> None:
    sampling = SamplingParams(max_tokens=12, num_beams=3, prompt_logprobs=0)
    generation_id = await attempts.enqueue(sampling, prompt=tuple(range(24)))
    await attempts.die_after([1, 2, 3, 4], token_budget=4)  # of six steps with the prompt
    record = await queue.get(generation_id, "acme")
    assert (record.attempts, record.usage.completion_tokens) == (0, 0)
    await attempts.die_after([4], token_budget=4)
    assert (await queue.get(generation_id, "acme")).attempts == 1
