"""Over a real server and socket: whatever a caller sends and a handler does, a status comes back that says enough."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from common import errors
from gateway.identity.caller import Caller, CallInfo, current_caller
from gateway.interceptors.guard import Guard
from gateway.status import GenerationEndedError
from torchrelay.client.errors import RelayError, from_rpc_error
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import generation_pb2_grpc as pb_grpc

SECRET = "the caller's own words: /etc/shadow"
KEY = (("authorization", "Bearer right"),)
_GET = "/torchrelay.v1.GenerationService/GetGeneration"
_STREAM = "/torchrelay.v1.GenerationService/StreamGenerate"

SMALL_WINDOW = {"grpc__http2__lookahead_bytes": 4096, "grpc__http2__bdp_probe": 0}  # so that a write soon waits

Handler = Callable[[Any, Any], Awaitable[pb.GetGenerationResponse]]
StreamHandler = Callable[[Any, Any], AsyncIterator[pb.StreamGenerateResponse]]


class Toy(pb_grpc.GenerationServiceServicer):
    """Does what a test tells it to."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.get: Handler = self._echo
        self.stream: StreamHandler = self._count

    async def GetGeneration(self, request: Any, context: Any) -> pb.GetGenerationResponse:  # noqa: N802
        self.calls.append(request)
        return await self.get(request, context)

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[pb.StreamGenerateResponse]:  # noqa: N802
        self.calls.append(request)
        async for response in self.stream(request, context):
            yield response

    async def _echo(self, request: Any, context: Any) -> pb.GetGenerationResponse:
        return pb.GetGenerationResponse(generation=pb.Generation(generation_id=current_caller().tenant))

    async def _count(self, request: Any, context: Any) -> AsyncIterator[pb.StreamGenerateResponse]:
        for number in range(3):
            yield pb.StreamGenerateResponse(event=pb.GenerationEvent(sequence=number))


async def authenticate(call: CallInfo) -> Caller:
    values = dict(call.metadata)
    if "authorization" not in values:
        raise errors.Unauthenticated("an API key is required", reason="CREDENTIALS_MISSING")
    if values["authorization"] != "Bearer right":
        raise errors.Unauthenticated("the credentials are not valid")
    return Caller("acme", "k1")


@pytest.fixture
def toy() -> Toy:
    return Toy()


@asynccontextmanager
async def serving(toy: Toy, guard: Guard, **options: int) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server; options are the channel's, `__` for a dot."""
    server = grpc.aio.server(interceptors=(guard,))
    pb_grpc.add_GenerationServiceServicer_to_server(toy, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel_options = [(name.replace("__", "."), value) for name, value in options.items()]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", channel_options) as opened:
        yield opened
    await server.stop(0)


@pytest.fixture
async def channel(toy: Toy) -> AsyncIterator[grpc.aio.Channel]:
    async with serving(toy, Guard(authenticate)) as opened:
        yield opened


async def get(channel: grpc.aio.Channel, data: bytes = b"", metadata: Any = KEY, timeout: float = 5) -> bytes:
    reply: bytes = await channel.unary_unary(_GET)(data, metadata=metadata, timeout=timeout)
    return reply


async def read(channel: grpc.aio.Channel, data: bytes = b"", timeout: float = 5) -> list[bytes]:
    return [reply async for reply in channel.unary_stream(_STREAM)(data, metadata=KEY, timeout=timeout)]


async def refusal(call: Awaitable[Any]) -> RelayError:
    """How a call is refused; its trailers' status must agree with its code."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    error = raised.value
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    if packed is not None:
        status = status_pb2.Status.FromString(packed)  # type: ignore[arg-type]
        assert (status.code, status.message) == (error.code().value[0], error.details())
        assert code_pb2.Code.Name(status.code) == error.code().name
    assert SECRET not in f"{error.details()}{packed!r}"
    return from_rpc_error(error)


async def test_a_good_call_passes_with_its_caller(channel: grpc.aio.Channel) -> None:
    reply = pb.GetGenerationResponse.FromString(await get(channel))
    assert reply.generation.generation_id == "acme"
    sequences = [pb.StreamGenerateResponse.FromString(data).event.sequence for data in await read(channel)]
    assert sequences == [0, 1, 2]


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"\x0a\xff",  # a length beyond the end
        b"\x0a\x02\xc3\x28",  # not UTF-8
        b"\x00\x00",  # field number 0
        b"\x0b" * 101,  # groups deeper than the parser goes
        b"\x12\x7f" + b"garbage" * 3,
    ],
)
async def test_bytes_that_are_no_message_are_refused(channel: grpc.aio.Channel, toy: Toy, data: bytes) -> None:
    for call in (get(channel, data), read(channel, data)):
        error = await refusal(call)
        assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
    assert toy.calls == []


UNKNOWN = b"\x98\x06\x01"  # field 99, varint 1


def nested(data: bytes) -> bytes:
    """A chat whose second message's first part holds these bytes."""
    part = len(data).to_bytes(1, "little")
    message = b"\x08\x02\x12" + part + data
    messages = b"\x0a\x02\x08\x02" + b"\x0a" + len(message).to_bytes(1, "little") + message
    chat = b"\x1a" + len(messages).to_bytes(1, "little") + messages
    return b"\x12" + len(chat).to_bytes(1, "little") + chat


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (UNKNOWN, "99"),
        (b"\x0a\x04tiny" + UNKNOWN, "99"),
        (b"\x1a\x03" + UNKNOWN, "config.99"),
        (b"\x12\x05\x12\x03" + UNKNOWN, "input.token_ids.99"),
        (nested(UNKNOWN), "input.chat.messages[1].parts[0].99"),
        (b"\x22\x03" + UNKNOWN, "time_limit.99"),
        (b"\x9a\x06\x02hi", "99"),  # length-delimited
    ],
)
async def test_an_unknown_field_is_refused_by_its_path(
    channel: grpc.aio.Channel, toy: Toy, data: bytes, path: str
) -> None:
    error = await refusal(read(channel, data))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNKNOWN_FIELD")
    assert error.metadata == {"field": path}
    assert [violation.field for violation in error.violations] == [path]
    assert "99" in error.message
    assert toy.calls == []


async def test_who_calls_is_asked_before_what(channel: grpc.aio.Channel, toy: Toy) -> None:
    missing = await refusal(get(channel, b"\xff", metadata=()))
    wrong = await refusal(get(channel, b"\xff", metadata=(("authorization", "Bearer wrong"),)))
    assert (missing.code, missing.reason) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_MISSING")
    assert (wrong.code, wrong.reason) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID")
    assert toy.calls == []


def fail_with(toy: Toy, error: Exception) -> None:
    """Let both kinds of call end in an error, the streaming one after a message."""

    async def fail(request: Any, context: Any) -> pb.GetGenerationResponse:
        raise error

    async def fail_streaming(request: Any, context: Any) -> AsyncIterator[pb.StreamGenerateResponse]:
        yield pb.StreamGenerateResponse()
        raise error

    toy.get, toy.stream = fail, fail_streaming


class Unheard(Exception):
    """An error that no table knows."""


@pytest.mark.row(53)
@pytest.mark.parametrize(
    "error", [ValueError(SECRET), Unheard(SECRET), KeyError(SECRET), ExceptionGroup(SECRET, [OSError(SECRET)])]
)
async def test_what_an_exception_says_stays_inside(
    channel: grpc.aio.Channel, toy: Toy, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(toy, error)
    for call in (get(channel), read(channel)):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert refused.message == f"internal error {refused.metadata['incident']}"
        logged = "".join(capsys.readouterr())
        assert refused.metadata["incident"] in logged
        assert type(error).__name__ in logged
        assert SECRET not in logged


async def test_a_handler_that_cancels_itself_does_not_leave_its_caller_waiting(
    channel: grpc.aio.Channel, toy: Toy
) -> None:
    async def cancel(request: Any, context: Any) -> pb.GetGenerationResponse:
        raise asyncio.CancelledError

    async def cancel_streaming(request: Any, context: Any) -> AsyncIterator[pb.StreamGenerateResponse]:
        yield pb.StreamGenerateResponse()
        raise asyncio.CancelledError

    toy.get, toy.stream = cancel, cancel_streaming
    for call in (get(channel), read(channel)):
        assert (await refusal(call)).code is grpc.StatusCode.INTERNAL


WITHOUT_ARGUMENTS = (
    errors.BatchNotFound,
    errors.ClientTooSlow,
    errors.GenerationNotFound,
    errors.IdempotencyKeyReused,
    errors.ResultLost,
    errors.Superseded,
)


def every_error() -> list[errors.ServingError]:
    """One of each class of common/errors.py."""
    found: list[errors.ServingError] = []
    pending = [errors.ServingError]
    while pending:
        kind: Any = pending.pop()
        pending += kind.__subclasses__()
        if kind in WITHOUT_ARGUMENTS:
            found.append(kind())
        elif kind is errors.SequenceOutOfRange:
            found.append(kind(7, 3))
        elif issubclass(kind, errors.Limited):
            found.append(kind("what happened", subject="key:tokens_per_minute", limit=3))
        else:
            found.append(kind("what happened", metadata={"detail": "d"}))
    return found


CODES = {
    "ServingError": "INTERNAL",
    "InvalidRequest": "INVALID_ARGUMENT",
    "Unauthenticated": "UNAUTHENTICATED",
    "PermissionDenied": "PERMISSION_DENIED",
    "NotFound": "NOT_FOUND",
    "ModelNotFound": "NOT_FOUND",
    "AdapterNotFound": "NOT_FOUND",
    "GenerationNotFound": "NOT_FOUND",
    "BatchNotFound": "NOT_FOUND",
    "ApiKeyNotFound": "NOT_FOUND",
    "TenantNotFound": "NOT_FOUND",
    "WorkerNotFound": "NOT_FOUND",
    "FailedPrecondition": "FAILED_PRECONDITION",
    "IdempotencyKeyReused": "FAILED_PRECONDITION",
    "SequenceOutOfRange": "OUT_OF_RANGE",
    "Aborted": "ABORTED",
    "ClientTooSlow": "ABORTED",
    "ResultLost": "ABORTED",
    "Superseded": "ABORTED",
    "ResourceExhausted": "RESOURCE_EXHAUSTED",
    "QueueFull": "RESOURCE_EXHAUSTED",
    "BackendFull": "RESOURCE_EXHAUSTED",
    "Limited": "RESOURCE_EXHAUSTED",
    "RateLimited": "RESOURCE_EXHAUSTED",
    "QuotaExceeded": "RESOURCE_EXHAUSTED",
    "Unavailable": "UNAVAILABLE",
    "BackendUnavailable": "UNAVAILABLE",
    "ReplicationUnconfirmed": "UNAVAILABLE",
    "ModelNotReady": "UNAVAILABLE",
    "DeadlineExceeded": "DEADLINE_EXCEEDED",
    "GenerationFailed": "INTERNAL",
    "WorkerFailed": "INTERNAL",
    "LogLimitExceeded": "INTERNAL",
    "BackendRefused": "INTERNAL",
    "SealBroken": "INTERNAL",
}


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
async def test_every_error_of_the_domain_has_its_status(
    channel: grpc.aio.Channel, toy: Toy, error: errors.ServingError
) -> None:
    fail_with(toy, error)
    for call in (get(channel), read(channel)):
        refused = await refusal(call)
        assert refused.code.name == CODES[type(error).__name__]
        assert (refused.message, refused.reason, dict(refused.metadata)) == (
            error.message,
            error.reason,
            error.metadata,
        )
        assert refused.code is not grpc.StatusCode.CANCELLED


async def test_details_say_which_fields_when_to_come_back_and_what_it_cost(channel: grpc.aio.Channel, toy: Toy) -> None:
    violation = errors.FieldViolation("config.top_p", "must be above 0", "FIELD_OUT_OF_RANGE")
    usage = pb.Usage(prompt_tokens=3, completion_tokens=9)
    raised: list[Exception] = [
        errors.InvalidRequest("config.top_p: must be above 0", violations=(violation,)),
        errors.QueueFull("the model's queue is full", retry_after_ms=1500),
        GenerationEndedError(errors.WorkerFailed("the generation failed"), usage),
    ]

    async def fail(request: Any, context: Any) -> pb.GetGenerationResponse:
        raise raised.pop(0)

    toy.get = fail
    invalid = await refusal(get(channel))
    assert [(v.field, v.description) for v in invalid.violations] == [("config.top_p", "must be above 0")]
    with pytest.raises(grpc.aio.AioRpcError) as full:
        await get(channel)
    assert from_rpc_error(full.value).retry_delay_s == 1.5
    assert dict(full.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1500"
    status = status_pb2.Status.FromString(dict(full.value.trailing_metadata())["grpc-status-details-bin"])  # type: ignore[arg-type]
    quota = error_details_pb2.QuotaFailure()
    assert any(detail.Unpack(quota) for detail in status.details)
    assert [v.subject for v in quota.violations] == ["queue_full"]
    failed = await refusal(get(channel))
    assert (failed.code, failed.usage) == (grpc.StatusCode.INTERNAL, usage)


async def test_a_handler_s_own_abort_passes(channel: grpc.aio.Channel, toy: Toy) -> None:
    async def abort(request: Any, context: Any) -> pb.GetGenerationResponse:
        await context.abort(grpc.StatusCode.DATA_LOSS, "mine")
        raise AssertionError

    toy.get = abort
    error = await refusal(get(channel))
    assert (error.code, error.message) == (grpc.StatusCode.DATA_LOSS, "mine")


async def endless(closed: asyncio.Event, started: asyncio.Event) -> AsyncIterator[pb.StreamGenerateResponse]:
    try:
        yield pb.StreamGenerateResponse()
        started.set()
        while True:
            await asyncio.sleep(0.005)
            yield pb.StreamGenerateResponse(event=pb.GenerationEvent(sequence=1))
    finally:
        closed.set()


async def test_a_caller_that_goes_away_closes_the_generator_at_once(channel: grpc.aio.Channel, toy: Toy) -> None:
    closed, started = asyncio.Event(), asyncio.Event()
    toy.stream = lambda request, context: endless(closed, started)
    call = channel.unary_stream(_STREAM)(b"", metadata=KEY)
    await call.read()
    async with asyncio.timeout(2):
        await started.wait()
        call.cancel()
        await closed.wait()


async def test_a_caller_that_goes_away_while_the_handler_waits_ends_it(channel: grpc.aio.Channel, toy: Toy) -> None:
    closed, started = asyncio.Event(), asyncio.Event()

    async def wait(request: Any, context: Any) -> pb.GetGenerationResponse:
        try:
            started.set()
            await asyncio.sleep(60)
        finally:
            closed.set()
        raise AssertionError

    toy.get = wait
    call = channel.unary_unary(_GET)(b"", metadata=KEY)
    async with asyncio.timeout(2):
        await started.wait()
        call.cancel()
        await closed.wait()


async def test_a_deadline_ends_the_call_on_both_sides(channel: grpc.aio.Channel, toy: Toy) -> None:
    closed, started = asyncio.Event(), asyncio.Event()
    toy.stream = lambda request, context: endless(closed, started)
    error = await refusal(read(channel, timeout=0.2))
    assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "")
    async with asyncio.timeout(2):
        await closed.wait()


async def test_a_slow_reader_holds_the_generator_back(toy: Toy) -> None:
    produced, offered = 0, 2000

    async def flood(request: Any, context: Any) -> AsyncIterator[pb.StreamGenerateResponse]:
        nonlocal produced
        for _ in range(offered):
            produced += 1
            yield pb.StreamGenerateResponse(event=pb.GenerationEvent(chain_hash=bytes(8192)))

    toy.stream = flood
    # A window of fixed size: gRPC's own estimate lets it grow to 8 MiB, the more the faster the machine.
    async with serving(toy, Guard(authenticate), **SMALL_WINDOW) as channel:
        call = channel.unary_stream(_STREAM)(b"", metadata=KEY)
        await call.read()
        seen = -1
        async with asyncio.timeout(5):
            while seen != produced:
                seen = produced
                await asyncio.sleep(0.2)
        assert produced < offered // 10
        received = 1
        async with asyncio.timeout(20):
            while await call.read() is not grpc.aio.EOF:
                received += 1
        assert received == produced == offered  # held back, not dropped


def flood_until_closed(closed: asyncio.Event) -> StreamHandler:
    """As fast as the client reads, without end; sequences count from 0."""

    async def flood(request: Any, context: Any) -> AsyncIterator[pb.StreamGenerateResponse]:
        try:
            for number in itertools.count():
                yield pb.StreamGenerateResponse(event=pb.GenerationEvent(sequence=number, chain_hash=bytes(4096)))
        finally:
            closed.set()

    return flood


async def test_a_client_that_stops_reading_is_let_go_of_and_told_why_once_it_reads(toy: Toy) -> None:
    closed = asyncio.Event()
    toy.stream = flood_until_closed(closed)
    async with serving(toy, Guard(authenticate, send_timeout_s=0.2), **SMALL_WINDOW) as channel:
        call = channel.unary_stream(_STREAM)(b"", metadata=KEY)
        received = [await call.read()]
        async with asyncio.timeout(10):
            await closed.wait()  # the call's resources are free although it has not read a byte since

            async def rest() -> None:
                while (data := await call.read()) is not grpc.aio.EOF:
                    received.append(data)

            error = await refusal(rest())
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "CLIENT_TOO_SLOW")
    sequences = [pb.StreamGenerateResponse.FromString(data).event.sequence for data in received]  # type: ignore[arg-type]
    assert sequences == list(range(len(sequences))), "what came is whole: it can be resumed after its last event"


async def test_a_client_that_reads_slowly_but_steadily_is_served(toy: Toy) -> None:
    closed = asyncio.Event()
    toy.stream = flood_until_closed(closed)
    async with serving(toy, Guard(authenticate, send_timeout_s=0.5), **SMALL_WINDOW) as channel:
        call = channel.unary_stream(_STREAM)(b"", metadata=KEY)
        for _ in range(20):  # in all longer than the limit, which is for one message
            await asyncio.sleep(0.05)
            assert await call.read() is not grpc.aio.EOF
        assert not closed.is_set()
        call.cancel()


async def test_silence_of_the_handler_is_not_the_client_s(toy: Toy) -> None:
    async def pause(request: Any, context: Any) -> AsyncIterator[pb.StreamGenerateResponse]:
        yield pb.StreamGenerateResponse()
        await asyncio.sleep(0.3)
        yield pb.StreamGenerateResponse()
        raise TimeoutError(SECRET)

    toy.stream = pause
    async with serving(toy, Guard(authenticate, send_timeout_s=0.1)) as channel:
        call = channel.unary_stream(_STREAM)(b"", metadata=KEY, timeout=5)
        assert [await call.read() for _ in range(2)] == [b"", b""]
        error = await refusal(call.read())
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL"), "the handler's own time-out is a bug"


async def test_an_unknown_method_is_the_library_s_to_refuse(channel: grpc.aio.Channel) -> None:
    error = await refusal(channel.unary_unary("/torchrelay.v1.GenerationService/Nothing")(b"", metadata=KEY, timeout=5))
    assert error.code is grpc.StatusCode.UNIMPLEMENTED
