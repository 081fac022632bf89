"""The folder of adapters beside a model: which there are, looked at again and again while the worker runs.

Each sub-directory with both files of PEFT's format is an adapter of that name; a revision is the digest of the files.
What cannot be served is logged once, with why, and left out.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import structlog

from common.errors import ServingError
from common.generation import AdapterRef
from common.registry import AdapterCard
from worker.engine.adapters.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterError,
    AdapterLimits,
    AdapterWeights,
    LinearShape,
    read_adapter,
)
from worker.engine.adapters.types import ADAPTER_NOT_FOUND, Adapter, AdapterFailure

log = structlog.get_logger()

MAX_ADAPTERS: Final = 1000  # of one folder: each is in the card that gateways read
_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)

# Place, size and time of change of both files: what differs was written anew.
_Stamp: TypeAlias = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found in a sub-directory, as long as its stamp stays."""

    stamp: _Stamp
    card: AdapterCard | None  # None: it cannot be served
    num_bytes: int = 0


class AdapterFolder:
    """Reads the adapters of a folder for one model. For any thread; files are read one at a time."""

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, LinearShape],
        limits: AdapterLimits,
        make: Callable[[AdapterRef, AdapterWeights], Adapter],
    ) -> None:
        """`shapes` are the layers that adapters may add to; `make` is what the runner makes of weights."""
        self._folder = folder
        self._shapes = shapes
        self._limits = limits
        self._make = make
        self._reading = threading.Lock()  # held by every change of `_known`
        self._known: dict[str, _Known] = {}
        self._is_readable = True

    def scan(self) -> tuple[AdapterCard, ...]:
        """Look at the folder; return what can be served, by name. Files that have not changed are not read again."""
        try:
            names = sorted(entry.name for entry in os.scandir(self._folder) if entry.is_dir())
        except OSError as error:
            if self._is_readable:
                log.warning("adapters.unreadable", folder=str(self._folder), reason=str(error))
            self._is_readable = False
            names = []
        else:
            self._is_readable = True
        names = [name for name in names if not name.startswith(".")]
        with self._reading:
            for name in self._known.keys() - set(names):
                if self._known.pop(name).card is not None:
                    log.info("adapter.removed", adapter=name)
            cards = [card for name in names if (card := self._look(name)) is not None]
        if len(cards) > MAX_ADAPTERS:
            log.warning("adapters.too_many", found=len(cards), limit=MAX_ADAPTERS)
        return tuple(cards[:MAX_ADAPTERS])

    def size(self, ref: AdapterRef) -> int:
        """As `AdapterSource.size`: of what is on disk now. Raises AdapterFailure."""
        with self._reading:
            card = self._look(ref.name) if _NAME.fullmatch(ref.name) else None
            if card is None or card.revision != ref.revision:
                raise AdapterFailure(ADAPTER_NOT_FOUND)
            return self._known[ref.name].num_bytes

    def load(self, ref: AdapterRef) -> Adapter:
        """As `AdapterSource.load`. Raises AdapterFailure where the revision is not there any more."""
        try:
            weights = read_adapter(self._folder / ref.name, self._shapes, self._limits)
        except (AdapterError, OSError) as error:
            log.warning("adapter.refused", adapter=ref.name, reason=str(error))
            raise AdapterFailure(ADAPTER_NOT_FOUND) from error
        if weights.revision != ref.revision:
            raise AdapterFailure(ADAPTER_NOT_FOUND)
        return self._make(ref, weights)

    def _look(self, name: str) -> AdapterCard | None:
        """Return what a sub-directory holds, read again if it has changed."""
        folder = self._folder / name
        stamp = _stamp(folder)
        if stamp is None:  # not an adapter, or not whole yet
            self._known.pop(name, None)
            return None
        known = self._known.get(name)
        if known is None or known.stamp != stamp:
            known = self._known[name] = self._read(name, folder, stamp)
        return known.card

    def _read(self, name: str, folder: Path, stamp: _Stamp) -> _Known:
        try:
            weights = read_named(name, folder, self._shapes, self._limits)
        except (AdapterError, OSError) as error:
            log.warning("adapter.refused", adapter=name[:200], reason=str(error))
            return _Known(stamp, None)
        log.info("adapter.found", adapter=name, revision=weights.revision[:16], rank=weights.rank)
        return _Known(stamp, AdapterCard(name, weights.revision, weights.rank), weights.num_bytes)


def read_named(name: str, folder: Path, shapes: Mapping[str, LinearShape], limits: AdapterLimits) -> AdapterWeights:
    """Read an adapter that is to be asked for by this name. Raises AdapterError and OSError."""
    if not _NAME.fullmatch(name):
        raise AdapterError("its name has others than A-Z a-z 0-9 . _ -, or is longer than 128")
    return read_adapter(folder, shapes, limits)


def read_cards(
    given: Iterable[str], shapes: Mapping[str, LinearShape], limits: AdapterLimits
) -> tuple[AdapterCard, ...]:
    """Return what to publish of adapters that are given as NAME=DIR, by name. Raises AdapterError."""
    cards: dict[str, AdapterCard] = {}
    for one in given:
        name, _, folder = one.partition("=")
        if not name or not folder:
            raise AdapterError(f"{one!r} is no adapter: it takes NAME=DIR")
        if name in cards:
            raise AdapterError(f"the adapter {name} is given twice")
        try:
            weights = read_named(name, Path(folder), shapes, limits)
        except OSError as error:
            raise AdapterError(f"the adapter {name} cannot be read: {error}") from error
        except AdapterError as error:
            raise AdapterError(f"the adapter {name} cannot be served: {error}") from error
        cards[name] = AdapterCard(name, weights.revision, weights.rank)
    if len(cards) > MAX_ADAPTERS:
        raise AdapterError(f"{len(cards)} adapters are given; a model has at most {MAX_ADAPTERS}")
    return tuple(cards[name] for name in sorted(cards))


def whole_folders(folder: Path) -> list[str]:
    """Return the adapters of a folder as NAME=DIR, whether or not they can be served. Raises AdapterError."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except OSError as error:
        raise AdapterError(f"the folder of adapters cannot be read: {error}") from error
    return [f"{name}={folder / name}" for name in names if _stamp(folder / name) is not None]


def _stamp(folder: Path) -> _Stamp | None:
    try:
        files = [(folder / name).stat() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    except OSError:
        return None
    return tuple((file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns) for file in files)


async def watch_adapters(
    scan: Callable[[], tuple[AdapterCard, ...]],
    known: tuple[AdapterCard, ...],
    tell: Callable[[tuple[AdapterCard, ...]], Awaitable[None]],
    interval_s: float,
) -> None:
    """Scan for ever, and tell of each change; `known` is what was told already."""
    while True:
        await asyncio.sleep(interval_s)
        found = await asyncio.to_thread(scan)
        if found != known:
            try:
                await tell(found)
            except ServingError as error:  # told again at the next look
                log.warning("adapters.not_published", reason=error.reason)
            else:
                known = found
