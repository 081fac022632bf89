"""A server that speaks TLS alone and knows the users that `torchrelay acl` has written, and nobody else."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis as redis_sync
import typer
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError
from typer.testing import CliRunner

from common import keys
from common.acl import Role
from common.acl_command import acl
from common.api_keys import ApiKeys
from common.embedded import find_server
from common.errors import BackendRefused, BackendUnavailable
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.redis import Redis, Retry, connect, execute
from common.settings import QueueSettings, RedisSettings
from tests.builders_common import make_job, server_under_test
from tests.builders_identity import Authority
from tests.builders_replicas import wait_until
from tests.integration.common.conftest import SHARD
from tests.integration.common.test_acl import DENIED, FOR_NOBODY, OF_OTHERS
from tests.ports import free_port

AUTHORITY = Authority()
STRANGER = Authority("another authority")
PASSWORDS = {role: f"{role.value}-a-long-password" for role in Role}
QUICK = Retry(deadline_ms=2000, base_ms=10, cap_ms=50)


def run_acl(*args: str, status: int = 0) -> Any:
    app = typer.Typer()
    app.command()(acl)
    result = CliRunner().invoke(app, args, env={"COLUMNS": "200"})
    assert result.exit_code == status, result.output
    return result


def write_acl(folder: Path, *args: str) -> Path:
    """The file that the command writes for PASSWORDS."""
    options = []
    for role, password in PASSWORDS.items():
        (folder / role.value).write_text(f"{password}\n")
        options += ["--password-file", f"{role.value}={folder / role.value}"]
    path = folder / "users.acl"
    result = run_acl(*options, *args)
    assert result.stderr == ""
    path.write_text(result.stdout)
    return path


@dataclass
class Server:
    """A running server and its certificates' folder."""

    folder: Path
    port: int

    def settings(self, role: Role, **changes: Any) -> RedisSettings:
        values: dict[str, Any] = {
            "url": f"rediss://127.0.0.1:{self.port}/0",
            "username": role.value,
            "password": PASSWORDS[role],
            "tls_ca_file": self.folder / "ca.pem",
        }
        return RedisSettings(**values | changes)

    def client_pair(self, authority: Authority = AUTHORITY) -> dict[str, Path]:
        cert, key = authority.issue(common_name="client").write(self.folder, "client")
        return {"tls_cert_file": cert, "tls_key_file": key}


@contextmanager
def running(program: Path, folder: Path, port: int, *options: str) -> Iterator[None]:
    log = folder / "server.log"
    command = [str(program), "--dir", str(folder), "--save", "", "--aclfile", str(folder / "users.acl"), *options]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def is_ready() -> bool:
        text = log.read_text(errors="replace")
        assert process.poll() is None, text
        return "eady to accept connections" in text

    try:
        wait_until(is_ready, "the server is ready")
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def running_tls(folder: Path, *, asks_clients: bool = False, host: str = "127.0.0.1") -> Iterator[Server]:
    program = shutil.which("redis-server")
    if program is None:  # Valkey's wheel is built without TLS
        pytest.skip("needs redis-server on PATH (Debian: apt-get install redis-server)")
    cert, key = AUTHORITY.issue(hosts=(host,)).write(folder, "server")
    AUTHORITY.write(folder)
    write_acl(folder)
    server = Server(folder, free_port())
    options = {
        "port": "0",
        "tls-port": str(server.port),
        "bind": "127.0.0.1",
        "tls-cert-file": str(cert),
        "tls-key-file": str(key),
        "tls-ca-cert-file": str(folder / "ca.pem"),
        "tls-auth-clients": "yes" if asks_clients else "no",
    }
    with running(Path(program), folder, server.port, *(word for item in options.items() for word in _option(*item))):
        yield server


def _option(name: str, value: str) -> tuple[str, str]:
    return f"--{name}", value


async def ask(settings: RedisSettings) -> str:
    """What the queue's programs would see: PONG, or the reason of the failure."""
    redis = connect(settings)
    try:
        reply: bytes | bool = await QUICK.call(lambda: execute(redis, "PING"))
        return "PONG" if reply is True or reply == b"PONG" else str(reply)
    except (BackendUnavailable, BackendRefused) as error:
        return error.reason
    finally:
        await redis.aclose()


async def test_every_role_works_over_tls_and_a_job_goes_through(tmp_path: Path) -> None:
    with running_tls(tmp_path) as server:
        clients: dict[Role, Redis] = {role: connect(server.settings(role)) for role in Role}
        queue = JobQueue(clients[Role.GATEWAY], keys.random_id(), QueueSettings(), retry=QUICK)
        claims = JobClaims(clients[Role.WORKER], SHARD, keys.random_id(), QueueSettings(), retry=QUICK)
        queued = await queue.enqueue(SHARD, make_job())
        claimed = await claims.claim(4, 1000, 1000)
        assert [job.generation_id for job in claimed] == [queued.generation_id]
        made = await ApiKeys(clients[Role.ADMIN], retry=QUICK).create("acme", "test")
        assert (await ApiKeys(clients[Role.GATEWAY], retry=QUICK).verify(made.secret)).tenant == "acme"
        for client in clients.values():
            await client.aclose()


async def test_another_authority_and_another_host_are_told_apart_from_a_server_that_is_away(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = STRANGER.write(tmp_path / "other")
    with running_tls(tmp_path) as server:
        assert await ask(server.settings(Role.GATEWAY)) == "PONG"
        assert await ask(server.settings(Role.GATEWAY, tls_ca_file=other)) == "BACKEND_UNTRUSTED"
        named = f"rediss://localhost:{server.port}/0"
        assert await ask(server.settings(Role.GATEWAY, url=named)) == "BACKEND_UNTRUSTED"
        assert await ask(server.settings(Role.GATEWAY, url=named, tls_check_hostname=False)) == "PONG"
        plaintext = f"redis://127.0.0.1:{server.port}/0"
        assert await ask(server.settings(Role.GATEWAY, url=plaintext)) == "BACKEND_UNAVAILABLE"
        assert await ask(server.settings(Role.GATEWAY, password="wrong")) == "BACKEND_REFUSED"
        gone = server.settings(Role.GATEWAY)
    assert await ask(gone) == "BACKEND_UNAVAILABLE"


async def test_a_server_that_asks_for_certificates_gets_ours(tmp_path: Path) -> None:
    with running_tls(tmp_path, asks_clients=True) as server:
        assert await ask(server.settings(Role.WORKER)) == "BACKEND_UNAVAILABLE"
        assert await ask(server.settings(Role.WORKER, **server.client_pair())) == "PONG"
        assert await ask(server.settings(Role.WORKER, **server.client_pair(STRANGER))) == "BACKEND_UNAVAILABLE"


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[int]:
    """A server without TLS, of the kind that is under test, with the command's users; its port."""
    write_acl(tmp_path)
    port = free_port()
    program = server_under_test() or find_server()
    with running(program, tmp_path, port, "--port", str(port), "--bind", "127.0.0.1"):
        yield port


@pytest.mark.parametrize("role", list(Role))
async def test_a_user_of_the_file_can_do_nothing_outside_its_role(plain: int, role: Role) -> None:
    redis = connect(
        RedisSettings(url=f"redis://127.0.0.1:{plain}/0", username=role.value, password=PASSWORDS[role])  # type: ignore[arg-type]
    )
    assert await execute(redis, "PING")
    for command in (*FOR_NOBODY, *OF_OTHERS[role]):
        with pytest.raises(ResponseError, match=DENIED):
            await execute(redis, *command)
    await redis.aclose()


def test_nobody_else_gets_in(plain: int) -> None:
    with redis_sync.Redis(port=plain) as anybody, pytest.raises((AuthenticationError, ResponseError)):
        anybody.ping()
    wrong = redis_sync.Redis(port=plain, username="gateway", password=PASSWORDS[Role.WORKER])
    with wrong, pytest.raises((AuthenticationError, ResponseError)):
        wrong.ping()
    admin = redis_sync.Redis(port=plain, username="admin", password=PASSWORDS[Role.ADMIN])
    with admin, pytest.raises(NoPermissionError):
        admin.execute_command("ACL", "WHOAMI")


def test_passwords_that_are_made_are_shown_once_and_not_in_the_file() -> None:
    first, second = run_acl(), run_acl("worker", "gateway", "--prefix", "relay-", "--keep-default", "--replicas")
    assert [line.split()[1] for line in first.stdout.splitlines()] == ["default", "gateway", "worker", "admin"]
    assert [line.split()[1] for line in second.stdout.splitlines()] == ["relay-worker", "relay-gateway"]
    shown = [line.rpartition(" ")[2] for result in (first, second) for line in result.stderr.splitlines()]
    assert len(set(shown)) == 5
    assert all(len(password) >= 43 and password not in first.stdout + second.stdout for password in shown)
    waits = [line for line in (first.stdout + second.stdout).splitlines() if "+waitaof" in line]
    assert [line.split()[1] for line in waits] == ["relay-gateway"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--password-file", "gateway"), "ROLE=FILE"),
        (("--password-file", "root=x"), "ROLE=FILE"),
        (("worker", "--password-file", "gateway=good"), "ROLE=FILE"),
        (("--password-file", "gateway=good", "--password-file", "gateway=good"), "ROLE=FILE"),
        (("--password-file", "gateway=absent"), "cannot be read"),
        (("--password-file", "gateway=short"), "at least 12"),
        (("--password-file", "gateway=lines"), "at least 12"),
        (("--prefix", "a b"), "takes letters"),
        (("reader",), "is not one of"),
    ],
    ids=range(9),
)
def test_what_the_command_cannot_use_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("good", "a-long-password"), ("short", "short"), ("lines", "a-long\npassword-in-two")):
        (tmp_path / name).write_text(text)
    result = run_acl(*args, status=2)
    assert said in result.stderr
    assert result.stdout == ""
