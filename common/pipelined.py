"""Commands of many callers over one connection, one after another without waiting for each reply.

A third of what a command costs through redis-py's asyncio client: no pool, no task, no timeout object of its own. For
short commands on the way of every request; blocking ones would hold all others up. redis-py still makes the connection,
so that addresses, TLS, users and sentinels are as everywhere; then its transport is ours.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final

import hiredis
from redis._parsers.base import BaseParser
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, ReadOnlyError
from redis.exceptions import TimeoutError as RedisTimeoutError

from common.redis import Argument, Redis

_LOST: Final = "the connection was lost"


class _Replies(asyncio.Protocol):
    """Gives replies to those who wait, in order. A caller that left has its reply thrown away, so none is mistaken."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._reader = hiredis.Reader(protocolError=InvalidResponse, replyError=BaseParser.parse_error)
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self.is_open = True

    def wait(self, future: asyncio.Future[Any]) -> None:
        self._waiting.append(future)

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not False:
                self._give(reply)
        except InvalidResponse as error:
            self.end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(RedisConnectionError(_LOST))

    def end(self, error: Exception) -> None:
        """Nothing is to come any more: all who wait get the error."""
        self.is_open = False
        self._transport.abort()
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)

    def _give(self, reply: Any) -> None:
        if isinstance(reply, hiredis.PushNotification):
            return  # asked for by nobody, and no reply to anything
        future = self._waiting.popleft()
        if isinstance(reply, ReadOnlyError):
            self.is_open = False  # not the primary any more: the next command connects anew
        if future.done():
            return
        if isinstance(reply, Exception):
            future.set_exception(reply)
        else:
            future.set_result(reply)


class PipelinedConnection:
    """One connection to the server of `redis`, made when it is needed and made anew when it is lost.

    Raises what redis-py raises. A reply that takes longer than `timeout_s` ends the connection and all that wait on it,
    since nobody could tell later replies apart from it.
    """

    def __init__(self, redis: Redis, timeout_s: float) -> None:
        self._redis = redis
        self._timeout_s = timeout_s
        self._replies: _Replies | None = None
        self._connection: Any = None
        self._transport: Any = None
        self._connecting = asyncio.Lock()

    async def execute_command(self, *command: Argument) -> Any:
        """Send one command, once, and return its reply."""
        replies = self._replies
        if replies is None or not replies.is_open:
            replies = await self._connect()
        packed = hiredis.pack_command(command)  # type: ignore[arg-type]
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        replies.wait(future)  # from here on a reply must come, or later ones would go to the wrong callers
        self._transport.write(packed)
        timer = loop.call_later(self._timeout_s, self._give_up, replies)
        try:
            return await future
        finally:
            timer.cancel()

    async def aclose(self) -> None:
        """Close the connection, if there is one."""
        if self._replies is not None:
            self._replies.end(RedisConnectionError(_LOST))
        await self._drop()

    async def _connect(self) -> _Replies:
        async with self._connecting:
            if self._replies is not None and self._replies.is_open:
                return self._replies
            await self._drop()
            connection: Any = self._redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
            await connection.connect()
            self._connection, self._transport = connection, connection._writer.transport
            replies = _Replies(self._transport)
            self._transport.set_protocol(replies)
            self._replies = replies
            return replies

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)

    def _give_up(self, replies: _Replies) -> None:
        replies.end(RedisTimeoutError("the server does not answer in time"))
