"""The monitor's HTTP server: metrics and probes, whatever the event loop does and whoever connects."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from common.telemetry.labels import BoundedLabel
from common.telemetry.monitor import MonitorServer, Vitals, process_registry
from tests.builders_metrics import fetch


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def vitals(clock: Clock) -> Vitals:
    return Vitals(clock)


@pytest.fixture
def server(vitals: Vitals) -> Iterator[MonitorServer]:
    registry = process_registry()
    Counter("things", "Things.", registry=registry).inc(3)
    found = MonitorServer("127.0.0.1:0", registry, vitals)
    yield found
    found.close()


async def test_metrics_are_served_in_prometheus_text(server: MonitorServer) -> None:
    status, text = await fetch(server.address)
    assert status == 200
    assert "# TYPE things_total counter\nthings_total 3.0\n" in text
    assert "_created" not in text


async def test_probes_tell_life_and_readiness(server: MonitorServer, vitals: Vitals, clock: Clock) -> None:
    assert await fetch(server.address, "/healthz") == (200, "ok\n")  # before the event loop begins: a model is loaded
    assert await fetch(server.address, "/readyz") == (503, "starting\n")
    vitals.set_unready("loading the model")
    assert await fetch(server.address, "/readyz") == (503, "loading the model\n")
    vitals.beat()
    vitals.set_ready()
    assert await fetch(server.address, "/readyz") == (200, "ok\n")
    clock.now += 31
    stuck = (503, "the event loop does not turn\n")
    assert await fetch(server.address, "/healthz") == stuck
    assert await fetch(server.address, "/readyz") == stuck


async def test_a_turning_loop_shows_life(server: MonitorServer, vitals: Vitals, clock: Clock) -> None:
    clock.now += 100
    beating = asyncio.create_task(vitals.run())
    await asyncio.sleep(0)
    assert vitals.is_alive
    beating.cancel()


async def test_other_paths_are_not_found(server: MonitorServer) -> None:
    assert (await fetch(server.address, "/"))[0] == 404


async def test_clients_that_say_nothing_keep_nobody_out(server: MonitorServer) -> None:
    host, _, port = server.address.rpartition(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(10)]
    try:
        assert (await fetch(server.address, "/healthz"))[0] == 200
    finally:
        for connection in silent:
            connection.close()


def test_an_address_that_is_taken_is_named(server: MonitorServer, vitals: Vitals) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {server.address}"):
        MonitorServer(server.address, CollectorRegistry(), vitals)


@pytest.mark.parametrize("address", ["", "9464", "host:port", ":9464"])
def test_what_is_no_address_is_refused(address: str, vitals: Vitals) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        MonitorServer(address, CollectorRegistry(), vitals)


async def test_ipv6(vitals: Vitals) -> None:
    server = MonitorServer("[::1]:0", process_registry(), vitals)
    try:
        assert server.address.startswith("[::1]:")
        assert "process_resident_memory_bytes" in (await fetch(server.address))[1]
    finally:
        server.close()


def test_a_bounded_label_lets_the_first_values_through() -> None:
    label = BoundedLabel(2)
    assert [label(value) for value in "abcabd"] == ["a", "b", "other", "a", "b", "other"]
    assert BoundedLabel(0)("a") == "other"
