"""A TCP link to a server that can be cut, frozen and thawed: what networks do to connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # linger for no time: closing sends RST, not FIN


class Link:
    """Forwards connections to a server from a thread of its own. Use as a context manager; methods are thread-safe."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[Any] = set()
        self._flows: asyncio.Event | None = None
        self._swallows = False
        self.address = ""
        self.num_bytes = 0  # from the server to clients
        self.num_connections = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._start)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._run(self._stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def reset(self) -> None:
        """Cut all connections as a crashed peer or a firewall does; new ones are taken."""
        self._run(self._reset)

    def swallow(self) -> None:
        """Let requests through and lose every answer, until connections are cut."""
        self._swallows = True

    def freeze(self) -> None:
        """Forward nothing, and close nothing: both sides see silence."""
        self._loop.call_soon_threadsafe(self._flow().clear)

    def thaw(self) -> None:
        self._loop.call_soon_threadsafe(self._flow().set)

    def _flow(self) -> asyncio.Event:
        assert self._flows is not None
        return self._flows

    def _run(self, call: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            await call()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    async def _start(self) -> None:
        self._flows = asyncio.Event()
        self._flows.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _stop(self) -> None:
        self._server.close()
        self._flow().set()
        await self._reset()
        await asyncio.wait_for(asyncio.gather(*self._serving, return_exceptions=True), 5)

    async def _reset(self) -> None:
        self._swallows = False
        for writer in list(self._writers):
            connection: Any = writer.get_extra_info("socket")
            if connection is not None and connection.fileno() >= 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self._serving.add(asyncio.current_task())
        self.num_connections += 1
        try:
            with contextlib.suppress(OSError):
                far_reader, far_writer = await asyncio.open_connection(*self._target)
                self._writers.add(far_writer)
                try:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._pump(reader, far_writer, counts=False))
                        group.create_task(self._pump(far_reader, writer, counts=True))
                finally:
                    self._writers.discard(far_writer)
                    far_writer.transport.abort()
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(4096):
                await self._flow().wait()
                if counts and self._swallows:
                    continue
                writer.write(data)
                await writer.drain()
                if counts:
                    self.num_bytes += len(data)
        writer.transport.abort()  # one direction is over: so is the connection
