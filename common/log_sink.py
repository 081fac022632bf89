"""Where log lines go: a descriptor that may be full, and must never make the process wait.

Whoever reads our standard error may stop reading: a collector that hangs, a terminal that is held, a pipe to a stopped
process. A line that cannot be written now is dropped and counted; how many were lost stands in the next one that can.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
from collections.abc import Callable
from typing import Final

_MAX_LINE_BYTES: Final = 256 << 10  # of a line that is written in parts; longer ones are cut


class LineSink:
    """Writes lines without waiting. `write` takes bytes, returns how many it took, and raises OSError if it is full."""

    def __init__(self, write: Callable[[bytes], int]) -> None:
        self._write = write
        self._rest = b""  # of a line that was written in part: nothing may come between its parts
        self._num_dropped = 0

    def write_line(self, line: str) -> None:
        """Write a line, its end added; drop it if there is no room."""
        data = line.encode(errors="backslashreplace")[:_MAX_LINE_BYTES] + b"\n"
        if not self._finish_rest():
            self._num_dropped += 1
            return
        if self._num_dropped:
            lost = json.dumps({"event": "log.dropped", "lines": self._num_dropped, "level": "warning"})
            data = lost.encode() + b"\n" + data
        try:
            self._rest = data[self._write(data) :]
        except OSError:
            self._num_dropped += 1
        else:
            self._num_dropped = 0

    def _finish_rest(self) -> bool:
        if self._rest:
            with contextlib.suppress(OSError):
                self._rest = self._rest[self._write(self._rest) :]
        return not self._rest


def writer_of(descriptor: int) -> Callable[[bytes], int]:
    """Return a write to a descriptor that does not wait, if there can be one; else the plain write.

    The descriptor itself stays as it is: other processes may share it, and would find it non-blocking too.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(mode):
        return lambda data: _send(descriptor, data)
    if stat.S_ISFIFO(mode) or os.isatty(descriptor):
        with contextlib.suppress(OSError):  # no /proc, or somebody else's terminal
            own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            return lambda data: os.write(own, data)
    return lambda data: os.write(descriptor, data)


def _send(descriptor: int, data: bytes) -> int:
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        return connection.send(data, socket.MSG_DONTWAIT)
