"""Certificates of the gateway's ports: which are taken, which are not, and who may connect."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from gateway.interceptors.guard import Guard
from gateway.server import GatewayServer, check_plaintext
from gateway.settings import GatewaySettings
from gateway.tls import CertificateError, ServerCertificates
from tests.builders_identity import Authority, Pair

AUTHORITY = Authority()
STRANGER = Authority("another authority")
GOOD = AUTHORITY.issue(hosts=("127.0.0.1",))
OTHER = AUTHORITY.issue(hosts=("127.0.0.1",))
EXPIRED = AUTHORITY.issue(hosts=("127.0.0.1",), valid_for_s=-5)
CLIENT = AUTHORITY.issue(uris=("spiffe://prod/ns/acme/sa/web",))

BROKEN: dict[str, Callable[[Pair], Pair]] = {
    "no certificate": lambda pair: Pair(b"", pair.key),
    "half a certificate": lambda pair: Pair(pair.cert[:300], pair.key),
    "no key": lambda pair: Pair(pair.cert, b""),
    "half a key": lambda pair: Pair(pair.cert, pair.key[:100]),
    "another's key": lambda pair: Pair(pair.cert, OTHER.key),
    "expired": lambda pair: EXPIRED,
    "not yet valid": lambda pair: AUTHORITY.issue(valid_from_s=60),
    "certificate as key": lambda pair: Pair(pair.cert, pair.cert),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_gateway_does_not_start_with_certificates_of_no_use(tmp_path: Path, name: str) -> None:
    cert, key = BROKEN[name](GOOD).write(tmp_path, "server")
    with pytest.raises(CertificateError) as raised:
        ServerCertificates(cert, key)
    assert str(tmp_path) in str(raised.value), "the message names the file"
    with pytest.raises(ValueError, match=r"server\.(pem|key)"):
        check_plaintext(GatewaySettings(address="0.0.0.0:1", tls_cert_file=cert, tls_key_file=key))


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    cert, key = GOOD.write(tmp_path, "server")
    for files in (
        (tmp_path / "absent", key, None),
        (cert, tmp_path / "absent", None),
        (cert, key, tmp_path / "absent"),
    ):
        with pytest.raises(CertificateError, match="absent: No such file"):
            ServerCertificates(*files)
    with pytest.raises(CertificateError, match=r"server\.key: holds no PEM certificate"):
        ServerCertificates(cert, key, key)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pair_leaves_the_last_good_one_in_force_and_is_said_once(tmp_path: Path, name: str) -> None:
    cert, key = GOOD.write(tmp_path, "server")
    certificates = ServerCertificates(cert, key)
    BROKEN[name](GOOD).write(tmp_path, "server")
    with capture_logs() as logs:
        for _ in range(3):
            assert certificates.reload().chain == GOOD.cert
    assert [line["event"] for line in logs] == ["tls.certificate_refused"]
    OTHER.write(tmp_path, "server")
    with capture_logs() as logs:
        assert certificates.reload().chain == OTHER.cert
        assert certificates.reload().key == OTHER.key
    assert [line["event"] for line in logs] == ["tls.certificate_loaded"]


def test_files_that_did_not_change_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates = ServerCertificates(*GOOD.write(tmp_path, "server"))
    reads: list[Path] = []
    monkeypatch.setattr("gateway.tls._read", reads.append)
    assert certificates.reload().chain == GOOD.cert
    assert reads == []


def test_a_pair_that_is_not_yet_valid_is_taken_when_its_time_comes(tmp_path: Path) -> None:
    now = [datetime.now(UTC)]
    cert, key = GOOD.write(tmp_path, "server")
    certificates = ServerCertificates(cert, key, now=lambda: now[0])
    later = AUTHORITY.issue(valid_from_s=60)
    later.write(tmp_path, "server")
    assert certificates.reload().chain == GOOD.cert
    now[0] += timedelta(seconds=90)
    assert certificates.reload().chain == later.cert


def test_a_directory_that_is_swapped_whole_is_noticed(tmp_path: Path) -> None:
    """As Kubernetes renews mounted secrets: a link to another directory."""
    for name, pair in (("one", GOOD), ("two", OTHER)):
        pair.write(tmp_path / name, "server")
        os.utime(tmp_path / name / "server.pem", (1, 1))
        os.utime(tmp_path / name / "server.key", (1, 1))
    link = tmp_path / "data"
    link.symlink_to("one")
    certificates = ServerCertificates(link / "server.pem", link / "server.key")
    (tmp_path / "new").symlink_to("two")
    os.replace(tmp_path / "new", link)
    assert certificates.reload().chain == OTHER.cert


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tls_cert_file": "x"}, "belong together"),
        ({"client_certificates": "required"}, "need tls_cert_file"),
        ({"client_certificates": "required", "tls_cert_file": "x", "tls_key_file": "x"}, "need tls_cert_file"),
        ({"tls_client_ca_file": "x", "tls_cert_file": "x", "tls_key_file": "x"}, "client_certificates is none"),
        (
            {
                "client_certificates": "optional",
                "tls_client_ca_file": "x",
                "tls_cert_file": "x",
                "tls_key_file": "x",
            },
            "mtls_address belong together",
        ),
        *(
            (
                {"tls_cert_file": "x", "tls_key_file": "y", "tls_client_ca_file": "z", **fields},
                f"{name}=unix:/run/relay.sock is a socket without TLS",
            )
            for name, fields in {
                "address": {"client_certificates": "required", "address": "unix:/run/relay.sock"},
                "admin_address": {"client_certificates": "required", "admin_address": "unix:/run/relay.sock"},
                "mtls_address": {"client_certificates": "optional", "mtls_address": "unix:/run/relay.sock"},
            }.items()
        ),
        ({"mtls_address": "127.0.0.1:1"}, "mtls_address belong together"),
    ],
    ids=range(9),
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatewaySettings(**settings)


@asynccontextmanager
async def serving(folder: Path, **settings: Any) -> AsyncIterator[GatewayServer]:
    cert, key = GOOD.write(folder, "server")
    values = {"address": "127.0.0.1:0", "admin_address": "127.0.0.1:0", "drain_s": 0} | settings
    if settings.get("client_certificates", "none") != "none":
        values["tls_client_ca_file"] = AUTHORITY.write(folder)
    server = GatewayServer(GatewaySettings(tls_cert_file=cert, tls_key_file=key, **values), Guard(None), Guard(None))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def can_call(address: str, *, pair: Pair | None = None, authority: Authority = AUTHORITY) -> bool:
    credentials = grpc.ssl_channel_credentials(authority.pem, pair and pair.key, pair and pair.cert)
    async with grpc.aio.secure_channel(address, credentials) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=20)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:  # the admin port has no such service
                return True
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                return False
            raise
        return True


async def can_call_in_plaintext(address: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=20)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                return False
            raise
        return True


async def test_both_ports_speak_tls_alone(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for address in (server.address, server.admin_address):
            assert await can_call(address)
            assert not await can_call(address, authority=STRANGER)
            assert not await can_call_in_plaintext(address)


async def test_required_certificates_are_those_of_our_authority_and_in_time(tmp_path: Path) -> None:
    async with serving(tmp_path, client_certificates="required") as server:
        for address in (server.address, server.admin_address):
            assert await can_call(address, pair=CLIENT)
            assert not await can_call(address)
            assert not await can_call(address, pair=STRANGER.issue(common_name="acme"))
            assert not await can_call(address, pair=AUTHORITY.issue(common_name="acme", valid_for_s=-5))


async def test_optional_certificates_have_an_address_of_their_own(tmp_path: Path) -> None:
    async with serving(tmp_path, client_certificates="optional", mtls_address="127.0.0.1:0") as server:
        assert await can_call(server.address)
        assert await can_call(server.address, pair=CLIENT)
        assert await can_call(server.mtls_address, pair=CLIENT)
        assert not await can_call(server.mtls_address)
        assert not await can_call(server.mtls_address, pair=STRANGER.issue(common_name="acme"))
        assert await can_call(server.admin_address)


async def test_new_certificates_and_a_new_authority_of_clients_need_no_restart(tmp_path: Path) -> None:
    async with serving(tmp_path, client_certificates="required") as server:
        assert await can_call(server.address, pair=CLIENT)
        renewed = STRANGER.issue(hosts=("127.0.0.1",))
        renewed.write(tmp_path, "server")
        assert await can_call(server.address, pair=CLIENT, authority=STRANGER)
        assert not await can_call(server.address, pair=CLIENT)
        STRANGER.write(tmp_path)
        newcomer = STRANGER.issue(common_name="acme")
        assert await can_call(server.address, pair=newcomer, authority=STRANGER)
        assert not await can_call(server.address, pair=CLIENT, authority=STRANGER)


async def test_a_socket_in_the_file_system_needs_no_certificate(tmp_path: Path) -> None:
    async with serving(tmp_path, address=f"unix:{tmp_path}/relay.sock") as server:
        assert await can_call_in_plaintext(server.address)
        assert await can_call(server.admin_address)
