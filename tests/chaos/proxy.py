"""A proxy between two processes that can lose, delay, freeze and cut what passes through it.

One `Link` per pair of parties, over TCP or a Unix socket. What is wrong with it is set from outside and holds for all
of its connections, those that are open and those that come.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_CHUNK: Final = 1 << 16


@dataclass(slots=True)
class Weather:
    """What is wrong with a link. All of it false is a good line."""

    refuses: bool = False  # new connections are closed at once
    frozen_up: bool = False  # what the caller sends does not arrive
    frozen_down: bool = False  # what is answered does not arrive
    delay_s: float = 0.0  # of everything, on average
    jitter_s: float = 0.0
    replies_to_lose: int = 0  # the next answers are swallowed, and their connections cut


class Link:
    """A listening address whose connections are passed on to another one.

    `source` and `target` are a Unix socket's path, or "host:port". `close` ends it.
    """

    def __init__(self, name: str, source: str | Path, target: str | Path, rng: random.Random) -> None:
        self.name = name
        self.source = source
        self.weather = Weather()
        self._target = target
        self._rng = rng
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._changed = asyncio.Event()

    async def open(self) -> None:
        """Begin to listen."""
        if isinstance(self.source, Path):
            self.source.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._accept, str(self.source))
        else:
            host, _, port = self.source.rpartition(":")
            self._server = await asyncio.start_server(self._accept, host, int(port))

    async def close(self) -> None:
        """Stop listening and cut everything."""
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def change(self, **weather: Any) -> None:
        """Set what is wrong."""
        for name, value in weather.items():
            setattr(self.weather, name, value)
        self._changed.set()
        self._changed = asyncio.Event()

    def heal(self) -> None:
        """Have a good line again; what was held back arrives now."""
        self.change(refuses=False, frozen_up=False, frozen_down=False, delay_s=0.0, jitter_s=0.0, replies_to_lose=0)

    def cut(self) -> None:
        """Reset all connections."""
        writers, self._writers = list(self._writers), set()
        for writer in writers:
            _reset(writer)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._pass(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.weather.refuses:
            _reset(writer)
            return
        try:
            if isinstance(self._target, Path):
                far_reader, far_writer = await asyncio.open_unix_connection(str(self._target))
            else:
                host, _, port = self._target.rpartition(":")
                far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            _reset(writer)
            return
        pair = {writer, far_writer}
        self._writers |= pair
        directions: list[Coroutine[Any, Any, None]] = [
            self._copy(reader, far_writer, lambda: self.weather.frozen_up, loses=False),
            self._copy(far_reader, writer, lambda: self.weather.frozen_down, loses=True),
        ]
        tasks = [asyncio.create_task(direction) for direction in directions]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._writers -= pair
            for end in pair:
                end.close()

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_frozen: Callable[[], bool], *, loses: bool
    ) -> None:
        """Pass one direction on until its end, or until an answer is lost: whoever waits for it sees a cut line."""
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                while is_frozen():
                    await self._changed.wait()
                weather = self.weather
                if weather.delay_s:
                    await asyncio.sleep(max(0.0, self._rng.gauss(weather.delay_s, weather.jitter_s)))
                if loses and weather.replies_to_lose > 0:
                    weather.replies_to_lose -= 1
                    return
                writer.write(data)
                await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection as a crash does: TCP's with RST."""
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
