"""Adapters are loaded when they are needed, kept while they are used, and make room in the end for those that wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import pytest

from common.generation import AdapterRef
from worker.engine.adapters.store import AdapterStore
from worker.engine.adapters.types import ADAPTER_NOT_FOUND, Adapter, AdapterFailure, AdapterLease

WAIT_S = 20.0


def ref(name: str) -> AdapterRef:
    return AdapterRef(name, f"revision of {name}")


class Shelf:
    """Adapters of ten bytes each; loading waits for the gate."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.missing: set[str] = set()
        self.broken: set[str] = set()
        self.loads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def size(self, ref: AdapterRef) -> int:
        if ref.name in self.missing:
            raise AdapterFailure(ADAPTER_NOT_FOUND)
        return self.sizes.get(ref.name, 10)

    def load(self, ref: AdapterRef) -> Adapter:
        self.loads.append(ref.name)
        assert self.gate.wait(WAIT_S)
        if ref.name in self.broken:
            raise OSError("the disk is gone")
        return Adapter(ref, 8, self.sizes.get(ref.name, 10), form=None)


class Desk:
    """Asks a store for adapters, and hears of them in order."""

    def __init__(self, store: AdapterStore) -> None:
        self.store = store
        self.heard: queue.Queue[tuple[str, AdapterLease | AdapterFailure]] = queue.Queue()

    def ask(self, *names: str) -> None:
        for name in names:
            self.store.acquire(ref(name), lambda got, name=name: self.heard.put((name, got)))  # type: ignore[misc]

    def lease(self, name: str) -> AdapterLease:
        heard, lease = self.heard.get(timeout=WAIT_S)
        assert heard == name
        assert isinstance(lease, AdapterLease)
        assert lease.adapter.ref == ref(name)
        return lease

    def take(self, name: str) -> AdapterLease:
        self.ask(name)
        return self.lease(name)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def desk(shelf: Shelf) -> Iterator[Callable[..., Desk]]:
    stores = []

    def make(max_adapters: int = 2, max_bytes: int = 1000) -> Desk:
        stores.append(AdapterStore(shelf, max_adapters=max_adapters, max_bytes=max_bytes))
        return Desk(stores[-1])

    yield make
    for store in stores:
        store.stop()


def test_an_adapter_is_loaded_once_for_all_that_need_it(shelf: Shelf, desk: Callable[..., Desk]) -> None:
    at = desk()
    shelf.gate.clear()
    at.ask("a", "a")
    shelf.gate.set()
    first, second = at.lease("a"), at.lease("a")
    assert first.adapter is second.adapter is at.take("a").adapter
    assert shelf.loads == ["a"]


@pytest.mark.parametrize("limits", [{"max_adapters": 2}, {"max_adapters": 9, "max_bytes": 29}])
def test_the_least_recently_used_makes_room(shelf: Shelf, desk: Callable[..., Desk], limits: dict[str, int]) -> None:
    at = desk(**limits)
    for name in ("a", "b", "a", "c"):
        at.take(name).release()
    assert at.store.stats.loaded == ["a", "c"]
    at.take("b").release()  # loaded again
    assert at.store.stats.loaded == ["c", "b"]
    assert shelf.loads == ["a", "b", "c", "b"]
    assert at.store.stats.num_evictions == 2


def test_one_in_use_is_not_evicted(shelf: Shelf, desk: Callable[..., Desk]) -> None:
    at = desk()
    at.take("b").release()
    used = at.take("a")
    at.take("b").release()
    at.take("c").release()  # b went, though a is older
    assert at.store.stats.loaded == ["a", "c"]
    used.release()
    used.release()  # as if once
    at.take("c").release()
    at.take("d").release()
    assert at.store.stats.loaded == ["c", "d"]


def test_one_that_waits_gets_its_turn_however_busy_the_others_are(shelf: Shelf, desk: Callable[..., Desk]) -> None:
    at = desk()
    oldest, other = at.take("a"), at.take("b")
    at.ask("c")
    with pytest.raises(queue.Empty):
        at.heard.get(timeout=0.1)
    at.take("b").release()  # goes on
    at.ask("a")  # which makes room for c, and waits behind it
    with pytest.raises(queue.Empty):
        at.heard.get(timeout=0.1)
    oldest.release()
    waited = at.lease("c")
    with pytest.raises(queue.Empty):  # both in use again
        at.heard.get(timeout=0.1)
    other.release()
    at.lease("a").release()
    waited.release()
    assert shelf.loads == ["a", "b", "c", "a"]


def test_what_cannot_be_had_is_told_and_holds_nobody_up(shelf: Shelf, desk: Callable[..., Desk]) -> None:
    at = desk(max_bytes=50)
    shelf.missing.add("gone")
    shelf.broken.add("broken")
    shelf.sizes["huge"] = 51
    at.ask("gone", "gone", "broken", "huge", "a")
    heard = [at.heard.get(timeout=WAIT_S) for _ in range(4)]
    assert [(name, str(what)) for name, what in heard] == [
        ("gone", ADAPTER_NOT_FOUND),
        ("gone", ADAPTER_NOT_FOUND),
        ("broken", "ADAPTER_FAILED"),
        ("huge", ADAPTER_NOT_FOUND),
    ]
    at.lease("a")
    shelf.missing.clear()
    at.take("gone")
