"""Whoever ends a generation, its blocks are free within two further steps: counted in the worker's own engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from common import keys
from common.embedded import EmbeddedServer
from common.generation import FinishReason, JobBody, SamplingParams
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import JobState, NewJob, WorkerInfo
from common.redis import Redis, connect, execute
from common.settings import QueueSettings, RedisSettings
from tests.builders_models import tiny_module
from tests.builders_system import until
from worker.agent import Agent
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.loop import Engine
from worker.engine.runner import ModelRunner
from worker.engine.settings import EngineSettings
from worker.engine.stopping import Detokenizer
from worker.engine.thread import EngineThread
from worker.engine.types import StepResult
from worker.metrics import WorkerMetrics
from worker.settings import WorkerSettings

SHARD = keys.shard_name("tiny", "r1")


class NoText:
    """A detokenizer for models without a vocabulary."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class WatchedEngine(Engine):
    """Remembers which requests each step began with."""

    history: list[frozenset[str]]
    step_s = 0.0  # each step takes at least so long, so that commits and cancels fall between steps

    def step(self, now: float) -> StepResult:
        self.history.append(frozenset(self.stats().held_request_ids))
        time.sleep(self.step_s)
        return super().step(now)


@dataclass
class Bench:
    """A worker's agent and engine on a real queue, in this process."""

    queue: JobQueue
    engine: WatchedEngine
    thread: EngineThread
    agent: Agent
    ids: list[str] = field(default_factory=list)

    async def submit(self, num_prompt_tokens: int = 20, **options: Any) -> str:
        """Queue a generation that would go on for long; return its id."""
        kinds: dict[str, Any] = {
            name: options.pop(name) for name in ("time_limit_ms", "disconnect_grace_ms") if name in options
        }
        prompt = tuple((7 * i + len(self.ids)) % 190 + 3 for i in range(num_prompt_tokens))
        sampling = SamplingParams(**{"max_tokens": 1500, **options})
        blocks = -(-num_prompt_tokens // 16) + sampling.num_outputs
        job = NewJob(
            tenant="t",
            key_id="k",
            body=JobBody(prompt_token_ids=prompt, sampling=sampling),
            kv_tokens=16 * blocks,
            peak_kv_tokens=16 * blocks,
            attended=True,
            **kinds,
        )
        generation_id = (await self.queue.enqueue(SHARD, job)).generation_id
        self.ids.append(generation_id)
        return generation_id

    def holds(self, generation_id: str) -> bool:
        return any(name.startswith(generation_id) for name in self.thread.stats.held_request_ids)

    async def held(self, generation_id: str) -> None:
        async def is_held() -> bool:
            return self.holds(generation_id)

        await until(is_held, what="the job in the engine")

    async def num_steps_until_gone(self, generation_id: str) -> int:
        """Count the steps with a generation that end from now on, the one in progress included."""
        begun = len(self.engine.history)
        first = begun - 1 if self.thread.stats.num_steps < begun else begun

        async def is_gone() -> bool:
            return not self.holds(generation_id)

        await until(is_gone, what="the job's end in the engine")
        later = self.engine.history[first:]
        return sum(any(name.startswith(generation_id) for name in names) for names in later)

    @property
    def all_blocks_are_free(self) -> bool:
        return self.thread.stats.num_free_blocks == self.thread.stats.num_blocks


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
async def redis(server: EmbeddedServer) -> AsyncIterator[Redis]:
    client = connect(RedisSettings(url=server.url))
    await execute(client, "FLUSHALL")
    yield client
    await client.aclose()


@asynccontextmanager
async def bench(redis: Redis, **engine_settings: Any) -> AsyncIterator[Bench]:
    """Run an agent over a tiny model. Its leases are long: only what the test does ends a job."""
    settings = EngineSettings(**{"token_budget": 32, "max_num_seqs": 4, "num_blocks": 120, **engine_settings})
    module = tiny_module("llama", max_position_embeddings=2048)
    new_detokenizer: Callable[[], Detokenizer] = NoText
    runner = ModelRunner(module, TorchAttention(settings.block_size), settings)
    engine = WatchedEngine(runner, settings, new_detokenizer)
    engine.history, engine.step_s = [], 0.01
    thread = EngineThread(engine)
    thread.start(asyncio.get_running_loop())
    queue_settings = QueueSettings(deadline_slack_ms=5000)
    claims = JobClaims(redis, SHARD, keys.random_id(), queue_settings)
    worker_settings = WorkerSettings(drain_s=0)
    agent = Agent(
        claims,
        thread,
        worker_settings,
        WorkerInfo,
        WorkerMetrics(CollectorRegistry(), "test", 10),
        max_num_seqs=settings.max_num_seqs,
        beat_interval_s=2.0,
    )
    running = asyncio.create_task(agent.run())
    queue = JobQueue(redis, keys.random_id(), queue_settings)
    try:
        yield Bench(queue, engine, thread, agent)
    finally:
        agent.stop()
        await asyncio.wait_for(running, 30)
        thread.stop()
        await thread.join(10)


async def cancel(bench: Bench, generation_id: str) -> None:
    await bench.queue.cancel(generation_id, "t")


async def detach(bench: Bench, generation_id: str) -> None:
    """What the gateway does when a call is cancelled, its deadline passes or its connection breaks."""
    assert await bench.queue.detach(generation_id) is JobState.CANCELLED


async def abandon(bench: Bench, generation_id: str) -> None:
    """What another gateway does when the client's own has died."""
    await bench.queue.leave([SHARD])
    assert (await bench.queue.sweep(SHARD)).detached >= 1


@pytest.mark.parametrize("end", [cancel, detach, abandon])
async def test_running_job_frees_its_blocks_within_two_steps(
    redis: Redis, end: Callable[[Bench, str], Awaitable[None]]
) -> None:
    async with bench(redis) as at:
        generation_id = await at.submit(num_outputs=2)
        await at.held(generation_id)
        for _ in range(5):
            await asyncio.sleep(0.037)  # another moment of a step each time
        assert not at.all_blocks_are_free
        await end(at, generation_id)
        assert await at.num_steps_until_gone(generation_id) <= 2
        assert at.all_blocks_are_free


@pytest.mark.parametrize("end", [cancel, detach])
async def test_job_that_prefills_a_long_prompt_frees_its_blocks_within_two_steps(
    redis: Redis, end: Callable[[Bench, str], Awaitable[None]]
) -> None:
    async with bench(redis) as at:
        generation_id = await at.submit(num_prompt_tokens=1600, max_tokens=10)  # 50 steps of 32 tokens
        await at.held(generation_id)
        await asyncio.sleep(0.1)
        await end(at, generation_id)
        num_steps = len(at.engine.history)
        assert await at.num_steps_until_gone(generation_id) <= 2
        assert num_steps < 40, "the prompt was computed before the end came"
        assert at.all_blocks_are_free
        record = await at.queue.get(generation_id, "t")
        assert record.usage.completion_tokens == 0


async def test_waiting_job_is_gone_within_two_steps_and_its_neighbour_goes_on(redis: Redis) -> None:
    async with bench(redis, max_num_seqs=2) as at:
        running = await at.submit(num_outputs=2)  # takes both places
        await at.held(running)
        waiting = await at.submit()
        await at.held(waiting)
        assert at.thread.stats.num_waiting == 1
        await asyncio.sleep(0.05)
        await cancel(at, waiting)
        assert await at.num_steps_until_gone(waiting) <= 2
        assert at.holds(running)
        num_free = at.thread.stats.num_free_blocks
        assert num_free < at.thread.stats.num_blocks
        await cancel(at, running)
        assert await at.num_steps_until_gone(running) <= 2
        assert at.all_blocks_are_free


@pytest.mark.parametrize("num_prompt_tokens", [20, 1600], ids=["decoding", "prefilling"])
async def test_job_past_its_time_limit_takes_part_in_no_further_step(redis: Redis, num_prompt_tokens: int) -> None:
    async with bench(redis) as at:
        began = time.monotonic()
        generation_id = await at.submit(num_prompt_tokens, max_tokens=300, time_limit_ms=250)
        await at.held(generation_id)

        async def has_ended() -> bool:
            return (await at.queue.get(generation_id, "t")).state.is_final

        await until(has_ended, what="the end at the time limit")
        assert 0.2 < time.monotonic() - began < 2
        record = await at.queue.get(generation_id, "t")
        assert record.state is JobState.DONE, "the worker ends it itself, with what it has"
        assert at.all_blocks_are_free
        log = await at.queue.read_log(generation_id, "t")
        (last,) = [d for event in log.events if event.body for d in event.body.deltas if d.finish_reason is not None]
        assert last.finish_reason is FinishReason.TIME_LIMIT
        assert (record.usage.completion_tokens > 0) == (num_prompt_tokens == 20)


async def test_cancelled_job_in_the_queue_never_reaches_the_engine(redis: Redis) -> None:
    async with bench(redis, max_num_seqs=1) as at:
        running = await at.submit()
        await at.held(running)
        queued = await at.submit()
        record = await at.queue.cancel(queued, "t")
        assert record.state is JobState.CANCELLED
        await cancel(at, running)
        await at.num_steps_until_gone(running)
        third = await at.submit(max_tokens=2)

        async def has_ended() -> bool:
            return (await at.queue.get(third, "t")).state is JobState.DONE

        await until(has_ended, what="the third generation's end")
        assert not any(name.startswith(queued) for names in at.engine.history for name in names)
