"""What a gateway does by itself: hears the reply streams, renews its leases, measures, ends what nobody else ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from common.errors import ServingError
from common.headroom import Headroom
from common.job_queue import START_CURSOR, JobQueue
from common.telemetry.upkeep import UpkeepCounters, log_upkeep
from gateway.admission import Admission
from gateway.catalog import Catalog
from gateway.delivery import EventHub
from gateway.stream import StreamFactory
from gateway.telemetry.queues import ModelQueue, QueueFigures

log = structlog.get_logger()

_IDLE_S = 0.2
_RETRY_S = 0.5


class Upkeep:
    """Background tasks of one gateway."""

    def __init__(
        self,
        queue: JobQueue,
        hub: EventHub,
        streams: StreamFactory,
        catalog: Catalog,
        headroom: Headroom,
        admission: Admission,
        figures: QueueFigures,
        counters: UpkeepCounters,
        *,
        interval_s: float,
        block_ms: int,
        on_connected: Callable[[], Awaitable[None]],
    ) -> None:
        """`on_connected` is called once, when the server has answered for the first time."""
        self._queue = queue
        self._hub = hub
        self._streams = streams
        self._catalog = catalog
        self._headroom = headroom
        self._admission = admission
        self._figures = figures
        self._counters = counters
        self._interval_s = interval_s
        self._block_ms = block_ms
        self._on_connected = on_connected
        self._cursors: dict[str, bytes] = {}
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Run until `stop`."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._hear()), group.create_task(self._maintain())]
            await self._stopping.wait()
            for task in tasks:
                task.cancel()

    def stop(self) -> None:
        """End `run`. The loops look at the flag too: the Redis client can swallow a cancellation."""
        self._stopping.set()

    async def _hear(self) -> None:
        """Read the reply streams of all shards with one blocking command."""
        while not self._stopping.is_set():
            if not self._cursors:
                await asyncio.sleep(_IDLE_S)
                continue
            try:
                items, moved = await self._queue.replies(dict(self._cursors), self._block_ms)
            except ServingError as error:
                log.warning("replies.unavailable", reason=error.reason)
                await asyncio.sleep(_RETRY_S)
                continue
            self._hub.dispatch(items)
            await asyncio.sleep(0)  # those who wait for these go first
            for shard, cursor in moved.items():
                if shard in self._cursors:
                    self._cursors[shard] = cursor

    async def _maintain(self) -> None:
        connected = False
        while not self._stopping.is_set():
            try:
                await self._once()
                if not connected:
                    connected = True
                    await self._on_connected()
            except ServingError as error:
                self._figures.lose()
                log.warning("upkeep.unavailable", reason=error.reason)
            await asyncio.sleep(self._interval_s)

    async def _once(self) -> None:
        await self._catalog.refresh()
        await self._headroom.measure()
        shards = self._catalog.shards()
        for shard in shards - self._cursors.keys():
            self._cursors[shard] = START_CURSOR
        for shard in self._cursors.keys() - shards:
            del self._cursors[shard]
        # A lease or stream that was lost while the server was away is made anew by this call; those who listen there
        # read the log within a second, since nothing reaches them otherwise.
        lapsed = await self._queue.heartbeat(self._cursors)
        for shard in lapsed:
            self._cursors[shard] = START_CURSOR
        await self._streams.detach_abandoned()
        for shard in shards:
            reaped, swept = await asyncio.gather(self._queue.reap(shard), self._queue.sweep(shard))
            log_upkeep(reaped, swept)
            self._counters.count(self._catalog.name_of(shard) or "", reaped, swept)
        await self._admission.settle(shards)
        await self._measure()
        log.debug("upkeep.done", shards=len(shards), streams=len(self._hub))

    async def _measure(self) -> None:
        entries = self._catalog.all_entries()
        shapes = await asyncio.gather(*(self._queue.shape(entry.card.shard) for entry in entries))
        self._figures.update(
            (
                ModelQueue(entry.card.name, entry.num_workers, shape)
                for entry, shape in zip(entries, shapes, strict=True)
            ),
            self._headroom.used_share,
        )
