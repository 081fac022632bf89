"""What every gateway and every idle worker does each second, so that no single process is needed for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from common.jobs import LiveWorker, Swept, WorkerInfo
from common.scripts import as_list
from common.settings import QueueSettings

_MAX_PARTIES: Final = 4  # bounds of one call: no script may hold the server for long
_MAX_JOBS: Final = 64
_INFO_DECODER: Final = msgspec.msgpack.Decoder(WorkerInfo)

RunScript = Callable[..., Awaitable[Any]]


class Upkeep:
    """Reaping, sweeping and looking at workers; `run(script name, shard, *arguments)` reaches the server."""

    def __init__(self, run: RunScript, settings: QueueSettings) -> None:
        self._run = run
        self._settings = settings

    async def reap(self, shard: str) -> Swept:
        """Requeue, or give up, the jobs of workers whose lease ended."""
        settings = self._settings
        requeued, dead = as_list(
            await self._run(
                "reap",
                shard,
                settings.worker_lease_ms,
                _MAX_PARTIES,
                _MAX_JOBS,
                settings.max_fruitless_attempts,
                settings.max_claims,
            )
        )
        return _swept(requeued=requeued, dead_lettered=dead)

    async def sweep(self, shard: str) -> Swept:
        """End jobs past their deadline or their disconnect grace; begin the grace of dead gateways' jobs."""
        expired, cancelled, detached = as_list(
            await self._run("sweep", shard, _MAX_JOBS, _MAX_PARTIES, self._settings.gateway_lease_ms)
        )
        return _swept(expired=expired, cancelled=cancelled, detached=detached)

    async def workers(self, shard: str, limit: int) -> list[LiveWorker]:
        """The workers that have, or had until the next reap, a lease."""
        found = as_list(await self._run("workers", shard, limit))
        return [
            LiveWorker(
                worker_id.decode(),
                left,
                num_jobs,
                _INFO_DECODER.decode(info) if info else None,
                reported_ms,
                drain_requested_by.decode(),
            )
            for worker_id, left, num_jobs, info, reported_ms, drain_requested_by in found
        ]


def _swept(**found: list[bytes]) -> Swept:
    generations = tuple((outcome, one.decode()) for outcome, ids in found.items() for one in ids)
    return Swept(**{outcome: len(ids) for outcome, ids in found.items()}, generations=generations)
