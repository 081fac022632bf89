"""Addresses: what may be plaintext, what is bound, and what probes are told."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.interceptors.guard import Guard
from gateway.server import GatewayServer, check_plaintext
from gateway.settings import GatewaySettings

ON_LOOPBACK = ("127.0.0.1:50051", "127.8.9.1:1", "localhost:50051", "[::1]:50051", "unix:/run/relay.sock")
BEYOND = ("0.0.0.0:50051", "[::]:50051", "10.0.0.7:50051", ":50051", "gateway:50051", "127.0.0.1.evil.example:50051")


@pytest.mark.parametrize("address", ON_LOOPBACK)
def test_plaintext_stays_on_this_machine(address: str) -> None:
    check_plaintext(GatewaySettings(address=address, admin_address=address))


@pytest.mark.parametrize("address", BEYOND)
def test_plaintext_beyond_it_needs_the_operator_s_word(address: str) -> None:
    with pytest.raises(ValueError, match=r"TORCHRELAY_GATEWAY_ADDRESS=.*--insecure"):
        check_plaintext(GatewaySettings(address=address))
    with pytest.raises(ValueError, match="TORCHRELAY_GATEWAY_ADMIN_ADDRESS="):
        check_plaintext(GatewaySettings(admin_address=address))
    check_plaintext(GatewaySettings(address=address, admin_address=address, insecure=True))


def test_the_admin_port_may_be_absent() -> None:
    check_plaintext(GatewaySettings(admin_address=""))


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHRELAY_GATEWAY_MAX_OUTPUTS", "3")
    assert GatewaySettings().max_outputs == 3
    with pytest.raises(ValueError, match="max_outputs"):
        GatewaySettings(max_outputs=0)


def make_server(**settings: Any) -> GatewayServer:
    values = {"address": "127.0.0.1:0", "admin_address": "127.0.0.1:0", "drain_s": 0} | settings
    return GatewayServer(GatewaySettings(**values), Guard(None), Guard(None))


@pytest.fixture
async def server() -> AsyncIterator[GatewayServer]:
    running = make_server()
    await running.start()
    yield running
    await running.stop()


async def health(address: str, service: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        return int(response.status)


async def test_a_gateway_is_alive_from_its_start_and_ready_once_connected(server: GatewayServer) -> None:
    assert await health(server.address, "liveness") == health_pb2.HealthCheckResponse.SERVING
    assert await health(server.address, "") == health_pb2.HealthCheckResponse.NOT_SERVING
    await server.health.set_ready(True)
    for service in ("", "readiness", "torchrelay.v1.GenerationService"):
        assert await health(server.address, service) == health_pb2.HealthCheckResponse.SERVING


async def test_the_bound_addresses_are_known(server: GatewayServer) -> None:
    for address in (server.address, server.admin_address):
        host, _, port = address.rpartition(":")
        assert host == "127.0.0.1"
        assert int(port) > 0
    assert server.address != server.admin_address


async def test_a_taken_address_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="cannot listen on"):
            await make_server(address=f"127.0.0.1:{taken.getsockname()[1]}").start()


async def test_a_socket_in_the_file_system_is_named_as_it_is(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/relay.sock"
    server = make_server(address=address, admin_address="")
    await server.start()
    try:
        assert server.address == address
        assert await health(address, "liveness") == health_pb2.HealthCheckResponse.SERVING
    finally:
        await server.stop()
