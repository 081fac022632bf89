"""Commands and replies of the hot paths, over connections that redis-py has opened.

redis-py's asyncio client takes several times as long over a command as the command itself: a connection from the pool,
a task's time limit, a stream's reader and writer, counters. Whatever waits for a token waits for that too, and it was a
quarter of what a token costs a gateway and a third of what it costs the agent. Here redis-py still finds the server,
opens the connection and signs in; what is sent then, and what comes, goes through nothing but hiredis.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import hiredis
import redis.asyncio as redis_asyncio
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection, ConnectionPool

Argument: TypeAlias = str | bytes | int | float

_SCRIPTS: Final = frozenset({"EVALSHA", "EVAL"})
_INCOMPLETE: Final = object()


class Wire(asyncio.Protocol):
    """One open connection. Commands may be sent while others wait: replies come in the order of the commands."""

    def __init__(self, connection: AbstractConnection) -> None:
        """Take over what `connection` has opened, which is not to be used any more."""
        self._timeout_s = connection.socket_timeout or math.inf
        self._reader = hiredis.Reader(
            protocolError=redis_errors.InvalidResponse,
            replyError=connection._parser.parse_error,
            notEnoughData=_INCOMPLETE,
        )
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[asyncio.Future[list[Any]], int, float]] = (
            deque()
        )  # replies still to come, since when
        self._replies: list[Any] = []  # of the first of those
        self._watchdog: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._lost: Exception | None = None
        assert connection._writer is not None, "not connected"
        self._writer = connection._writer  # closes the transport when it is collected
        self._transport = self._writer.transport
        connection._writer = connection._reader = None
        self._transport.set_protocol(self)

    @property
    def is_usable(self) -> bool:
        """Whether the connection is open."""
        return self._lost is None

    async def send(self, *commands: Sequence[Argument]) -> list[Any]:
        """Send commands in one write, and return their replies; an error reply is returned in its place.

        Raises redis-py's ConnectionError and TimeoutError: then each may have taken effect or not. Who is cancelled
        leaves the reply to nobody.
        """
        if not self._writable.is_set():
            await self._writable.wait()
        if self._lost is not None:
            raise self._lost
        packed = b"".join(map(_pack, commands))  # raises for what cannot be sent, before a reply is waited for
        answer: asyncio.Future[list[Any]] = self._loop.create_future()
        self._waiting.append((answer, len(commands), self._loop.time()))
        self._transport.write(packed)
        if self._watchdog is None and self._timeout_s < math.inf:
            self._watchdog = self._loop.call_later(self._timeout_s, self._watch)
        return await answer

    def close(self, error: Exception | None = None) -> None:
        """Close at once; whoever waits gets the error."""
        self._fail(error or redis_errors.ConnectionError("the connection was closed"))
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not _INCOMPLETE:
                if not isinstance(reply, hiredis.PushNotification):
                    self._take(reply)
        except (redis_errors.InvalidResponse, LookupError) as error:
            self.close(redis_errors.ConnectionError(f"the server's answer makes no sense: {type(error).__name__}"))

    def _take(self, reply: Any) -> None:
        answer, number, _ = self._waiting[0]
        self._replies.append(reply)
        if len(self._replies) == number:
            self._waiting.popleft()
            if not answer.done():
                answer.set_result(self._replies)
            self._replies = []

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(redis_errors.ConnectionError("the connection was lost"))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _watch(self) -> None:
        """Give the connection up once a command has waited for too long. One timer for all of them."""
        self._watchdog = None
        if not self._waiting:
            return
        left_s = self._waiting[0][2] + self._timeout_s - self._loop.time()
        if left_s <= 0:
            self.close(redis_errors.TimeoutError("no answer within the time limit"))
        else:
            self._watchdog = self._loop.call_later(left_s, self._watch)

    def _fail(self, error: Exception) -> None:
        if self._lost is None:
            self._lost = error
        self._writable.set()
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        while self._waiting:
            answer = self._waiting.popleft()[0]
            if not answer.done():
                answer.set_exception(error)


class WiredRedis(redis_asyncio.Redis):
    """redis-py's client, whose scripts share one wire, and whose waiting commands have one each."""

    _shared: Wire | None = None
    _opening: asyncio.Task[Wire] | None = None  # of the shared one, for all who need it
    _idle: list[Wire]  # ready for commands that wait
    _in_use: set[Wire]  # by such commands

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._idle = []
        self._in_use = set()

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """As redis-py's. A script's answer comes as the server sent it: redis-py has nothing to convert in it."""
        if args[0] not in _SCRIPTS or self.single_connection_client:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        wire = self._shared
        if wire is None or not wire.is_usable:
            wire = await self._open_shared()
        (reply,) = await wire.send(args)
        if isinstance(reply, Exception):
            _note(wire, reply)
            raise reply
        return reply

    async def _open_shared(self) -> Wire:
        """Open the shared wire, or fail, together with all who ask meanwhile: in turns the last would wait long."""
        if self._opening is None:
            self._opening = asyncio.create_task(_open(self.connection_pool))
            self._opening.add_done_callback(self._opened)
        return await asyncio.shield(self._opening)

    def _opened(self, opening: asyncio.Task[Wire]) -> None:
        self._opening = None
        if not opening.cancelled() and opening.exception() is None:
            self._shared = opening.result()

    async def execute_together(self, *commands: Sequence[Argument]) -> list[Any]:
        """Send commands that may wait in one write, and return their replies as the server sent them, errors too.

        The server takes up each when the one before has ended, also where that waits. Raises redis-py's errors of
        connections: then any of them may have taken effect.
        """
        wire = None
        while self._idle and (wire is None or not wire.is_usable):
            wire = self._idle.pop()
        if wire is None or not wire.is_usable:
            wire = await _open(self.connection_pool)
        self._in_use.add(wire)
        try:
            replies = await wire.send(*commands)
        except BaseException:  # cancelled: nobody else is to wait behind what is still waited for
            wire.close()
            raise
        finally:
            self._in_use.discard(wire)
        for reply in replies:
            if isinstance(reply, Exception):
                _note(wire, reply)
        self._idle.append(wire)
        return replies

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close all connections; whoever waits gets redis-py's ConnectionError."""
        if self._opening is not None:
            await asyncio.wait([self._opening])  # bounded by what a connection may take
        for wire in (*self._idle, *self._in_use, *filter(None, [self._shared])):
            wire.close()
        self._idle = []
        self._shared = None
        await super().aclose(close_connection_pool)


def _pack(command: Sequence[Argument]) -> bytes:
    packed: bytes = hiredis.pack_command(tuple(command))  # type: ignore[arg-type]  # typed as a tuple of one
    return packed


async def _open(pool: ConnectionPool) -> Wire:
    connection: AbstractConnection = pool.make_connection()  # type: ignore[no-untyped-call]
    await connection.connect()  # type: ignore[no-untyped-call]
    return Wire(connection)


def _note(wire: Wire, error: Exception) -> None:
    """A server that has become a replica: the next connection is to look for the primary."""
    if isinstance(error, redis_errors.ReadOnlyError):
        wire.close()
