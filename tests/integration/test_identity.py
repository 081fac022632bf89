"""Whose call it is, over real sockets: tokens, certificates, and a proxy's word. Forgeries are rows 5 and 6."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from common import keys
from common.redis import connect, execute
from common.settings import RedisSettings
from common.startup import CANNOT_START
from tests.builders_calls import refused
from tests.builders_identity import AUDIENCE, Authority, Issuer, KeyServer, Pair, running_key_server
from tests.builders_models import write_tiny_model
from tests.builders_system import Gateway, System, running_system, until
from tests.ports import free_port
from tests.unit.gateway.identity.test_jwt import FORGED, ISSUING
from torchrelay.cli.main import make_app
from torchrelay.client import AsyncClient, Tls
from torchrelay.client.requests import make_stream_request
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import generation_pb2_grpc

MODEL = "tiny"
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
INVALID = (UNAUTHENTICATED, "CREDENTIALS_INVALID", "the credentials are not valid")
PATTERNS = "spiffe://prod/ns/{tenant}/sa/*,CN={tenant}"
AUTHORITY = Authority()
CALLER = AUTHORITY.issue(uris=("spiffe://prod/ns/direct/sa/web",))
EDGE = AUTHORITY.issue(uris=("spiffe://prod/ns/edge/sa/proxy",))
XFCC = "x-forwarded-client-cert"
STALE_S = 6


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running_system(tmp_path_factory.mktemp("system")) as system:
        system.add_gateway()
        system.add_worker(write_tiny_model(tmp_path_factory.mktemp("tiny")), MODEL)
        asyncio.run(system.ready(MODEL))
        yield system


@dataclass
class Door:
    """One way in: an address, and what the connection shows there."""

    address: str
    pair: Pair | None = None
    has_tls: bool = False

    def channel(self) -> grpc.aio.Channel:
        if not self.has_tls:
            return grpc.aio.insecure_channel(self.address)
        credentials = grpc.ssl_channel_credentials(
            AUTHORITY.pem, self.pair and self.pair.key, self.pair and self.pair.cert
        )
        return grpc.aio.secure_channel(self.address, credentials)

    async def submit(self, *metadata: tuple[str, str]) -> str:
        """Queue a generation; return its id."""
        stream = make_stream_request(
            MODEL, [3, 4], {"max_tokens": 1}, time_limit_s=None, disconnect_grace_s=0, idempotency_key=None
        )
        request = pb.SubmitGenerationRequest(model=MODEL, input=stream.input, config=stream.config)
        async with self.channel() as channel:
            stub: generation_pb2_grpc.GenerationServiceAsyncStub = generation_pb2_grpc.GenerationServiceStub(channel)
            return (await stub.SubmitGeneration(request, metadata=metadata, timeout=60)).accepted.generation_id


async def tenant_of(system: System, generation_id: str) -> str:
    """Whom a generation is charged to."""
    redis = connect(RedisSettings(url=system.server.url))
    try:
        tenant: bytes = await execute(redis, "HGET", keys.job(keys.shard_of(generation_id), generation_id), "t")
        return tenant.decode()
    finally:
        await redis.aclose()


async def is_up(door: Door) -> None:
    """Wait until the gateway there is ready, as a probe would: until it knows the models, too."""

    async def serves() -> bool:
        async with door.channel() as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.aio.AioRpcError:
                return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    await until(serves, 60, "the gateway is ready")


@pytest.fixture(scope="module")
def key_server() -> Iterator[KeyServer]:
    with running_key_server() as server:
        server.documents["/keys"] = ISSUING.key_set()
        yield server


@pytest.fixture(scope="module")
def token_door(system: System, key_server: KeyServer) -> Door:
    """A gateway that takes tokens as well as keys."""
    gateway = system.add_gateway(
        TORCHRELAY_AUTH_JWT_ISSUER=ISSUING.name,
        TORCHRELAY_AUTH_JWT_AUDIENCE=AUDIENCE,
        TORCHRELAY_AUTH_JWKS_URL=f"{key_server.url}/keys",
        TORCHRELAY_AUTH_STRICT="true",
    )
    door = Door(gateway.address)
    asyncio.run(is_up(door))
    return door


def bearer(token: str) -> tuple[str, str]:
    return ("authorization", f"Bearer {token}")


@pytest.mark.parametrize("key_id", ["rsa", "ec", "ed"])
async def test_a_token_s_tenant_is_charged(system: System, token_door: Door, key_id: str) -> None:
    generation_id = await token_door.submit(bearer(ISSUING.token(key_id, tenant="umbrella")))
    assert await tenant_of(system, generation_id) == "umbrella"


async def test_keys_count_beside_tokens(system: System, token_door: Door) -> None:
    assert await tenant_of(system, await token_door.submit(("x-api-key", system.key))) == "tests"
    assert await tenant_of(system, await token_door.submit(bearer(system.key))) == "tests"


@pytest.mark.row(5, 6)
@pytest.mark.parametrize("name", FORGED)
async def test_a_forged_token_is_refused_and_the_next_good_call_is_served(token_door: Door, name: str) -> None:
    with refused() as refusal:
        await token_door.submit(bearer(FORGED[name]()))
    assert refusal.summary == INVALID
    await token_door.submit(bearer(ISSUING.token()))


@pytest.mark.row(4)
async def test_two_credentials_are_refused_in_strict_mode(system: System, token_door: Door) -> None:
    with refused() as refusal:
        await token_door.submit(bearer(ISSUING.token()), ("x-api-key", system.key))
    assert (refusal.code, refusal.reason) == (UNAUTHENTICATED, "CREDENTIALS_AMBIGUOUS")


async def test_a_flood_of_unknown_key_ids_asks_the_key_server_once(token_door: Door, key_server: KeyServer) -> None:
    await token_door.submit(bearer(ISSUING.token()))
    before = len(key_server.paths)
    stranger = Issuer(ISSUING.name)

    async def knock(number: int) -> None:
        with refused() as refusal:
            await token_door.submit(bearer(stranger.token(header={"kid": f"unknown-{number}"})))
        assert refusal.summary == INVALID

    await asyncio.gather(*(knock(number) for number in range(100)))
    assert len(key_server.paths) - before <= 1


async def test_while_the_key_server_is_down_known_keys_serve_until_they_are_too_old(system: System) -> None:
    """Row 44."""
    with running_key_server() as server:
        server.documents["/keys"] = ISSUING.key_set()
        gateway = system.add_gateway(
            TORCHRELAY_AUTH_JWT_ISSUER=ISSUING.name,
            TORCHRELAY_AUTH_JWT_AUDIENCE=AUDIENCE,
            TORCHRELAY_AUTH_JWKS_URL=f"{server.url}/keys",
            TORCHRELAY_AUTH_JWKS_CACHE_S="0.2",
            TORCHRELAY_AUTH_JWKS_REFETCH_S="0.1",
            TORCHRELAY_AUTH_JWKS_MAX_STALE_S=str(STALE_S),
            TORCHRELAY_AUTH_JWKS_TIMEOUT_S="0.5",
        )
        door = Door(gateway.address)
        await is_up(door)
        await door.submit(bearer(ISSUING.token()))
        server.status = 503  # up, but no use
        num_asked = len(server.paths)

        async def asked_in_vain() -> bool:
            await door.submit(bearer(ISSUING.token(sub=f"robot-{len(server.paths)}")))
            return len(server.paths) >= num_asked + 2

        await until(asked_in_vain, 20, "the gateway asks for keys again")
    # Now nobody is there at all.
    await door.submit(bearer(ISSUING.token(sub="another")))
    with refused() as refusal:
        await door.submit(bearer(ISSUING.token(header={"kid": "new"})))
    assert refusal.summary == INVALID

    async def is_refused() -> bool:
        try:
            await door.submit(bearer(ISSUING.token()))
        except grpc.aio.AioRpcError as error:
            return error.code() == grpc.StatusCode.UNAVAILABLE  # nobody can tell whether it is good
        return False

    await until(is_refused, 30, "keys that are too old do not count")
    await door.submit(("x-api-key", system.key))  # keys of our own have nothing to do with it
    gateway.kill()


def add_certificate_gateway(system: System, folder: Path, **env: str) -> Gateway:
    cert, key = AUTHORITY.issue(hosts=("127.0.0.1",)).write(folder, "server")
    return system.add_gateway(
        TORCHRELAY_GATEWAY_TLS_CERT_FILE=str(cert),
        TORCHRELAY_GATEWAY_TLS_KEY_FILE=str(key),
        TORCHRELAY_GATEWAY_TLS_CLIENT_CA_FILE=str(AUTHORITY.write(folder)),
        TORCHRELAY_AUTH_CERTIFICATE_TENANTS=PATTERNS,
        **env,
    )


@pytest.fixture(scope="module")
def mutual(system: System, tmp_path_factory: pytest.TempPathFactory) -> Gateway:
    """A gateway with optional certificates that trusts the edge's, and nobody's address."""
    address = f"127.0.0.1:{free_port()}"
    gateway = add_certificate_gateway(
        system,
        tmp_path_factory.mktemp("tls"),
        TORCHRELAY_GATEWAY_CLIENT_CERTIFICATES="optional",
        TORCHRELAY_GATEWAY_MTLS_ADDRESS=address,
        TORCHRELAY_TRUSTED_PROXIES="spiffe://prod/ns/edge/sa/proxy",
    )
    asyncio.run(is_up(Door(address, AUTHORITY.issue(), has_tls=True)))
    return gateway


@pytest.fixture(scope="module")
def mutual_address(mutual: Gateway) -> str:
    """Where it takes clients with certificates."""
    return mutual.env["TORCHRELAY_GATEWAY_MTLS_ADDRESS"]


FORWARDED = (XFCC, "By=spiffe://prod/ns/relay/sa/gateway;Hash=ab;URI=spiffe://prod/ns/forwarded/sa/web")


async def test_a_client_certificate_s_tenant_is_charged(system: System, mutual_address: str) -> None:
    door = Door(mutual_address, CALLER, has_tls=True)
    assert await tenant_of(system, await door.submit()) == "direct"
    assert await tenant_of(system, await door.submit(FORWARDED)) == "direct", "the header is not read"
    assert await tenant_of(system, await door.submit(("x-api-key", system.key))) == "tests", "keys come first"
    by_name = Door(mutual_address, AUTHORITY.issue(common_name="named"), has_tls=True)
    assert await tenant_of(system, await by_name.submit()) == "named"


async def test_a_trusted_proxy_s_word_counts_and_the_proxy_itself_is_nobody(
    system: System, mutual_address: str
) -> None:
    door = Door(mutual_address, EDGE, has_tls=True)
    assert await tenant_of(system, await door.submit(FORWARDED)) == "forwarded"
    with refused() as refusal:
        await door.submit()
    assert (refusal.code, refusal.reason) == (UNAUTHENTICATED, "CREDENTIALS_MISSING")
    for hostile in ('URI="spiffe://prod/ns/forwarded/sa/web', "URI=a,,URI=b", ";"):
        with refused() as refusal:
            await door.submit((XFCC, hostile))
        assert refusal.summary == INVALID


async def test_a_certificate_that_names_no_tenant_needs_another_credential(system: System, mutual_address: str) -> None:
    door = Door(mutual_address, AUTHORITY.issue(uris=("spiffe://other/ns/acme/sa/web",)), has_tls=True)
    with refused() as refusal:
        await door.submit()
    assert (refusal.code, refusal.reason) == (UNAUTHENTICATED, "CREDENTIALS_MISSING")
    assert await tenant_of(system, await door.submit(("x-api-key", system.key))) == "tests"


async def test_the_library_and_the_command_show_certificates(
    system: System, mutual: Gateway, mutual_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = AUTHORITY.write(tmp_path)
    cert, key = CALLER.write(tmp_path, "caller")
    async with AsyncClient(mutual_address, tls=Tls(str(ca), str(cert), str(key))) as client:
        generation = await client.generate([3, 4], model=MODEL, max_tokens=3)
    assert await tenant_of(system, generation.generation_id) == "direct"

    monkeypatch.setenv("TORCHRELAY_TLS_CA", str(ca))
    shown = ("--tls-cert", str(cert), "--tls-key", str(key))
    assert MODEL in await run_verb("models", "list", "--address", mutual_address, *shown)
    assert MODEL in await run_verb("models", "list", "--address", mutual.address, "--api-key", system.key)
    assert MODEL in await run_verb("ps", "--workers", "--admin-address", mutual.admin_address)


async def run_verb(*args: str) -> str:
    """What a verb of the command says; in a thread, since it blocks."""
    result = await asyncio.to_thread(CliRunner().invoke, make_app(), args)
    assert result.exit_code == 0, result.output
    return result.stdout


async def test_the_library_asks_for_a_token_at_every_call(system: System, token_door: Door) -> None:
    tenants = iter(("first", "second"))
    async with AsyncClient(token_door.address, token=lambda: ISSUING.token(tenant=next(tenants))) as client:
        submitted = [await _submit(client) for _ in range(2)]
    assert [await tenant_of(system, generation_id) for generation_id in submitted] == ["first", "second"]


async def _submit(client: AsyncClient) -> str:
    request = pb.SubmitGenerationRequest(model=MODEL, input=pb.GenerationInput(token_ids=pb.TokenIds(ids=[3])))
    request.config.max_tokens = 1
    response = await client.generation.SubmitGeneration(request, metadata=client.metadata, timeout=60)
    return response.accepted.generation_id


@pytest.mark.parametrize(("proxies", "is_trusted"), [("127.0.0.0/8", True), ("127.0.0.2", False), ("", False)])
async def test_a_peer_s_address_decides_whether_its_word_counts(system: System, proxies: str, is_trusted: bool) -> None:
    gateway = system.add_gateway(TORCHRELAY_AUTH_CERTIFICATE_TENANTS=PATTERNS, TORCHRELAY_TRUSTED_PROXIES=proxies)
    door = Door(gateway.address)
    await is_up(door)
    if is_trusted:
        assert await tenant_of(system, await door.submit(FORWARDED)) == "forwarded"
    else:
        with refused() as refusal:
            await door.submit(FORWARDED)
        assert (refusal.code, refusal.reason) == (UNAUTHENTICATED, "CREDENTIALS_MISSING")
    gateway.kill()


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"TORCHRELAY_TRUSTED_PROXIES": "0.0.0.0/0"}, "TORCHRELAY_TRUSTED_PROXIES: Value error, 0.0.0.0/0: everybody"),
        ({"TORCHRELAY_AUTH_JWT_ALGORITHMS": "none"}, "TORCHRELAY_AUTH_JWT_ALGORITHMS.0: Input should be"),
        (
            {"TORCHRELAY_GATEWAY_TLS_CERT_FILE": "/absent.pem", "TORCHRELAY_GATEWAY_TLS_KEY_FILE": "/absent.key"},
            "/absent.pem: No such file or directory",
        ),
    ],
    ids=range(3),
)
def test_a_gateway_does_not_start_with_settings_of_no_use(env: dict[str, str], line: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "gateway"], env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == CANNOT_START
    (said,) = result.stderr.splitlines()
    assert said.startswith(line)
