"""The port of the OpenAI door: certificates, slow clients, limits, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from gateway.openai import server as door
from gateway.openai.server import OpenAiServer, auth_context_of
from gateway.server import certificates_of, check_plaintext
from gateway.settings import GatewaySettings
from tests.builders_identity import Authority
from tests.builders_system import until

AUTHORITY = Authority()
GOOD = AUTHORITY.issue(hosts=("127.0.0.1",))
OTHER = AUTHORITY.issue(hosts=("127.0.0.1",))
CLIENT = AUTHORITY.issue(uris=("spiffe://prod/ns/acme/sa/web",))
STRANGER = Authority("another authority").issue()


class App:
    """Answers with what the transport knows of the client; slowly, where it is asked to."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_calls += 1
        if scope["path"] == "/slow":
            await asyncio.sleep(0.5)
        names = auth_context_of(scope).get("x509_pem_cert", ())
        body = b"known" if names else b"unknown"
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(app: App, **fields: Any) -> AsyncIterator[OpenAiServer]:
    settings = GatewaySettings(openai_address="127.0.0.1:0", drain_s=5, **fields)
    server = OpenAiServer(app, settings, certificates_of(settings))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def connect(server: OpenAiServer, context: ssl.SSLContext | None = None) -> tuple[Any, asyncio.StreamWriter]:
    host, port = server.address.split(":")
    return await asyncio.open_connection(host, int(port), ssl=context)


async def get(server: OpenAiServer, context: ssl.SSLContext | None = None, path: str = "/") -> tuple[bytes, bytes]:
    """Return the body, and the certificate that the server showed."""
    reader, writer = await connect(server, context)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        answer = await reader.read()
        tls = writer.get_extra_info("ssl_object")
        return answer.partition(b"\r\n\r\n")[2], tls.getpeercert(binary_form=True) if tls else b""
    finally:
        writer.close()


def trusting(folder: Path, client: Any = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=AUTHORITY.pem.decode())
    if client is not None:
        context.load_cert_chain(*client.write(folder, "client"))
    return context


async def test_nowhere_unless_an_address_is_set() -> None:
    server = OpenAiServer(App(), GatewaySettings(), None)
    await server.start()
    assert server.address == ""
    await server.stop()


async def test_a_taken_address_is_an_error() -> None:
    async with serving(App()) as server:
        again = OpenAiServer(App(), GatewaySettings(openai_address=server.address), None)
        with pytest.raises(OSError, match="the address is taken"):
            await again.start()


async def test_certificates_follow_their_files(tmp_path: Path) -> None:
    cert, key = GOOD.write(tmp_path, "server")
    async with serving(App(), tls_cert_file=cert, tls_key_file=key) as server:
        body, first = await get(server, trusting(tmp_path))
        assert body == b"unknown"
        OTHER.write(tmp_path, "server")
        _, second = await get(server, trusting(tmp_path))
        cert.write_bytes(b"broken")
        _, third = await get(server, trusting(tmp_path))
    assert first != second == third, "the last good one serves on"


async def test_clients_show_certificates_where_they_must(tmp_path: Path) -> None:
    cert, key = GOOD.write(tmp_path, "server")
    (tmp_path / "ca").write_bytes(AUTHORITY.pem)
    fields = {"tls_cert_file": cert, "tls_key_file": key, "tls_client_ca_file": tmp_path / "ca"}
    app = App()
    async with serving(app, client_certificates="required", **fields) as server:
        body, _ = await get(server, trusting(tmp_path, CLIENT))
        assert body == b"known"
        for client in (None, STRANGER):
            with contextlib.suppress(ssl.SSLError, ConnectionError):  # or nothing, if it learns of it later
                assert (await get(server, trusting(tmp_path, client)))[0] == b""
    assert app.num_calls == 1


async def test_a_head_that_does_not_arrive_ends_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_HEAD_S", 0.2)
    async with serving(App()) as server:
        for begun in (b"", b"GET / HTTP/1.1\r\nhost: "):
            reader, writer = await connect(server)
            writer.write(begun)
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
        slow = await get(server, path="/slow")
        assert slow[0] == b"unknown", "one that has arrived has its time"


async def test_a_head_that_is_too_long_is_refused() -> None:
    app = App()
    async with serving(app) as server:
        reader, writer = await connect(server)
        writer.write(b"GET / HTTP/1.1\r\nx: " + b"y" * (1 << 17))
        with contextlib.suppress(ConnectionError):  # it may hang up before all is sent
            assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 400")
        writer.close()
    assert app.num_calls == 0


async def test_connections_are_bounded() -> None:
    app = App()
    async with serving(app, openai_max_connections=2) as server:
        idle = [await connect(server) for _ in range(2)]
        body, _ = await get(server)
        error = json.loads(body)["error"]
        assert (error["code"], error["type"]) == ("gateway_full", "server_error")
        reader, writer = await connect(server)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        head, _, _ = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        assert lines[0].startswith("http/1.1 503")
        assert "retry-after: 1" in lines
        assert "connection: close" in lines
        writer.close()
        more = [await connect(server) for _ in range(2)]
        reader, writer = await connect(server)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5) == b"", "unheard"
        for _, other in (*idle, *more, (reader, writer)):
            other.close()
            with contextlib.suppress(ConnectionError):
                await other.wait_closed()
        assert app.num_calls == 0

        async def is_served() -> bool:
            return (await get(server))[0] == b"unknown"

        await until(is_served, what="room for a connection")


async def test_running_calls_end_before_the_port_does() -> None:
    async with serving(App()) as server:
        running = asyncio.create_task(get(server, path="/slow"))
        await asyncio.sleep(0.1)
        await server.stop()
        assert (await running)[0] == b"unknown"
        with pytest.raises(ConnectionError):
            await get(server)


def test_plaintext_beyond_loopback_needs_the_operator_s_word() -> None:
    with pytest.raises(ValueError, match=r"OPENAI_ADDRESS=0\.0\.0\.0:8000 is beyond loopback"):
        check_plaintext(GatewaySettings(openai_address="0.0.0.0:8000"))
    check_plaintext(GatewaySettings(openai_address="0.0.0.0:8000", insecure=True))


async def test_an_idle_server_wakes_up_for_the_date_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway shares cores with others: ten times a second would cost each of their first tokens a tenth of a ms."""
    ticks: list[int] = []
    real = door._Server.on_tick

    async def on_tick(self: door._Server, counter: int) -> bool:
        ticks.append(counter)
        return await real(self, counter)

    monkeypatch.setattr(door._Server, "on_tick", on_tick)
    monkeypatch.setattr(door, "_TICK_S", 60.0)
    async with serving(App()) as server:
        await asyncio.sleep(0.35)
        assert len(ticks) == 1
        reader, writer = await connect(server)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        head = (await reader.read()).partition(b"\r\n\r\n")[0].lower()
        assert head.count(b"\r\ndate: ") == 1
        writer.close()
        loop = asyncio.get_running_loop()
        stopping = loop.time()
    assert loop.time() - stopping < 30, "the end waits for no tick"
    monkeypatch.setattr(door, "_TICK_S", 0.01)
    async with serving(App()):
        await until(lambda: _is(len(ticks) > 5), 10, "the date to be set again")


async def _is(met: bool) -> bool:
    return met
