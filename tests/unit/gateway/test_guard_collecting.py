"""Streams of requests over a real server and socket: each message is held to what a single request is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from itertools import repeat
from typing import Any
from unittest import mock

import grpc
import grpc.aio
import pytest

from common import errors
from gateway.identity.caller import Caller, CallInfo, current_caller
from gateway.interceptors.guard import Guard
from torchrelay.client.errors import RelayError, from_rpc_error
from torchrelay.v1 import batch_pb2 as pb
from torchrelay.v1 import batch_pb2_grpc as pb_grpc

KEY = (("authorization", "Bearer right"),)
_CREATE = "/torchrelay.v1.BatchService/CreateBatch"
SECRET = "the caller's own words"


class Toy(pb_grpc.BatchServiceServicer):
    """Counts messages; fails when it meets a name that says so."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.was_called = False

    async def CreateBatch(self, request_iterator: Any, context: Any) -> pb.CreateBatchResponse:  # noqa: N802
        self.was_called = True
        async for request in request_iterator:
            self.names.append(request.item.custom_id)
            if request.item.custom_id == "bad":
                raise errors.InvalidRequest("is bad", field="items[0]")
            if request.item.custom_id == "bug":
                raise ValueError(SECRET)
        return pb.CreateBatchResponse(batch=pb.Batch(batch_id=current_caller().tenant))


async def authenticate(call: CallInfo) -> Caller:
    if dict(call.metadata).get("authorization") != "Bearer right":
        raise errors.Unauthenticated("the credentials are not valid")
    return Caller("acme", "k1")


@asynccontextmanager
async def serving(toy: Toy, send_timeout_s: float = 60) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=(Guard(authenticate, send_timeout_s=send_timeout_s),))
    pb_grpc.add_BatchServiceServicer_to_server(toy, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened
    await server.stop(0)


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
async def channel(toy: Toy) -> AsyncIterator[grpc.aio.Channel]:
    async with serving(toy) as opened:
        yield opened


def named(*names: str) -> list[bytes]:
    return [pb.CreateBatchRequest(item=pb.BatchItem(custom_id=name)).SerializeToString() for name in names]


async def create(channel: grpc.aio.Channel, parts: Iterable[bytes], metadata: Any = KEY) -> pb.CreateBatchResponse:
    reply = await channel.stream_unary(_CREATE)(iter(parts), metadata=metadata, timeout=5)
    return pb.CreateBatchResponse.FromString(reply)


async def refusal(channel: grpc.aio.Channel, parts: Iterable[bytes], metadata: Any = KEY) -> RelayError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await create(channel, parts, metadata)
    return from_rpc_error(raised.value)


async def test_all_messages_reach_the_handler_with_their_caller(channel: grpc.aio.Channel, toy: Toy) -> None:
    names = [f"n{number}" for number in range(500)]
    assert (await create(channel, named(*names))).batch.batch_id == "acme"
    assert toy.names == names
    assert (await create(channel, [])).batch.batch_id == "acme"


async def test_a_message_that_is_none_ends_the_call_there(channel: grpc.aio.Channel, toy: Toy) -> None:
    error = await refusal(channel, [*named("a", "b"), b"\xff", *named("c")])
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
    assert toy.names == ["a", "b"]


async def test_an_unknown_field_in_any_message_is_refused(channel: grpc.aio.Channel, toy: Toy) -> None:
    error = await refusal(channel, [*named("a"), named("b")[0] + b"\xf8\x07\x01"])
    assert (error.reason, [violation.field for violation in error.violations]) == ("UNKNOWN_FIELD", ["127"])
    assert toy.names == ["a"]


@pytest.mark.parametrize(("name", "code"), [("bad", "INVALID_ARGUMENT"), ("bug", "INTERNAL")])
async def test_what_the_handler_raises_is_the_status_while_the_client_still_sends(
    channel: grpc.aio.Channel, name: str, code: str
) -> None:
    error = await refusal(channel, named(name, *(f"n{number}" for number in range(2000))))
    assert error.code.name == code
    assert SECRET not in str(error)


@pytest.mark.parametrize("metadata", [KEY, ()], ids=["refused by the handler", "without credentials"])
async def test_a_refused_client_may_send_all_it_has_before_it_hears_of_it(
    channel: grpc.aio.Channel, metadata: Any
) -> None:
    left = named("bad", *("x" * 1000 for _ in range(2000)))  # far more than a connection holds on the way
    code = (await refusal(channel, left_over := iter(left), metadata)).code
    assert code is (grpc.StatusCode.INVALID_ARGUMENT if metadata else grpc.StatusCode.UNAUTHENTICATED)
    assert next(left_over, None) is None


async def test_a_refused_client_that_waits_for_an_answer_gets_it(channel: grpc.aio.Channel) -> None:
    call = channel.stream_unary(_CREATE)(metadata=KEY)
    await call.write(named("bad")[0])
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await asyncio.wait_for(call, 5)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_refused_client_that_never_stops_is_not_read_for_ever(channel: grpc.aio.Channel) -> None:
    with mock.patch("gateway.interceptors.guard._READ_OUT_S", 0.3), pytest.raises(grpc.aio.AioRpcError) as raised:
        await channel.stream_unary(_CREATE)(repeat(named("bad")[0]), metadata=KEY, timeout=5)
    # The latter is what its library may make of that, see there.
    assert raised.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)


async def test_who_calls_is_asked_before_anything_is_read(channel: grpc.aio.Channel, toy: Toy) -> None:
    error = await refusal(channel, named("a"), metadata=())
    assert error.code is grpc.StatusCode.UNAUTHENTICATED
    assert not toy.was_called


async def test_a_client_that_sends_nothing_more_is_let_go_of(toy: Toy) -> None:
    async with serving(toy, send_timeout_s=0.2) as channel:
        call = channel.stream_unary(_CREATE)(metadata=KEY)
        await call.write(named("a")[0])
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await asyncio.wait_for(call, 10)
        error = from_rpc_error(raised.value)
        assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "CLIENT_STALLED")
        assert toy.names == ["a"]
