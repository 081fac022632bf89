"""Work beside the steps, in which tenants take turns: one that brings much delays the others by no more than a call."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class TakingTurns:
    """Runs calls on a thread of its own, one at a time: a tenant that waits has one done, then the next tenant has.

    A tenant's own are done in their order. One thread: what steps leave of the processor is not much, and two calls at
    once would only both take longer.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[Callable[[], None]]] = {}  # by tenant, the next one in turn first; none is empty

    def submit(self, tenant: str, call: Callable[[], None]) -> None:
        """Run a call, which raises nothing, once it is its turn."""
        with self._lock:
            self._waiting.setdefault(tenant, deque()).append(call)
        self._thread.submit(self._run_next)  # as many times as there are calls

    def _run_next(self) -> None:
        with self._lock:
            tenant = next(iter(self._waiting))
            calls = self._waiting.pop(tenant)
            call = calls.popleft()
            if calls:
                self._waiting[tenant] = calls  # the last in turn from now on
        call()
