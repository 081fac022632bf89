"""Who did what: one line of JSON for each call, and one when a generation is accepted. Ids, counts and digests alone.

What a line holds: time (UTC), event, method, tenant, credential and how it was shown, peer, and what handlers note:
the generation, its model, how many tokens, a keyed digest of the request; for operators' calls what they acted on. At
the end of a call also its status, the reason of a refusal, and how long it took.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from common.log_sink import LineSink
from gateway.identity.caller import Caller

log = structlog.get_logger()

_LOOK_AGAIN_S: Final = 5.0
_ENCODER: Final = msgspec.json.Encoder()


class AuditFile:
    """Appends lines to a file that may be moved away while we run: a new one is begun within seconds."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises OSError if the file cannot be opened."""
        self._path = path
        self._clock = clock
        self._looked_at = clock()
        self._descriptor = self._open()
        self._sink = LineSink(lambda data: os.write(self._descriptor, data))

    def write(self, line: str) -> None:
        """Append a line. One that the disk has no room for is lost, and counted in the next."""
        if self._clock() - self._looked_at >= _LOOK_AGAIN_S:
            self._looked_at = self._clock()
            self._follow()
        self._sink.write_line(line)

    def close(self) -> None:
        os.close(self._descriptor)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _follow(self) -> None:
        try:
            found = os.stat(self._path)
            own = os.fstat(self._descriptor)
            if (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino):
                return
        except FileNotFoundError:
            pass
        except OSError:
            return
        try:
            opened = self._open()
        except OSError:
            return  # the old one takes lines meanwhile
        os.close(self._descriptor)
        self._descriptor = opened


@dataclass(slots=True)
class CallRecord:
    """What is known of the call that is being served."""

    method: str
    peer: str
    caller: Caller | None = None
    notes: dict[str, str | int] = field(default_factory=dict)
    began: float = 0.0
    span: Any = None  # of whoever traces the call


_RECORD: ContextVar[CallRecord | None] = ContextVar("torchrelay_audit", default=None)
_AUDIT: ContextVar[Audit | None] = ContextVar("torchrelay_audit_log", default=None)


class Audit:
    """Writes records of calls: to `file`, if there is one, and with `to_log` to the process's log."""

    def __init__(
        self,
        file: AuditFile | None = None,
        *,
        to_log: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = file
        self._to_log = to_log
        self._clock = clock
        self._wall_clock = wall_clock

    @property
    def is_kept(self) -> bool:
        """Whether records are written anywhere."""
        return self._file is not None or self._to_log

    def begin(self, method: str, peer: str) -> CallRecord:
        """Begin the record of a call; `note` and `mark` of its handler then reach it."""
        record = CallRecord(method, peer, began=self._clock())
        _RECORD.set(record)
        _AUDIT.set(self)
        return record

    def end(self, record: CallRecord, status: str, reason: str = "") -> None:
        """Write the end of a call."""
        ended: dict[str, str | int] = {"status": status, "ms": round((self._clock() - record.began) * 1000)}
        if reason:
            ended["reason"] = reason
        self.write("call", record, ended)

    def write(self, event: str, record: CallRecord, more: dict[str, str | int]) -> None:
        if not self.is_kept:
            return
        line: dict[str, Any] = {"event": event, "method": record.method, "peer": record.peer}
        if record.caller is not None:
            caller = record.caller
            line |= {"tenant": caller.tenant, "credential": caller.key_id, "by": caller.method}
        line |= record.notes
        line |= more
        if self._file is not None:
            moment = datetime.fromtimestamp(self._wall_clock(), UTC).isoformat(timespec="milliseconds")
            self._file.write(_ENCODER.encode({"time": moment, **line}).decode())
        if self._to_log:
            log.info("audit", **{"of" if name == "event" else name: value for name, value in line.items()})


def call_began() -> float | None:
    """Return when the call that is being served arrived, by time.monotonic(); None outside of calls."""
    record = _RECORD.get()
    return None if record is None else record.began


def note(**fields: str | int) -> None:
    """Add fields to the record of the call that is being served. Never text of callers: ids, counts and digests."""
    record = _RECORD.get()
    if record is not None:
        record.notes |= fields


def is_kept() -> bool:
    """Return whether the record of the call that is being served is written anywhere."""
    audit = _AUDIT.get()
    return audit is not None and audit.is_kept


def mark(event: str) -> None:
    """Write a line for what the call has done so far: the process may not live to write its end."""
    record, audit = _RECORD.get(), _AUDIT.get()
    if record is not None and audit is not None:
        audit.write(event, record, {})
