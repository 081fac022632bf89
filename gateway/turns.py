"""Work that runs in threads, one piece of each tenant at a time: a flood by one holds up nobody else's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

_T = TypeVar("_T")


@dataclass(slots=True)
class _Queue:
    """A tenant's work: who holds the lock runs, the others wait in order."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    size: int = 0


class TenantTurns:
    """Runs what blocks in the event loop's thread pool, each tenant's in order of arrival."""

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}

    async def run(self, tenant: str, work: Callable[[], _T]) -> _T:
        """Return what `work` returns in a thread, once it is the tenant's turn.

        A caller that leaves gives its place in the line up; what runs already goes on to its end in the thread, and
        only then the next begins: calls given up one after another must not fill the pool.
        """
        queue = self._queues.setdefault(tenant, _Queue())
        queue.size += 1
        try:
            await queue.lock.acquire()
        except BaseException:
            self._leave(tenant, queue)
            raise
        try:
            running = asyncio.get_running_loop().run_in_executor(None, work)
        except BaseException:
            self._end(tenant, queue)
            raise
        running.add_done_callback(lambda _: self._end(tenant, queue))
        return await asyncio.shield(running)

    def _end(self, tenant: str, queue: _Queue) -> None:
        queue.lock.release()
        self._leave(tenant, queue)

    def _leave(self, tenant: str, queue: _Queue) -> None:
        queue.size -= 1
        if not queue.size:
            del self._queues[tenant]

    def __len__(self) -> int:
        """Tenants with work that runs or waits."""
        return len(self._queues)
