"""Lines of log that can wait: written together a little later, under the time at which they were noted.

A line takes some ten microseconds where many are written, but ten times that where its code has to be fetched into the
caches first. That is so at the start of a generation, and there its first token would wait for it.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import structlog

AFTER_S: Final = 0.25


class _Line(NamedTuple):
    log: structlog.typing.FilteringBoundLogger
    event: str
    at: float  # seconds since the epoch
    fields: dict[str, Any]


class LateLog:
    """Writes informational lines in the order in which they came. For use in one event loop at a time."""

    def __init__(self, after_s: float = AFTER_S, wall_clock: Callable[[], float] = time.time) -> None:
        self._after_s = after_s
        self._wall_clock = wall_clock
        self._lines: list[_Line] = []
        self._loop: asyncio.AbstractEventLoop | None = None  # that will write what there is

    def info(self, log: structlog.typing.FilteringBoundLogger, event: str, **fields: Any) -> None:
        """Write a line soon, to `log`."""
        self._lines.append(_Line(log, event, self._wall_clock(), fields))
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            loop.call_later(self._after_s, self.flush, context=contextvars.Context())  # of none of those who wait

    def flush(self) -> None:
        """Write what waits: now, as at the end of a process."""
        self._loop = None
        lines, self._lines = self._lines, []
        for line in lines:
            at = datetime.fromtimestamp(line.at, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
            line.log.info(line.event, timestamp=at, **line.fields)


late_log: Final = LateLog()
"""The process's."""
