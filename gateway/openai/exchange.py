"""One HTTP request and its answer, below the routes: who calls, the body, what an error becomes, who has gone away."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack
from typing import Any, Final, TypeAlias

import msgspec
import structlog
from starlette.types import Message, Receive, Scope, Send

from common.errors import ClientTooSlow, ServingError, Unavailable
from common.logs import frames_of
from gateway.audit import Audit, CallRecord
from gateway.identity.caller import CALLER, Caller, CallInfo
from gateway.interceptors.guard import outcome_of
from gateway.openai.errors import ErrorAnswer, HttpError, answer_to, body_of, merge_headers
from gateway.openai.server import abort, auth_context_of
from gateway.places import Places
from gateway.settings import GatewaySettings
from gateway.status import GenerationEndedError
from gateway.telemetry.calls import UNARY, CallMeter, NoMeter
from gateway.telemetry.spans import CallTracer, PassingTracer

log = structlog.get_logger()

_RETRY_AFTER_MS: Final = 500
_LAST_WORD_S: Final = 1.0  # how long a client may take to read why its stream ends, where the server stops
_BODY_S: Final = 30.0  # how long a body may take to arrive
_JSON: Final = {"content-type": "application/json"}
_EVENTS: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_COMMENT: Final = b": \n\n"
_ENCODER: Final = msgspec.json.Encoder()

Run: TypeAlias = "Callable[[Exchange], Awaitable[None]]"


class Gone(Exception):
    """The client has gone away: nobody waits for an answer."""


class Exchange:
    """A request that is being answered. Not for more than one task but for `until_gone`."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, *, bodies: Places, send_timeout_s: float, is_chat: bool
    ) -> None:
        self.scope = scope
        self.headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        self.generation_id = ""  # once there is one, told in a header
        self._receive = receive
        self._send = send
        self._bodies = bodies
        self._held = ExitStack()
        self._send_timeout_s = send_timeout_s
        self._is_chat = is_chat
        self._has_begun = False

    def header(self, name: str) -> str:
        """Return the last value of a header, empty if there is none."""
        return next((value for key, value in reversed(self.headers) if key == name), "")

    def peer(self) -> str:
        """Return who is at the other end, as gRPC names it."""
        client = self.scope.get("client")
        if not client:
            return "unix:"
        host, port = client
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

    def call_info(self) -> CallInfo:
        """Return what the call brings along to show whose it is."""
        return CallInfo(self.headers, self.peer(), auth_context_of(self.scope))

    async def body(self, max_bytes: int, tenant: str) -> bytes:
        """Read the body, which is held up to `close`: its bytes count as the tenant's until then.

        Raises HttpError for one that is too long or does not arrive, ResourceExhausted, Gone.
        """
        length = self.header("content-length")
        told = int(length[:20]) if length.isdecimal() else 0
        if told > max_bytes:
            raise _too_long(max_bytes)
        self._hold(tenant, told)
        pieces, size = list[bytes](), 0
        try:
            async with asyncio.timeout(_BODY_S):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    piece = message.get("body", b"")
                    size += len(piece)
                    if size > max_bytes:
                        raise _too_long(max_bytes)
                    if size > told:  # it comes in chunks, whose sum nobody told before
                        self._hold(tenant, size - told)
                        told = size
                    pieces.append(piece)
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            raise HttpError(408, "the body did not arrive in time", "request_timeout") from None

    def _hold(self, tenant: str, num_bytes: int) -> None:
        """Raises ResourceExhausted."""
        self._held.enter_context(self._bodies.take(tenant, num_bytes))

    def close(self) -> None:
        """The call is over."""
        self._held.close()

    async def until_gone(self) -> None:
        """Return when the client has gone away; only once the body has been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send a whole answer."""
        data = _ENCODER.encode(value)
        own = {"content-length": str(len(data)), **_JSON, **self._id_header(), **(headers or {})}
        self._has_begun = True
        await self._out({"type": "http.response.start", "status": status, "headers": merge_headers(own)})
        await self._out({"type": "http.response.body", "body": data})

    async def answer_events(self, chunks: AsyncIterator[Any]) -> None:
        """Send server-sent events, one for each chunk, and the mark of the end. An error in between is the last event.

        A chunk that is None is a comment: proxies end a connection that is silent for long.

        Raises ClientTooSlow, and whatever the chunks raise, once that has been sent: whatever it is, no client takes
        what it has for the whole.
        """
        self._has_begun = True
        headers = merge_headers(_EVENTS, self._id_header())
        await self._out({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async with contextlib.aclosing(chunks) as closing:  # type: ignore[type-var]
                async for chunk in closing:
                    if chunk is None:
                        await self._out({"type": "http.response.body", "body": _COMMENT, "more_body": True})
                    else:
                        await self._event(_ENCODER.encode(chunk))
            await self._event(b"[DONE]")
        except (Exception, asyncio.CancelledError) as error:
            if not isinstance(error, ClientTooSlow):
                if isinstance(error, asyncio.CancelledError):
                    self._send_timeout_s = min(self._send_timeout_s, _LAST_WORD_S)
                with contextlib.suppress(ClientTooSlow):
                    await self._event(_ENCODER.encode(self._answer_to(error).body))
                    await self._out({"type": "http.response.body", "body": b""})
            raise
        await self._out({"type": "http.response.body", "body": b""})

    async def answer_error(self, error: BaseException) -> None:
        """Send the answer to an error, unless the answer had begun already: then it was the last event."""
        if not self._has_begun:
            found = self._answer_to(error)
            await self.answer(found.body, found.status, found.headers)

    def _answer_to(self, error: BaseException) -> ErrorAnswer:
        if isinstance(error, GenerationEndedError):
            error = error.error
        if _is_cancelled(error):
            error = Unavailable(
                "this gateway stops; another one, or the next, takes the same call again",
                reason="GATEWAY_STOPPING",
                retry_after_ms=_RETRY_AFTER_MS,
            )
        if isinstance(error, HttpError | ServingError):
            return answer_to(error, is_chat=self._is_chat)
        incident, method = secrets.token_hex(8), f"{self.scope['method']} {self.scope['path']}"
        # Where, not what: the text of an exception may hold what a caller wrote.
        log.error("call.failed", method=method, incident=incident, error=type(error).__name__, frames=frames_of(error))
        return ErrorAnswer(500, body_of(f"internal error {incident}", "server_error", None, "internal"), {})

    def _id_header(self) -> dict[str, str]:
        return {"x-request-id": self.generation_id} if self.generation_id else {}

    async def _event(self, data: bytes) -> None:
        await self._out({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

    async def _out(self, message: Message) -> None:
        """Returns when there is room for more: the back-pressure. Raises ClientTooSlow."""
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await self._send(message)
        except TimeoutError:
            abort(self.scope)  # what it has not read would otherwise be kept for it
            raise ClientTooSlow from None


class Door:
    """What stands around every route: the call is recorded, its caller known, its errors answered."""

    def __init__(
        self,
        authenticate: Callable[[CallInfo], Awaitable[Caller]],
        authorize: Callable[[str, Caller], None],
        audit: Audit,
        *,
        bodies: Places,
        send_timeout_s: float,
        meter: CallMeter | None = None,
        tracer: CallTracer | None = None,
    ) -> None:
        """`bodies` are the bytes that may be held of requests."""
        self._authenticate = authenticate
        self._authorize = authorize
        self._audit = audit
        self._bodies = bodies
        self._send_timeout_s = send_timeout_s
        self._meter: CallMeter = meter or NoMeter()
        self._tracer: CallTracer = tracer or PassingTracer()

    def route(self, method: str, run: Run, *, is_chat: bool = False) -> _Route:
        """Return the ASGI application of a path. `method` is the one of gRPC whose rights it takes."""
        return _Route(self, method, run, is_chat=is_chat)

    async def handle(self, exchange: Exchange, method: str, run: Run) -> None:
        record = self._audit.begin(method, exchange.peer())
        info = exchange.call_info()
        record.span = self._tracer.begin(method, info)
        try:
            caller = record.caller = await self._authenticate(info)
            CALLER.set(caller)
            self._authorize(method, caller)
            await run(exchange)
        except Gone:
            self._end(record, "CANCELLED")
        except BaseException as error:
            self._end(record, *_outcome_of(error))
            if not isinstance(error, Exception | asyncio.CancelledError):
                raise
            is_cancelled = _is_cancelled(error)
            with contextlib.suppress(ClientTooSlow):
                await exchange.answer_error(error)
            if is_cancelled:
                raise
        else:
            self._end(record, "OK")
        finally:
            exchange.close()

    def _end(self, record: CallRecord, status: str, reason: str = "") -> None:
        self._audit.end(record, status, reason)
        self._meter.ended(record.method, UNARY, record.caller, status, reason, time.monotonic() - record.began)
        self._tracer.end(record.span, record.caller, record.notes, status, reason)

    def exchange(self, scope: Scope, receive: Receive, send: Send, *, is_chat: bool) -> Exchange:
        """Return a request that is to be answered."""
        return Exchange(scope, receive, send, bodies=self._bodies, send_timeout_s=self._send_timeout_s, is_chat=is_chat)


class _Route:
    """An ASGI application."""

    def __init__(self, door: Door, method: str, run: Run, *, is_chat: bool) -> None:
        self._door = door
        self._method = method
        self._run = run
        self._is_chat = is_chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self._door.exchange(scope, receive, send, is_chat=self._is_chat)
        await self._door.handle(exchange, self._method, self._run)


def bodies_of(settings: GatewaySettings) -> Places:
    """Return room for the bodies of requests; each tenant has it for one of any size, while there is any."""
    return Places(
        settings.openai_max_body_bytes,
        settings.max_calls_per_tenant_share,
        few=settings.max_message_bytes,
        of="bytes of requests",
    )


async def while_wanted(exchange: Exchange, work: Awaitable[None]) -> None:
    """Do the work, or give it up when the client goes away. Raises Gone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(exchange.until_gone())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        await task
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def _is_cancelled(error: BaseException) -> bool:
    """Whether this task itself is cancelled, which is how a server ends the calls that are left when it stops."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def _too_long(max_bytes: int) -> HttpError:
    return HttpError(413, f"the body is longer than {max_bytes} bytes", "request_too_large")


def _outcome_of(error: BaseException) -> tuple[str, str]:
    return ("INVALID_ARGUMENT", error.code) if isinstance(error, HttpError) else outcome_of(error)
