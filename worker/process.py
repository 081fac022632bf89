"""Runs one worker: builds its objects, hands them to each other, and drains when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import sys
import time
from functools import cache
from importlib.metadata import version
from typing import Final

import msgspec
import structlog
import uvloop
from prometheus_client import CollectorRegistry

from common import keys
from common.job_claims import JobClaims
from common.jobs import WorkerInfo
from common.late_log import late_log
from common.redis import Redis, Retry, connect
from common.registry import AdapterCard, ModelRegistry
from common.startup import CANNOT_START, ignore_signals, settle_heap, stop_at_signals
from common.telemetry.log_levels import LevelFollower, LogLevels
from common.telemetry.monitor import MonitorServer, Vitals, process_registry
from worker.adapters import watch_adapters
from worker.agent import Agent, StepHungError
from worker.assembly import Assembly, assemble
from worker.configuration import WorkerConfiguration
from worker.engine.device import memory_use, num_compute_threads
from worker.engine.thread import EngineThread
from worker.engine_figures import EngineFigures
from worker.job_log import JobLog
from worker.metrics import WorkerMetrics
from worker.publishing import publish
from worker.settings import WorkerSettings
from worker.spans import JobSpans
from worker.watch import Watches

log = structlog.get_logger()

_BEATS_PER_LEASE: Final = 5
# Events cost the gateway, the queue and the caller some 600 us of CPU each, of which they often share the worker's.
_EVENTS_PER_THREAD: Final = 100
# A step that has left the kernels waits for the interpreter's lock no longer than this while the agent computes; with
# Python's default, 5 ms, the tokens of a stream alone came 12.4 ms apart instead of 11.2.
_SWITCH_INTERVAL_S: Final = 0.0003
_HEAD_START_S: Final = 0.003  # of a first token before the next step on the same cores, by a trace of its way
_JOIN_S: Final = 10.0
_HUNG_STATUS: Final = 3


@cache
def _versions() -> dict[str, str]:
    """Return what is installed; finding that out reads files, and a heartbeat tells it."""
    return {name: version(name) for name in ("torchrelay", "torch", "transformers")}


def describe(
    assembly: Assembly, engine: EngineThread, agent: Agent, metrics: WorkerMetrics, started_ms: int
) -> WorkerInfo:
    """Return what this worker tells the fleet of itself."""
    stats = engine.stats
    used_bytes, all_bytes = memory_use(assembly.device)
    return WorkerInfo(
        model=assembly.card.name,
        revision=assembly.card.revision,
        host=f"{socket.gethostname()}:{os.getpid()}",
        device=assembly.device,
        versions=_versions(),
        started_ms=started_ms,
        draining=agent.draining,
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        stats={
            "num_blocks": stats.num_blocks,
            "num_free_blocks": stats.num_free_blocks,
            "block_size": stats.block_size,
            "num_steps": stats.num_steps,
            "num_preemptions": stats.num_preemptions,
            "generated_tokens": stats.generated_tokens,
            "prompt_tokens": stats.prompt_tokens,
            "cached_prompt_tokens": stats.cached_prompt_tokens,
            "last_step_ms": stats.last_step_ms,
            "busy_ratio": metrics.busy_ratio(),
            "memory_used_bytes": used_bytes,
            "memory_total_bytes": all_bytes,
            **metrics.recent_first_tokens(),
        },
    )


async def watch(registry: ModelRegistry, assembly: Assembly, interval_s: float) -> None:
    """Publish the adapters of a worker's folder again whenever they change."""
    if assembly.adapters is None:
        return

    async def tell(found: tuple[AdapterCard, ...]) -> None:
        await publish(registry, msgspec.structs.replace(assembly.card, adapters=found), assembly.files)
        log.info("adapters.published", adapters=[adapter.name for adapter in found])

    await watch_adapters(assembly.adapters.scan, assembly.card.adapters, tell, interval_s)


def most_events_per_s(settings: WorkerSettings, device: str) -> float:
    """Return the setting, or what suits a device, as `describe_device` names it."""
    if settings.max_events_per_s > 0:
        return settings.max_events_per_s
    return _EVENTS_PER_THREAD * (settings.num_threads or num_compute_threads()) if device == "cpu" else math.inf


async def run(
    assembly: Assembly,
    configuration: WorkerConfiguration,
    registered: CollectorRegistry,
    vitals: Vitals,
    stop: asyncio.Event,
) -> None:
    """Serve jobs until `stop` is set, then drain. Its metrics join those of `registered`."""
    settings, redis_settings, queue_settings = configuration.worker, configuration.redis, configuration.queue
    sealer, tracing = configuration.sealer, configuration.tracing
    redis: Redis = connect(redis_settings)
    retry = Retry.from_settings(redis_settings)
    registry = ModelRegistry(redis, retry=retry)
    await publish(registry, assembly.card, assembly.files)
    claims = JobClaims(redis, assembly.card.shard, keys.random_id(), queue_settings, retry=retry, sealer=sealer)
    on_cpu = assembly.device == "cpu"
    engine = EngineThread(
        assembly.engine,
        adapters=assembly.store,
        head_start_s=_HEAD_START_S if on_cpu else 0.0,
        step_start=assembly.step_start,
        results_wait=on_cpu,  # elsewhere the next step computes already
    )
    engine.start(asyncio.get_running_loop())
    started_ms = int(time.time() * 1000)
    metrics = WorkerMetrics(registered, assembly.card.name, configuration.metrics.max_tenants)
    registered.register(
        EngineFigures(
            assembly.card,
            assembly.device,
            version("torchrelay"),
            lambda: engine.stats,
            lambda: memory_use(assembly.device),
        )
    )
    spans = [] if tracing is None else [JobSpans(tracing, assembly.card.name, claims.worker_id)]
    agent = Agent(
        claims,
        engine,
        settings,
        lambda: describe(assembly, engine, agent, metrics, started_ms),
        Watches(metrics, JobLog(), *spans),
        max_num_seqs=assembly.card.max_sequences,
        beat_interval_s=queue_settings.worker_lease_ms / 1000 / _BEATS_PER_LEASE,
        max_events_per_s=most_events_per_s(settings, assembly.device),
    )

    async def stop_agent() -> None:
        await stop.wait()
        vitals.set_unready("draining")
        agent.stop()

    stopper = asyncio.create_task(stop_agent())
    watcher = asyncio.create_task(watch(registry, assembly, settings.adapters_scan_s))
    beating = asyncio.create_task(vitals.run())
    following = asyncio.create_task(LevelFollower(LogLevels(redis, retry=retry)).run())
    vitals.set_ready()
    log.info("worker.ready", model=assembly.card.name, worker_id=claims.worker_id, shard=assembly.card.shard)
    join_s = _JOIN_S
    try:
        await agent.run()
    except BaseExceptionGroup as group:
        if group.subgroup(StepHungError) is not None:
            join_s = 0.0  # its thread would be waited for in vain
        raise
    finally:
        for task in (stopper, watcher, beating, following):
            task.cancel()
        engine.stop()
        with contextlib.suppress(TimeoutError):
            await engine.join(join_s)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
        await redis.aclose()
        late_log.flush()
    log.info("worker.stopped", model=assembly.card.name)


def run_process(configuration: WorkerConfiguration) -> int:
    """Run a worker until SIGTERM or SIGINT; return the exit status."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    registered, vitals = process_registry(), Vitals()
    settings, monitor = configuration.worker, None
    try:
        if settings.metrics_address:
            monitor = MonitorServer(settings.metrics_address, registered, vitals)
        vitals.set_unready("loading the model")
        assembly = assemble(settings, configuration.engine)
        settle_heap()
    except Exception as error:  # noqa: BLE001 - every library on the way has its own, and the operator needs one line
        log.error("worker.failed", error=f"{type(error).__name__}: {error}")
        return CANNOT_START

    async def until_signal() -> None:
        stop = asyncio.Event()
        stop_at_signals(stop)
        await run(assembly, configuration, registered, vitals, stop)

    try:
        uvloop.run(until_signal())
        ignore_signals()
    except BaseExceptionGroup as group:
        for failure in group.exceptions:
            log.error("worker.failed", exc_info=failure)
        if group.subgroup(StepHungError) is not None:
            # The engine's thread cannot be joined: leave at once, so that the lease ends and the jobs move on.
            os._exit(_HUNG_STATUS)
        return 1
    finally:
        if monitor is not None:
            monitor.close()
    return 0
