"""How an idle worker hears of a job: its claim stands behind its wait for the bell."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import redis as redis_sync

from common import job_claims, keys
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import WorkerInfo
from common.scripts import ScriptRunner
from tests.builders_common import FlakyRedis, make_job
from tests.integration.common.conftest import SHARD

ROOM = 10_000


async def enqueue(queue: JobQueue, **fields: int) -> list[str]:
    return [(await queue.enqueue(SHARD, make_job(**fields))).generation_id]


async def test_the_bell_wakes_an_idle_worker(
    queue: JobQueue, claims: JobClaims, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_claims, "_BELL_S", 300)  # it would not look again by itself
    waiting = asyncio.create_task(claims.claim(1, ROOM, ROOM, wait=True))
    await asyncio.sleep(0.05)
    ids = await enqueue(queue)
    assert [job.generation_id for job in await asyncio.wait_for(waiting, 30)] == ids


async def test_without_a_bell_the_worker_looks_again_after_a_second(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    ids = await enqueue(queue)
    superuser.delete(keys.bell(SHARD))
    started = time.monotonic()
    jobs = await asyncio.wait_for(claims.claim(1, ROOM, ROOM, wait=True), 30)
    assert time.monotonic() - started > 0.9
    assert [job.generation_id for job in jobs] == ids


async def test_who_waits_for_the_bell_keeps_nobody_from_the_server(
    queue: JobQueue, claims: JobClaims, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_claims, "_BELL_S", 300)
    waiting = asyncio.create_task(claims.claim(1, ROOM, ROOM, wait=True))
    await asyncio.sleep(0.05)
    assert (await asyncio.wait_for(claims.commit(), 30)).lost == {}
    assert await asyncio.wait_for(claims.owned(), 30) == []
    ids = await enqueue(queue)
    assert [job.generation_id for job in await asyncio.wait_for(waiting, 30)] == ids


async def test_a_job_handed_out_to_who_waits_is_adopted_once(queue: JobQueue, claims: JobClaims) -> None:
    """A heartbeat finds it before the reply is read: then the reply brings nothing new."""
    ids = await enqueue(queue)
    scripts = claims._scripts
    adopted: list[str] = []

    async def run_after(*args: Any) -> Any:
        reply = await ScriptRunner.run_after(scripts, *args)
        assert (await claims.heartbeat(WorkerInfo(model="tiny"))).has_unknown_jobs
        adopted.extend(job.generation_id for job in await claims.owned())
        return reply

    scripts.run_after = run_after  # type: ignore[method-assign]
    assert await claims.claim(1, ROOM, ROOM, wait=True) == []
    assert adopted == ids
    assert claims.held == set(ids)


async def test_a_reply_that_was_lost_behind_the_bell_is_asked_for_again_at_once(
    queue: JobQueue, claims: JobClaims, worker_redis: FlakyRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_claims, "_BELL_S", 300)  # the bell has rung: nobody rings it again
    ids = await enqueue(queue)
    worker_redis.num_to_lose = 1
    jobs = await asyncio.wait_for(claims.claim(1, ROOM, ROOM, wait=True), 30)
    assert [(job.generation_id, job.epoch) for job in jobs] == [(ids[0], 1)]


async def test_behind_the_bell_a_server_learns_a_script_that_it_does_not_know(
    queue: JobQueue, claims: JobClaims, superuser: redis_sync.Redis
) -> None:
    ids = await enqueue(queue)
    superuser.script_flush()
    assert [job.generation_id for job in await claims.claim(1, ROOM, ROOM, wait=True)] == ids


async def test_a_worker_that_can_take_nothing_does_not_spin(queue: JobQueue, claims: JobClaims) -> None:
    await enqueue(queue, kv_tokens=5000)
    started, turns = time.monotonic(), 0
    while time.monotonic() - started < 0.6:
        assert await claims.claim(1, 100, 100, wait=True) == []
        turns += 1
    assert turns < 12
