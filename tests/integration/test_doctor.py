"""`torchrelay doctor` beside real servers: every fault that can be provoked is found, with the remedy for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import redis as redis_sync

from common import keys
from common.acl import Role, rules
from common.diagnosis.findings import Finding, Level, Surroundings
from common.diagnosis.server import check_server
from common.embedded import EmbeddedServer
from common.redis import connect
from common.registry import ModelCard, ModelRegistry
from common.settings import RedisSettings
from gateway.checks import check_certificates, check_gateway, check_operators, check_ports
from tests.builders_common import server_under_test
from tests.builders_identity import Authority
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system, until
from tests.ports import free_port
from torchrelay.cli.connection import Connection
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"
CARD = ModelCard(
    name="probed",
    revision="r1",
    shard=keys.shard_name("probed", "r1"),
    vocab_size=10,
    context_tokens=9,
    max_output_tokens=9,
)
AUTHORITY = Authority()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("TORCHRELAY_"):
            monkeypatch.delenv(name)


# -- the queue's server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path_factory.mktemp("server"), max_memory_mb=500, program=server_under_test()) as running:
        yield running


@pytest.fixture
def superuser(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[redis_sync.Redis]:
    """The server as it should be, with a user for each role, and a model; and put right again afterwards."""
    monkeypatch.setenv("TORCHRELAY_REDIS_URL", server.url)
    with redis_sync.Redis(unix_socket_path=str(server.socket_path)) as client:
        client.flushall()
        for role in (Role.GATEWAY, Role.WORKER, Role.ADMIN):
            client.execute_command("ACL", "SETUSER", role.value, *rules(role), ">secret")
        before = {name: client.config_get(name)[name] for name in CONFIGURED}
        yield client
        for name, value in before.items():
            client.config_set(name, value)
        client.execute_command("ACL", "SETUSER", "default", "resetpass", "nopass")


CONFIGURED = ("appendonly", "appendfsync", "maxmemory", "maxmemory-policy")


def as_user(monkeypatch: pytest.MonkeyPatch, name: str, password: str = "secret") -> None:
    monkeypatch.setenv("TORCHRELAY_REDIS_USERNAME", name)
    monkeypatch.setenv("TORCHRELAY_REDIS_PASSWORD", password)


async def look(**where: Any) -> dict[str, Finding]:
    """The findings by check; of more than one the worst."""
    order = [Level.OK, Level.WARNING, Level.FAILURE]
    found = await check_server(Surroundings(environment=os.environ, root=Path("/no/such/root"), **where))
    return {one.check: one for one in sorted(found, key=lambda one: order.index(one.level))}


async def test_a_server_that_is_as_it_should_be(superuser: redis_sync.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    for user in ("default", "gateway", "worker"):
        if user != "default":
            as_user(monkeypatch, user)
        found = await look()
        assert {one.level for one in found.values()} == {Level.OK}, found
        assert user in found["permissions"].what or user == "default"
    assert "does not tell" in found["queue"].what, "a worker may not ask"


Provoke = Callable[[redis_sync.Redis, pytest.MonkeyPatch], object]
SERVER_FAULTS: dict[str, tuple[Provoke, str, Level, str, str]] = {
    "nothing there": (
        lambda client, patch: patch.setenv("TORCHRELAY_REDIS_URL", f"redis://u:pw@127.0.0.1:{free_port()}/0"),
        "queue", Level.FAILURE, "redis://***@127.0.0.1", "set TORCHRELAY_REDIS_URL",
    ),
    "wrong password": (
        lambda client, patch: as_user(patch, "gateway", "wrong"),
        "queue", Level.FAILURE, "does not take this user", "TORCHRELAY_REDIS_PASSWORD",
    ),
    "no password": (
        lambda client, patch: client.execute_command("ACL", "SETUSER", "default", ">secret"),
        "queue", Level.FAILURE, "does not take this user", "TORCHRELAY_REDIS_PASSWORD",
    ),
    "certificate unreadable": (
        lambda client, patch: patch.setenv("TORCHRELAY_REDIS_TLS_CA_FILE", "/no/such/ca.pem"),
        "queue", Level.FAILURE, "TLS_CA_FILE=/no/such/ca.pem cannot be read", "correct the path",
    ),
    "user of another role": (
        lambda client, patch: as_user(patch, "admin"),
        "permissions", Level.FAILURE, "may not run its scripts", "torchrelay acl",
    ),
    "a command too few": (
        lambda client, patch: (client.execute_command("ACL", "SETUSER", "gateway", "-zadd"), as_user(patch, "gateway")),
        "permissions", Level.FAILURE, "of a gateway's rights: zadd", "torchrelay acl",
    ),
    "keys too few": (
        lambda client, patch: (
            client.execute_command("ACL", "SETUSER", "worker", "resetkeys", "~{doctor}:meta", "%R~{models}:*"),
            as_user(patch, "worker"),
        ),
        "permissions", Level.FAILURE, "{x}:", "torchrelay acl",
    ),
    "no append-only file": (
        lambda client, patch: client.config_set("appendonly", "no"),
        "persistence", Level.WARNING, "no append-only file", "appendonly yes",
    ),
    "synced each second": (
        lambda client, patch: client.config_set("appendfsync", "everysec"),
        "persistence", Level.WARNING, "synced each second", "appendfsync always",
    ),
    "evicts": (
        lambda client, patch: client.config_set("maxmemory-policy", "allkeys-lru"),
        "queue memory", Level.FAILURE, "allkeys-lru", "maxmemory-policy noeviction",
    ),
    "no bound": (
        lambda client, patch: client.config_set("maxmemory", "0"),
        "queue memory", Level.WARNING, "no maxmemory", "set maxmemory",
    ),
    "full": (
        lambda client, patch: client.config_set("maxmemory", "500kb"),
        "queue memory", Level.FAILURE, "no new work is accepted", "raise maxmemory",
    ),
    "replicas missing": (
        lambda client, patch: patch.setenv("TORCHRELAY_REDIS_MIN_REPLICAS", "1"),
        "replicas", Level.FAILURE, "0 replicas are connected, 1 must confirm", "TORCHRELAY_REDIS_MIN_REPLICAS",
    ),
    "another schema": (
        lambda client, patch: client.hset(keys.meta(CARD.shard), "schema", "9"),
        "schema", Level.FAILURE, "is of schema 9", "a server of its own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVER_FAULTS)
async def test_a_fault_of_the_queues_server_is_found_with_its_remedy(
    name: str, server: EmbeddedServer, superuser: redis_sync.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    provoke, check, level, what, fix = SERVER_FAULTS[name]
    redis = connect(RedisSettings(url=server.url))
    await ModelRegistry(redis).publish(CARD, {})
    await redis.aclose()
    provoke(superuser, monkeypatch)
    found = (await look())[check]
    assert found.level is level, found
    assert what in found.what, found
    assert fix in found.fix, found
    assert "\n" not in found.what + found.fix
    assert not {"secret", ":pw@"} & set(found.what.split())


async def test_a_server_whose_certificate_nobody_trusts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = AUTHORITY.issue(hosts=("127.0.0.1",)).write(tmp_path, "queue")
    shown = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    shown.load_cert_chain(cert, key)
    async with await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0, ssl=shown) as listening:
        port = listening.sockets[0].getsockname()[1]
        monkeypatch.setenv("TORCHRELAY_REDIS_URL", f"rediss://127.0.0.1:{port}/0")
        found = (await look())["queue"]
    assert (found.level, "certificate that is not trusted" in found.what) == (Level.FAILURE, True), found
    assert "TORCHRELAY_REDIS_TLS_CA_FILE" in found.fix


async def test_a_server_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        async def execute_command(self, *command: str) -> Any:
            return {"redis_version": "6.2.14"} if command[0] == "INFO" else "PONG"

        async def aclose(self) -> None:
            pass

    monkeypatch.setattr("common.diagnosis.server.connect", lambda settings: Old())
    found = (await look())["queue"]
    assert (found.level, "is Redis 6.2.14" in found.what) == (Level.FAILURE, True), found
    assert found.fix == "upgrade it to Redis 7 or Valkey"


async def test_clocks_that_disagree_are_found(superuser: redis_sync.Redis) -> None:
    for ahead, way in ((100, "behind"), (-100, "ahead of")):
        found = (await look(wall_clock=lambda: time.time() + ahead))["clock"]  # noqa: B023
        assert (found.level, f"s {way} this machine's" in found.what) == (Level.WARNING, True), found
        assert "synchronise" in found.fix


async def test_the_queue_of_serve_is_found_where_no_other_is_named(
    superuser: redis_sync.Redis, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with EmbeddedServer(tmp_path / "queue") as own:
        found = (await look(data_dir=tmp_path))["queue"]
        assert str(own.socket_path) not in found.what, "a server that is named counts"
        monkeypatch.delenv("TORCHRELAY_REDIS_URL")
        assert str(own.socket_path) in (await look(data_dir=tmp_path))["queue"].what


# -- the gateway


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A gateway that knows operators at loopback, one that asks them for keys, and a worker."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    with running_system(tmp_path_factory.mktemp("system")) as system:
        system.add_gateway()
        system.add_gateway(TORCHRELAY_GATEWAY_ADMIN_AUTH="required")
        system.add_worker(folder, MODEL)
        asyncio.run(system.ready(MODEL))
        yield system


def at(system: System, key: str | None, *, gateway: int = 0, admin_key: str | None = None) -> Surroundings:
    found = system.gateways[gateway]
    connection = Connection(found.address, key)
    return Surroundings(connection=connection, admin_address=found.admin_address, admin_key=admin_key)


def one(found: Any, check: str) -> Finding:
    (finding,) = [finding for finding in found if finding.check == check]
    assert isinstance(finding, Finding)
    return finding


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the key that `serve` may have made for whoever runs the tests."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


async def test_a_gateway_that_serves_is_said_to(system: System) -> None:
    found = await check_gateway(at(system, system.key))
    assert [(finding.check, finding.level) for finding in found] == [
        ("gateway", Level.OK), ("key", Level.OK), ("models", Level.OK),
    ]  # fmt: skip
    assert found[1].what == "the key works; scopes: generate, tasks, batch"
    assert "tiny: 1 workers, 0 requests wait" in found[2].what
    operators = one(await check_operators(at(system, None)), "operators")
    assert operators.level is Level.OK
    assert operators.what.endswith("you may: admin.fleet, admin.keys, admin.tenants, admin.usage")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("key", "what", "fix"),
    [
        ("", "there is no API key", "torchrelay keys create"),
        ("tr_wrong", "does not take this key", "torchrelay keys list"),
        ("admin.usage", "may neither generate nor", "--scope generate"),
    ],
)
async def test_a_key_that_does_not_do_is_a_failure(system: System, key: str, what: str, fix: str) -> None:
    secret = system.create_key("ops", scopes=(key,)) if key.startswith("admin") else key or None
    found = one(await check_gateway(at(system, secret)), "key")
    assert (found.level, what in found.what, fix in found.fix) == (Level.FAILURE, True, True), found


async def test_a_key_with_some_scopes_says_which(system: System) -> None:
    found = one(await check_gateway(at(system, system.create_key("few", scopes=("generate",)))), "key")
    assert (found.level, found.what) == (Level.OK, "the key works; scopes: generate")


async def test_an_operator_without_a_key_or_without_rights_is_told_so(system: System) -> None:
    unknown = one(await check_operators(at(system, None, gateway=1)), "operators")
    assert (unknown.level, "torchrelay bootstrap" in unknown.fix) == (Level.WARNING, True)
    no_rights = one(await check_operators(at(system, None, gateway=1, admin_key=system.key)), "operators")
    assert (no_rights.level, "may nothing there" in no_rights.what) == (Level.WARNING, True)
    few = system.create_key("ops", scopes=("admin.usage",))
    some = one(await check_operators(at(system, None, gateway=1, admin_key=few)), "operators")
    assert (some.level, some.what.endswith("you may: admin.usage")) == (Level.OK, True)


async def test_models_without_a_worker_are_worse_where_somebody_waits(tmp_path: Path) -> None:
    with running_system(tmp_path) as system:
        gateway = system.add_gateway()
        await system.ready()
        where = at(system, system.key)
        empty = one(await check_gateway(where), "models")
        assert (empty.level, "torchrelay worker --model" in empty.fix) == (Level.WARNING, True)
        redis = connect(RedisSettings(url=system.server.url))
        worker = system.add_worker(write_tiny_model(tmp_path / "tiny"), MODEL)
        await system.ready(MODEL)
        await asyncio.to_thread(worker.stop)
        await system.ready(MODEL, num_workers=0)
        cold = one(await check_gateway(where), "models")
        assert (cold.level, "--model-name tiny" in cold.fix) == (Level.WARNING, True)
        async with system.client(gateway) as client:
            request = pb.SubmitGenerationRequest(
                model=MODEL, input=pb.GenerationInput(text="hello"), config=pb.GenerationConfig(max_tokens=1)
            )
            await client.generation.SubmitGeneration(request, metadata=client.metadata)
        waiting = one(await check_gateway(where), "models")
        assert (waiting.level, "1 requests wait" in waiting.what) == (Level.FAILURE, True), waiting
        await redis.aclose()


async def test_a_gateway_that_has_not_reached_its_queue_is_not_ready(tmp_path: Path) -> None:
    with running_system(tmp_path) as system:
        gateway = system.add_gateway(TORCHRELAY_REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
        where = at(system, system.key)

        async def is_there() -> bool:
            return "no gateway answers" not in (await check_gateway(where))[0].what

        await until(is_there, what=f"the port of {gateway.name}")
        (found,) = await check_gateway(where)
        assert (found.level, "is not ready" in found.what) == (Level.FAILURE, True)


# -- ports and certificates


@contextlib.asynccontextmanager
async def other_program() -> AsyncIterator[str]:
    """A server that is not ours: it says nothing, and hangs up."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as listening:
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"


async def test_what_is_no_gateway_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = f"127.0.0.1:{free_port()}"
    where = Surroundings(connection=Connection(nothing, None), admin_address=nothing)
    (found,) = await check_gateway(where)
    assert (found.level, found.what) == (Level.FAILURE, f"no gateway answers at {nothing}")
    assert "--address" in found.fix
    operators = one(await check_operators(where), "operators")
    assert (operators.level, "--admin-address" in operators.fix) == (Level.WARNING, True)
    other = grpc.aio.server()
    address = f"127.0.0.1:{other.add_insecure_port('127.0.0.1:0')}"
    await other.start()
    (found,) = await check_gateway(Surroundings(connection=Connection(address, None)))
    await other.stop(None)
    assert (found.level, f"what answers at {address} is no gateway" in found.what) == (Level.FAILURE, True)


async def test_ports_are_free_or_ours_or_a_failure(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ADDRESS", "ADMIN_ADDRESS", "OPENAI_ADDRESS", "HEALTH_ADDRESS")

    def listen_at(*addresses: str) -> None:
        for name, address in zip(names, addresses, strict=True):
            monkeypatch.setenv(f"TORCHRELAY_GATEWAY_{name}", address)

    listen_at(*(f"127.0.0.1:{free_port()}" for _ in names))
    assert {(one.level, one.what.endswith("is free")) for one in await check_ports(Surroundings())} == {
        (Level.OK, True)
    }
    gateway = system.gateways[0]
    listen_at(gateway.address, gateway.admin_address, gateway.openai_address, "")
    found = await check_ports(Surroundings())
    assert [(one.level, one.what.endswith("answered by a gateway")) for one in found] == [(Level.OK, True)] * 3
    gateway = system.gateways[1]  # whose operators need a key
    listen_at("unix:/tmp/none.sock", gateway.admin_address, "", "")
    assert [one.what.endswith("answered by a gateway") for one in await check_ports(Surroundings())] == [True]
    async with other_program() as taken:
        listen_at(taken, taken, taken, taken)
        found = await check_ports(Surroundings())
        assert {one.level for one in found} == {Level.FAILURE}
        for name, one in zip(names, found, strict=True):
            assert f"set TORCHRELAY_GATEWAY_{name} to another port" in one.fix
    listen_at("nowhere", "", "", "")
    (found_one,) = await check_ports(Surroundings())
    assert (found_one.level, "is not host:port" in found_one.what) == (Level.FAILURE, True)


@pytest.mark.parametrize(
    ("valid_for_s", "level", "what"),
    [
        (86_400 * 30, Level.OK, "more days"),
        (86_400 * 3, Level.WARNING, "valid for 2 more days"),
        (-5, Level.FAILURE, "expired at"),
    ],
)
async def test_certificates_are_sound_or_soon_to_be_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, valid_for_s: float, level: Level, what: str
) -> None:
    assert await check_certificates(Surroundings()) == []
    cert, key = AUTHORITY.issue(hosts=("127.0.0.1",), valid_for_s=valid_for_s).write(tmp_path, "server")
    monkeypatch.setenv("TORCHRELAY_GATEWAY_TLS_CERT_FILE", str(cert))
    monkeypatch.setenv("TORCHRELAY_GATEWAY_TLS_KEY_FILE", str(key))
    (found,) = await check_certificates(Surroundings())
    assert (found.level, what in found.what) == (level, True), found
    assert bool(found.fix) == (level is not Level.OK)
    key.unlink()
    (found,) = await check_certificates(Surroundings())
    assert (found.level, str(key) in found.what) == (Level.FAILURE, True)
