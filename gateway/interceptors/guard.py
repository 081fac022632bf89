"""Wraps every handler: credentials become a caller, bytes become a message, and whatever is raised becomes a status.

Left alone, grpc.aio answers malformed bytes and unexpected exceptions with UNKNOWN and the exception's text, which may
hold a caller's data; and a handler that raises CancelledError by itself leaves its caller waiting for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final, TypeAlias, cast

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc import error_details_pb2

from common.errors import Aborted, ClientTooSlow, InvalidRequest, ServingError
from common.logs import frames_of
from gateway.audit import Audit, CallRecord
from gateway.identity.caller import CALLER, Caller, CallInfo
from gateway.status import DOMAIN, GenerationEndedError, code_of, status_of, to_status
from gateway.telemetry.calls import CLIENT_STREAM, SERVER_STREAM, UNARY, CallMeter, NoMeter
from gateway.telemetry.spans import CallTracer, PassingTracer

log = structlog.get_logger()

_STATUS_S: Final = 1.0
_PAUSE_S: Final = 0.25  # between a client's messages, behind which it counts as one that waits for the answer
_READ_OUT_S: Final = 10.0
_MAX_SEARCHED: Final = 10_000  # messages, for the name of a field that is refused anyway

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Guard(grpc.aio.ServerInterceptor):
    """The one interceptor. `authenticate` turns a call into its caller, or raises; None asks nobody."""

    def __init__(
        self,
        authenticate: Callable[[CallInfo], Awaitable[Caller]] | None,
        prefix: str = "/torchrelay.",
        *,
        authorize: Callable[[str, Caller], None] = lambda method, caller: None,
        audit: Audit | None = None,
        meter: CallMeter | None = None,
        tracer: CallTracer | None = None,
        send_timeout_s: float = 60,
    ) -> None:
        """`authorize` raises PermissionDenied for a method that the caller may not call.

        A stream whose client leaves a message unread for longer than `send_timeout_s` ends with ClientTooSlow, and one
        of requests with Aborted where its client sends none for so long.
        """
        self._authenticate = authenticate
        self._prefix = prefix
        self._authorize = authorize
        self._audit = audit or Audit()
        self._meter: CallMeter = meter or NoMeter()
        self._tracer: CallTracer = tracer or PassingTracer()
        self._send_timeout_s = send_timeout_s
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}  # guarded, of each method that was called

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        guarded = self._handlers.get(method)
        if guarded is not None:
            return guarded
        handler: Any = await continuation(handler_call_details)
        if handler is None or not method.startswith(self._prefix):
            # Health and reflection are open, and parse for themselves.
            return cast("grpc.RpcMethodHandler[Any, Any] | None", handler)
        guarded = self._handlers[method] = self._guard(method, handler)
        return guarded

    def _guard(self, method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        deserialize = handler.request_deserializer
        if handler.request_streaming:
            behavior = self._guarded(
                method, CLIENT_STREAM, lambda data, context: self._collect(handler, deserialize, data, context)
            )
            make: Any = grpc.stream_unary_rpc_method_handler
        elif handler.response_streaming:
            behavior = self._guarded(
                method, SERVER_STREAM, lambda data, context: self._stream(method, handler, deserialize, data, context)
            )
            make = grpc.unary_stream_rpc_method_handler
        else:
            behavior = self._guarded(method, UNARY, lambda data, context: _unary(handler, deserialize, data, context))
            make = grpc.unary_unary_rpc_method_handler
        guarded: grpc.RpcMethodHandler[Any, Any] = make(
            behavior, request_deserializer=None, response_serializer=handler.response_serializer
        )
        return guarded

    def _guarded(
        self, method: str, kind: str, call: Callable[[Any, Context], Awaitable[Any]]
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        async def behavior(data: Any, context: Context) -> Any:
            record = self._audit.begin(method, context.peer())
            self._meter.began(method, kind)
            info = call_info(context)
            record.span = self._tracer.begin(method, info)
            try:
                if self._authenticate is not None:
                    caller = record.caller = await self._authenticate(info)
                    CALLER.set(caller)
                    self._authorize(method, caller)
                response = await call(data, context)
            except ClientTooSlow as error:
                # The status waits behind the unread message, with the library: it comes once the client reads on, and
                # goes with the connection. Nothing here may wait for that.
                log.info("call.too_slow", method=method)
                self._end(record, kind, *outcome_of(error))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_STATUS_S):
                        await context.abort_with_status(status_of(error))
            except BaseException as error:  # noqa: BLE001 - all of them must become a status
                self._end(record, kind, *outcome_of(error))
                if isinstance(error, Exception) and isinstance(data, AsyncIterator):
                    await _read_out(data)
                await _abort(error, context, method)
            else:
                self._end(record, kind, "OK")
                return response

        return behavior

    def _end(self, record: CallRecord, kind: str, status: str, reason: str = "") -> None:
        self._audit.end(record, status, reason)
        self._meter.ended(record.method, kind, record.caller, status, reason, time.monotonic() - record.began)
        self._tracer.end(record.span, record.caller, record.notes, status, reason)

    async def _stream(
        self, method: str, handler: Any, deserialize: Callable[[bytes], Message], data: bytes, context: Context
    ) -> None:
        """Drive a generator by hand.

        A call that ends while it writes then closes the generator at once, not when it is collected. Raises
        ClientTooSlow, when the generator is closed.
        """
        try:
            async with (
                asyncio.timeout(None) as sending,
                contextlib.aclosing(handler.unary_stream(parse(deserialize, data), context)) as responses,
            ):
                with _Patience(sending, self._send_timeout_s) as patience:
                    async for response in responses:
                        patience.waits()
                        await context.write(response)  # returns when the client's window has room: the back-pressure
                        patience.rests()
                        self._meter.sent(method, SERVER_STREAM)
        except TimeoutError as error:
            if not sending.expired():
                raise  # one of the handler's own
            raise ClientTooSlow from error

    async def _collect(
        self, handler: Any, deserialize: Callable[[bytes], Message], received: AsyncIterator[bytes], context: Context
    ) -> Any:
        """Hand a stream of requests on, each held to what a single one is. Raises Aborted for a client that stalls."""

        async def messages() -> AsyncGenerator[Message]:
            iterator = aiter(received)
            while True:
                try:
                    async with asyncio.timeout(self._send_timeout_s):
                        data = await anext(iterator)
                except StopAsyncIteration:
                    return
                except TimeoutError as error:
                    raise Aborted("the client has sent nothing for too long", reason="CLIENT_STALLED") from error
                yield parse(deserialize, data)

        async with contextlib.aclosing(messages()) as requests:
            return await handler.stream_unary(requests, context)


class _Patience:
    """Lets a timeout expire once something has been waited for longer than a limit, by up to a quarter of it.

    To move the timeout for each message instead costs five times as much, and there is one for each token.
    """

    def __init__(self, timeout: asyncio.Timeout, limit_s: float) -> None:
        self._timeout = timeout
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> _Patience:
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def waits(self) -> None:
        self._since = self._loop.time()
        if self._timer is None:  # not before: a job is not queued any later for it
            self._timer = self._loop.call_later(self._limit_s / 4, self._look)

    def rests(self) -> None:
        self._since = None

    def _look(self) -> None:
        now = self._loop.time()
        if self._since is not None and now - self._since > self._limit_s:
            self._timeout.reschedule(now)
        else:
            self._timer = self._loop.call_later(self._limit_s / 4, self._look)


async def _read_out(received: AsyncIterator[bytes]) -> None:
    """Read a stream of requests that is refused until its client has sent all, pauses, or goes on for too long.

    A client whose write meets the end of its call may see that as an error of its own library, and never learn of the
    status: grpc.aio's does, and calls it INTERNAL.
    """
    with contextlib.suppress(TimeoutError, StopAsyncIteration):
        async with asyncio.timeout(_READ_OUT_S):
            while True:
                async with asyncio.timeout(_PAUSE_S):
                    await anext(received)


def call_info(context: Context) -> CallInfo:
    """Return what a call brings along to show whose it is."""
    metadata: Any = context.invocation_metadata() or ()
    return CallInfo(metadata, context.peer(), context.auth_context())


async def _unary(handler: Any, deserialize: Callable[[bytes], Message], data: bytes, context: Context) -> Any:
    return await handler.unary_unary(parse(deserialize, data), context)


def parse(deserialize: Callable[[bytes], Message], data: bytes) -> Message:
    """Return the message. Raises InvalidRequest for bytes that are none, and for unknown fields."""
    try:
        message = deserialize(data)
    except (DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest("the request is not a valid message", reason="MALFORMED_MESSAGE") from error
    if not drop_unknown_fields(message):
        return message
    unknown = find_unknown_field(deserialize(data))
    if unknown is None:  # too many messages to look for it in
        raise InvalidRequest("a field is not known to this server", reason="UNKNOWN_FIELD")
    number = unknown.rpartition(".")[2]
    raise InvalidRequest(f"field number {number} is not known to this server", reason="UNKNOWN_FIELD", field=unknown)


def drop_unknown_fields(message: Message) -> bool:
    """Take out all fields that this server does not know; return whether there was any.

    The library looks, not Python: a message of some megabytes can hold a million others.
    """
    size = message.ByteSize()
    message.DiscardUnknownFields()
    return message.ByteSize() != size


def find_unknown_field(message: Message, max_messages: int = _MAX_SEARCHED) -> str | None:
    """Return the path of the first field that this server does not know, its number last.

    None if there is none in the first `max_messages` messages.
    """
    left = max_messages

    def find(message: Message, path: str) -> str | None:
        nonlocal left
        left -= 1
        unknown = UnknownFieldSet(message)
        if len(unknown):
            return f"{path}{unknown[0].field_number}"
        for descriptor, value in message.ListFields():
            if descriptor.message_type is None:
                continue
            for item_path, item in _messages_of(descriptor, value, f"{path}{descriptor.name}"):
                if left <= 0:
                    return None
                found = find(item, item_path)
                if found is not None:
                    return found
        return None

    return find(message, "")


def _messages_of(descriptor: Any, value: Any, path: str) -> Iterator[tuple[str, Message]]:
    """Yield the messages that a field holds, and the beginning of their fields' paths."""
    if descriptor.message_type.GetOptions().map_entry:
        if descriptor.message_type.fields_by_name["value"].message_type is not None:
            for key in value:
                yield f"{path}[].", value[key]
    elif descriptor.is_repeated:
        for index, item in enumerate(value):
            yield f"{path}[{index}].", item
    else:
        yield f"{path}.", value


def outcome_of(error: BaseException) -> tuple[str, str]:
    """Return the status that a call ends with by an error, and its reason."""
    if isinstance(error, GenerationEndedError):
        error = error.error
    if isinstance(error, ServingError):
        return code_of(error).name, error.reason
    if isinstance(error, asyncio.CancelledError):
        return "CANCELLED", ""
    return "INTERNAL", type(error).__name__


async def _abort(error: BaseException, context: Context, method: str) -> None:
    """End the call with the error's status; let pass what nobody waits for."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise error  # the caller went away, its deadline passed, or the server stops
    if isinstance(error, ServingError):
        await context.abort_with_status(status_of(error))
    if isinstance(error, GenerationEndedError):
        await context.abort_with_status(status_of(error.error, error.usage))
    if not isinstance(error, Exception | asyncio.CancelledError):
        raise error  # KeyboardInterrupt, SystemExit
    incident = secrets.token_hex(8)
    # Where, not what: the text of an exception may hold what a caller wrote.
    log.error("call.failed", method=method, incident=incident, error=type(error).__name__, frames=frames_of(error))
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"incident": incident})
    await context.abort_with_status(to_status(grpc.StatusCode.INTERNAL, f"internal error {incident}", [info]))
