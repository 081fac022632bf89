"""New work is refused before the server's memory ends, and running work goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import redis as redis_sync

from common import keys
from common.dead_letters import DeadLetters, Outcome
from common.errors import BackendFull, BackendRefused
from common.headroom import Headroom
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import JobState
from common.settings import QueueSettings
from tests.builders_common import FlakyRedis, make_event, make_job
from tests.integration.common.conftest import FAST_RETRY, SHARD
from tests.integration.common.test_dead_letters import fail

ROOM = 10_000


@pytest.fixture
def headroom(gateway_redis: FlakyRedis) -> Headroom:
    return Headroom(gateway_redis, QueueSettings().max_memory_share, retry=FAST_RETRY)


@pytest.fixture
async def bounded(
    gateway_redis: FlakyRedis, headroom: Headroom, superuser: redis_sync.Redis
) -> AsyncIterator[JobQueue]:
    """A gateway's queue on a server whose memory limit the test moves."""
    yield JobQueue(gateway_redis, keys.random_id(), QueueSettings(), retry=FAST_RETRY, headroom=headroom)
    superuser.config_set("maxmemory", 0)


def limit_memory(superuser: redis_sync.Redis, used_share: float) -> None:
    """Set maxmemory so that what is used now is about this share of it."""
    superuser.config_set("maxmemory", int(superuser.info("memory")["used_memory"] / used_share))


async def test_new_work_is_refused_above_the_share_and_accepted_again_below(
    bounded: JobQueue, headroom: Headroom, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    running = (await bounded.enqueue(SHARD, make_job())).generation_id
    await claims.claim(1, ROOM, ROOM)
    limit_memory(superuser, 0.9)  # the server itself would still take it
    await headroom.measure()
    with pytest.raises(BackendFull) as caught:
        await bounded.enqueue(SHARD, make_job())
    assert (caught.value.reason, caught.value.retry_after_ms) == ("BACKEND_FULL", 1000)
    await claims.commit([make_event(running, (1,))])
    await claims.commit([make_event(running, (2,), first=1, terminal=JobState.DONE)])
    assert (await bounded.get(running, "acme")).state is JobState.DONE
    assert await bounded.num_queued(SHARD) == 0

    limit_memory(superuser, 0.5)
    await headroom.measure()
    await bounded.enqueue(SHARD, make_job())


async def test_a_server_without_a_limit_takes_all(bounded: JobQueue, headroom: Headroom) -> None:
    await headroom.measure()
    assert headroom.used_share == 0.0
    await bounded.enqueue(SHARD, make_job())


async def test_what_is_stored_counts_against_the_limit(
    bounded: JobQueue, headroom: Headroom, superuser: redis_sync.Redis
) -> None:
    limit_memory(superuser, 0.5)
    await headroom.measure()
    assert not headroom.is_short
    while not headroom.is_short:
        superuser.append("ballast", b"x" * 10_000)
        await headroom.measure()
    with pytest.raises(BackendFull):
        await bounded.enqueue(SHARD, make_job())
    superuser.delete("ballast")
    await headroom.measure()
    await bounded.enqueue(SHARD, make_job())


async def test_a_retry_of_a_dead_letter_is_new_work(
    queue: JobQueue,
    bounded: JobQueue,
    headroom: Headroom,
    claims: JobClaims,
    gateway_redis: FlakyRedis,
    superuser: redis_sync.Redis,
) -> None:
    failed = await fail(queue, claims)
    letters = DeadLetters(gateway_redis, QueueSettings(), retry=FAST_RETRY, headroom=headroom)
    limit_memory(superuser, 0.9)
    await headroom.measure()
    with pytest.raises(BackendFull):
        await letters.retry([failed])
    limit_memory(superuser, 0.5)
    await headroom.measure()
    assert (await letters.retry([failed]))[0].outcome is Outcome.RETRIED


async def test_a_server_that_does_not_tell_is_taken_for_one_without_a_limit(worker_redis: FlakyRedis) -> None:
    blind = Headroom(worker_redis, 0.8, retry=FAST_RETRY)  # a user without INFO
    with pytest.raises(BackendRefused):
        await FAST_RETRY.call(lambda: worker_redis.execute_command("INFO", "memory"))
    await blind.measure()
    blind.check()
