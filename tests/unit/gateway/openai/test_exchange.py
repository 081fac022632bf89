"""One HTTP request and its answer: what is held of it meanwhile, and of what is not read."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from common.errors import ClientTooSlow, ResourceExhausted
from gateway.audit import Audit
from gateway.identity.caller import Caller, CallInfo, current_caller
from gateway.openai.exchange import Door, Exchange, bodies_of
from gateway.openai.server import OpenAiServer
from gateway.places import Places
from gateway.settings import GatewaySettings
from tests.builders_system import until

KIB = 1024
SETTINGS = GatewaySettings(openai_max_body_bytes=100 * KIB, max_message_bytes=20 * KIB)


async def authenticate(call: CallInfo) -> Caller:
    return Caller(dict(call.metadata).get("tenant", "acme"), "k1")


def make_door(bodies: Places | None = None, send_timeout_s: float = 5) -> Door:
    found = bodies if bodies is not None else bodies_of(SETTINGS)
    return Door(authenticate, lambda method, caller: None, Audit(), bodies=found, send_timeout_s=send_timeout_s)


async def call(door: Door, run: Any, *pieces: bytes, tenant: str = "acme", tell: bool = True) -> tuple[int, Any, Any]:
    """The answer to a body: its status, headers and JSON. The client stays."""
    left = list(pieces)
    sent: list[Any] = []

    async def receive() -> Any:
        if not left:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"tenant", tenant.encode())]
    if tell:
        headers.append((b"content-length", str(sum(map(len, pieces))).encode()))
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "client": ("127.0.0.1", 1)}
    await door.route("/m", run)(scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(b"".join(m["body"] for m in sent[1:]))


@pytest.mark.parametrize("tell", [True, False])
async def test_bodies_of_calls_in_progress_are_bounded_in_sum(tell: bool) -> None:
    bodies = bodies_of(SETTINGS)
    door = make_door(bodies)
    go_on = asyncio.Event()

    async def run(exchange: Exchange) -> None:
        body = await exchange.body(20 * KIB, current_caller().tenant)
        await go_on.wait()
        await exchange.answer(len(body))

    async def post(tenant: str) -> tuple[int, Any, Any]:
        return await call(door, run, b"x" * 5 * KIB, b"y" * 15 * KIB, tenant=tenant, tell=tell)

    async def held() -> int:
        for _ in range(10):
            await asyncio.sleep(0)
        return bodies.num_taken // KIB

    running = [asyncio.create_task(post("acme")) for _ in range(2)]
    assert await held() == 40
    status, headers, answer = await asyncio.wait_for(post("acme"), 10)  # it does not wait for the others
    assert (status, answer["error"]["code"], answer["error"]["type"]) == (429, "gateway_full", "rate_limit_error")
    assert "bytes of requests" in answer["error"]["message"]
    assert b"retry-after" in headers
    # Another tenant has room all the same, up to what there is in all.
    running += [asyncio.create_task(post(tenant)) for tenant in ("b", "c", "d")]
    assert await held() == 100
    assert (await asyncio.wait_for(post("e"), 10))[0] == 429
    go_on.set()
    assert [(await task)[2] for task in running] == [20 * KIB] * 5
    assert bodies.num_taken == 0


async def test_what_was_held_of_a_body_that_is_refused_or_stays_away_is_free_again() -> None:
    bodies = Places(100 * KIB, 0.5)
    door = make_door(bodies)

    async def run(exchange: Exchange) -> None:
        await exchange.body(20 * KIB, current_caller().tenant)

    assert (await call(door, run, b"x" * 15 * KIB, b"x" * 15 * KIB, tell=False))[0] == 413
    assert bodies.num_taken == 0
    going = asyncio.create_task(call(door, run, b"x" * 15 * KIB, b"x", tell=False))
    await asyncio.sleep(0)
    going.cancel()
    await asyncio.gather(going, return_exceptions=True)
    assert bodies.num_taken == 0


def test_a_refusal_of_bytes_counts_all_that_are_asked_for() -> None:
    places = Places(100, 0.5, few=10, of="bytes")
    with places.take("a", 50):
        with (
            pytest.raises(ResourceExhausted, match="its share of this gateway's bytes, 50"),
            places.take("a"),
        ):
            pass
        with (
            pytest.raises(ResourceExhausted, match="as many bytes as it may"),
            places.take("b", 51),
        ):
            pass
        assert places.num_taken == 50
    assert places.num_taken == 0


@asynccontextmanager
async def serving(app: Any, **fields: Any) -> AsyncIterator[OpenAiServer]:
    server = OpenAiServer(app, GatewaySettings(openai_address="127.0.0.1:0", drain_s=1, **fields), None)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def connect(server: OpenAiServer) -> socket.socket:
    """A client that has asked, whose system keeps little for it."""
    host, port = server.address.split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    return client


async def has_connections(server: OpenAiServer, count: int) -> None:
    async def holds() -> bool:
        assert server._server is not None
        return len(server._server.server_state.connections) == count

    await until(holds, 10, f"{count} connections")


async def test_a_client_that_does_not_read_its_stream_is_cut_off() -> None:
    ended: list[BaseException] = []
    door = make_door(send_timeout_s=0.2)

    async def chunks() -> AsyncIterator[Any]:
        while True:
            yield {"text": "x" * 64 * KIB}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await door.exchange(scope, receive, send, is_chat=False).answer_events(chunks())
        except ClientTooSlow as error:
            ended.append(error)

    async with serving(app, send_timeout_s=1000) as server:
        with connect(server):
            await has_connections(server, 1)
            await has_connections(server, 0)
            assert ended


async def test_an_answer_that_nobody_reads_is_not_kept() -> None:
    door = make_door()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await door.exchange(scope, receive, send, is_chat=False).answer("x" * (16 << 20))

    async with serving(app, send_timeout_s=0.2) as server:
        with connect(server):
            await has_connections(server, 1)
            await has_connections(server, 0)


async def test_a_stream_that_outlasts_the_drain_is_told_so_over_its_socket() -> None:
    door = make_door()

    async def chunks() -> AsyncIterator[Any]:
        yield {"text": "a"}
        await asyncio.Event().wait()

    async def run(exchange: Exchange) -> None:
        await exchange.answer_events(chunks())

    async with serving(door.route("/m", run)) as server:
        host, port = server.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b'{"text":"a"}\n\n')
        await server.stop()
        rest = await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert b'"code":"gateway_stopping"' in rest
    assert rest.endswith(b"\r\n0\r\n\r\n"), "a whole answer"
