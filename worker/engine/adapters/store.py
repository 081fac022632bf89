"""The adapters in memory: loaded when a request needs one, kept while any does, evicted when others need the room.

Loading happens on a thread of its own; the engine's steps go on. A request whose adapter has no room waits. So that it
does not wait for ever while requests of those that are loaded keep coming, the least recently used one is then closed:
its requests end, newer ones of it wait behind the first, and it makes room.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from common.generation import AdapterRef
from worker.engine.adapters.types import ADAPTER_NOT_FOUND, Adapter, AdapterFailure, AdapterLease

_log = structlog.get_logger(__name__)

OnReady = Callable[[AdapterLease | AdapterFailure], None]


class AdapterSource(Protocol):
    """Where adapters come from. Both methods may take long, and raise AdapterFailure."""

    def size(self, ref: AdapterRef) -> int:
        """Bytes that it takes in memory."""
        ...

    def load(self, ref: AdapterRef) -> Adapter: ...


@dataclass(slots=True)
class _Slot:
    adapter: Adapter
    num_leases: int = 0
    is_closed: bool = False  # nobody new gets it, so that it makes room
    last_use: int = 0


@dataclass(slots=True)
class _Waiter:
    ref: AdapterRef
    ready: OnReady


@dataclass(slots=True)
class StoreStats:
    """Figures since the start."""

    num_loads: int = 0
    num_evictions: int = 0
    loaded: list[str] = field(default_factory=list)  # names, the least recently used first


class AdapterStore:
    """Keeps at most so many adapters, of so many bytes together, in memory. For any thread."""

    def __init__(self, source: AdapterSource, *, max_adapters: int, max_bytes: int) -> None:
        """`source` must not have an adapter of more than `max_bytes`."""
        self._source = source
        self._max_adapters = max_adapters
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._slots: dict[AdapterRef, _Slot] = {}  # guarded by _changed, as all below
        self._waiters: deque[_Waiter] = deque()
        self._num_uses = 0
        self._stats = StoreStats()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="adapters", daemon=True)
        self._thread.start()

    def acquire(self, ref: AdapterRef, ready: OnReady) -> None:
        """Call `ready` with a lease, or with why there is none; at once for a loaded one, else from a thread."""
        with self._changed:
            lease = self._lease(ref)
            if lease is None:
                self._waiters.append(_Waiter(ref, ready))
                self._changed.notify()
        if lease is not None:
            ready(lease)

    def stop(self) -> None:
        """Load nothing more; what waits is never told."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()

    @property
    def stats(self) -> StoreStats:
        with self._changed:
            slots = sorted(self._slots.values(), key=lambda slot: slot.last_use)
            return StoreStats(
                self._stats.num_loads, self._stats.num_evictions, [slot.adapter.ref.name for slot in slots]
            )

    def _lease(self, ref: AdapterRef) -> AdapterLease | None:
        slot = self._slots.get(ref)
        if slot is None or slot.is_closed:
            return None
        self._num_uses += 1
        slot.num_leases += 1
        slot.last_use = self._num_uses
        return AdapterLease(slot.adapter, lambda: self._release(slot))

    def _release(self, slot: _Slot) -> None:
        with self._changed:
            slot.num_leases -= 1
            if not slot.num_leases:
                self._changed.notify()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopped or self._waiters)
                if self._is_stopped:
                    return
                ref = self._waiters[0].ref
                if ref in self._slots:
                    self._slots[ref].is_closed = False  # its turn has come again
                is_loaded = ref in self._slots
            if not is_loaded:
                self._load(ref)
            self._hand_out()

    def _load(self, ref: AdapterRef) -> None:
        """Load the adapter that the first waiter needs; if that fails, all that wait for it are told."""
        failure: AdapterFailure | None = None
        try:
            size = self._source.size(ref)
            if not self._make_room(size):
                return  # stopped
            adapter = self._source.load(ref)
        except AdapterFailure as error:
            failure = error
        except Exception:  # noqa: BLE001 - a thread that ended would leave all to wait
            _log.exception("adapter.failed", adapter=ref.name, revision=ref.revision[:16])
            failure = AdapterFailure("ADAPTER_FAILED")
        with self._changed:
            if failure is None:
                self._stats.num_loads += 1
                self._slots[ref] = _Slot(adapter, last_use=self._num_uses)
                _log.info("adapter.loaded", adapter=ref.name, revision=ref.revision[:16], bytes=adapter.num_bytes)
                return
            told = [waiter for waiter in self._waiters if waiter.ref == ref]
            self._waiters = deque(waiter for waiter in self._waiters if waiter.ref != ref)
        _log.warning("adapter.unavailable", adapter=ref.name, revision=ref.revision[:16], reason=str(failure))
        for waiter in told:
            waiter.ready(failure)

    def _make_room(self, size: int) -> bool:
        """Evict until there is room, the least recently used first, and wait for those in use; False once stopped."""
        with self._changed:
            while not self._is_stopped:
                used = sum(slot.adapter.num_bytes for slot in self._slots.values())
                if len(self._slots) < self._max_adapters and used + size <= self._max_bytes:
                    return True
                by_age = sorted(self._slots.items(), key=lambda item: item[1].last_use)
                idle = next((ref for ref, slot in by_age if not slot.num_leases), None)
                if idle is not None:
                    del self._slots[idle]
                    self._stats.num_evictions += 1
                    _log.info("adapter.evicted", adapter=idle.name, revision=idle.revision[:16])
                    continue
                if not by_age:
                    raise AdapterFailure(ADAPTER_NOT_FOUND)  # larger than the bound
                if not any(slot.is_closed for slot in self._slots.values()):
                    by_age[0][1].is_closed = True
                self._changed.wait()
        return False

    def _hand_out(self) -> None:
        """Give leases to all that wait for what is loaded and open."""
        with self._changed:
            ready: list[tuple[_Waiter, AdapterLease]] = []
            rest: deque[_Waiter] = deque()
            for waiter in self._waiters:
                lease = self._lease(waiter.ref)
                if lease is None:
                    rest.append(waiter)
                else:
                    ready.append((waiter, lease))
            self._waiters = rest
        for waiter, lease in ready:
            waiter.ready(lease)
