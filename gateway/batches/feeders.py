"""The batches that this gateway feeds: it takes up those that nobody feeds, and gives them up when it ends."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import structlog

from common.errors import ServingError
from common.logs import frames_of
from gateway.batches.feeder import Feeder, FeedParts, FeedSettings

log = structlog.get_logger()

_GIVE_UP_S: Final = 2.0


class Feeders:
    """Runs feeders, at most `max_batches` at a time. `run` until cancelled; `take_up` from handlers of calls."""

    def __init__(self, parts: FeedParts, settings: FeedSettings, *, max_batches: int, interval_s: float) -> None:
        """`interval_s`: how often is looked for batches that nobody feeds."""
        self._parts = parts
        self._settings = settings
        self._max_batches = max_batches
        self._interval_s = interval_s
        self._feeding: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._news = asyncio.Event()

    def __len__(self) -> int:
        return len(self._feeding)

    def take_up(self) -> None:
        """Look at once: there is a new batch."""
        self._news.set()

    async def run(self) -> None:
        """Take up batches until cancelled; those that are fed then are left to other gateways."""
        try:
            while True:
                try:
                    await self._look()
                    await self._parts.forgetting.round()
                except ServingError as error:
                    log.warning("batches.store_unavailable", reason=error.reason)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), self._interval_s)
                self._news.clear()
        finally:
            tasks = list(self._feeding.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        room = self._max_batches - len(self._feeding)
        if room <= 0:
            return
        for tenant, batch_id in await self._parts.batches.due(room):
            if (tenant, batch_id) in self._feeding:
                continue  # it renews its lease late
            lease = await self._parts.batches.take(tenant, batch_id, self._settings.lease_ms)
            if lease is not None:
                feeder = Feeder(lease, self._parts, self._settings)
                self._feeding[tenant, batch_id] = asyncio.create_task(self._run((tenant, batch_id), feeder))

    async def _run(self, key: tuple[str, str], feeder: Feeder) -> None:
        try:
            await feeder.run()
        except asyncio.CancelledError:
            with contextlib.suppress(ServingError, TimeoutError):
                async with asyncio.timeout(_GIVE_UP_S):
                    await feeder.give_up_lease()
            raise
        except Exception as error:  # noqa: BLE001 - the next to take it up may fare better; nobody waits for this task
            log.error("batch.feeder_failed", batch_id=key[1], error=type(error).__name__, frames=frames_of(error))
        finally:
            del self._feeding[key]
            self._news.set()  # there is room for another
