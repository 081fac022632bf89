"""The fleet at one moment, read from the queue; what is read for one watcher serves all others at about that time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

from common.job_queue import JobQueue
from common.jobs import GenerationRecord, LiveWorker, QueueShape
from common.registry import ModelEntry
from gateway.admin.fleet_messages import generation_message, model_message, worker_message
from gateway.catalog import Catalog
from gateway.model_servicer import MAX_PAGE_SIZE
from torchrelay.admin.v1beta1 import fleet_pb2 as pb

MIN_INTERVAL_S: Final = 0.5
_FRESH_S: Final = 0.4  # less than the shortest interval: nobody is told the same snapshot twice


@dataclass(frozen=True, slots=True)
class _Part:
    """One model revision."""

    entry: ModelEntry
    workers: Sequence[LiveWorker]
    shape: QueueShape
    running: Sequence[GenerationRecord]


@dataclass(slots=True)
class _Latest:
    """The last snapshot of one kind, or its taking: a task that all who wait for it share, with its error too."""

    taking: asyncio.Task[pb.FleetSnapshot] | None = None
    began_at: float = 0.0


class FleetSnapshots:
    """Takes snapshots: of each kind, with generations or without, one in `_FRESH_S` at most, however many watch."""

    def __init__(
        self,
        catalog: Catalog,
        queue: JobQueue,
        num_streams: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalog = catalog
        self._queue = queue
        self._num_streams = num_streams
        self._monotonic = monotonic
        self._latest = {with_generations: _Latest() for with_generations in (False, True)}

    async def get(self, model: str, max_generations: int) -> pb.FleetSnapshot:
        """What is known of one model or all (""), no older than `_FRESH_S`; with up to so many generations.

        Raises BackendUnavailable, also before the registry was read.
        """
        latest = self._latest[max_generations > 0]
        taking = latest.taking
        if taking is None or (taking.done() and self._is_over(latest, taking)):
            latest.began_at = self._monotonic()
            taking = latest.taking = asyncio.create_task(self._take(MAX_PAGE_SIZE if max_generations else 0))
        # A watcher that goes away while others wait must not end it for them.
        return part_of(await asyncio.shield(taking), model, max_generations)

    def _is_over(self, latest: _Latest, taken: asyncio.Task[pb.FleetSnapshot]) -> bool:
        failed = taken.cancelled() or taken.exception() is not None
        return failed or self._monotonic() - latest.began_at > _FRESH_S

    async def _take(self, max_generations: int) -> pb.FleetSnapshot:
        entries = self._catalog.all_entries()
        parts = await asyncio.gather(*(self._part(entry, max_generations) for entry in entries))
        latest = {entry.card.shard for entry in self._catalog.entries()}
        snapshot = pb.FleetSnapshot(
            gateway=pb.FleetGateway(
                gateway_id=self._queue.gateway_id, version=version("torchrelay"), num_streams=self._num_streams()
            )
        )
        # Without a model there is no time of the server, and nothing that it could be compared with.
        snapshot.time.FromMilliseconds(max((part.shape.time_ms for part in parts), default=int(time.time() * 1000)))
        running: list[tuple[int, pb.GenerationInfo]] = []
        for part in parts:
            workers = sorted(part.workers, key=lambda worker: worker.worker_id)
            snapshot.workers.extend(worker_message(part.entry, worker) for worker in workers)
            is_idle = not (part.workers or part.shape.num_waiting or part.shape.num_running)
            if not is_idle or part.entry.card.shard in latest:
                snapshot.models.append(model_message(part.entry, part.workers, part.shape))
            running += [(record.started_ms, generation_message(part.entry, record)) for record in part.running]
        running.sort(key=lambda one: (one[0], one[1].generation_id))
        snapshot.generations.extend(message for _, message in running[:max_generations])
        snapshot.num_running = sum(part.shape.num_running for part in parts)
        return snapshot

    async def _part(self, entry: ModelEntry, max_generations: int) -> _Part:
        shard = entry.card.shard
        workers, shape, running = await asyncio.gather(
            self._queue.workers(shard), self._queue.shape(shard), self._queue.list_running(shard, max_generations)
        )
        return _Part(entry, workers, shape, running)


def part_of(snapshot: pb.FleetSnapshot, model: str, max_generations: int) -> pb.FleetSnapshot:
    """What a watcher has asked for of a snapshot of everything; a message of its own."""

    def is_wanted(one: pb.Worker | pb.FleetModel | pb.GenerationInfo) -> bool:
        return not model or one.model == model

    models = list(filter(is_wanted, snapshot.models))
    return pb.FleetSnapshot(
        time=snapshot.time,
        gateway=snapshot.gateway,
        workers=filter(is_wanted, snapshot.workers),
        models=models,
        generations=list(filter(is_wanted, snapshot.generations))[:max_generations],
        num_running=sum(one.num_running for one in models) if model else snapshot.num_running,
    )
