"""The queue's server: the bundled Valkey and its users, or another one and its secrets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, Popen

import pytest
import redis
import typer
from redis.exceptions import NoPermissionError
from typer.testing import CliRunner

from common.acl_command import acl
from common.embedded import find_server
from tests.deploy.builders import EXTERNAL, model
from tests.deploy.charts import ChartError, Rendered
from tests.deploy.conftest import Render
from tests.ports import free_port


def test_a_bundled_server_loses_nothing_and_evicts_nothing(render: Render) -> None:
    config = render(valkey={"maxmemory": "3gb"}).get("ConfigMap", "valkey")["data"]["valkey.conf"].splitlines()
    for line in ("appendonly yes", "appendfsync always", "maxmemory-policy noeviction", "maxmemory 3gb"):
        assert line in config


def test_a_changed_configuration_starts_the_server_anew(render: Render) -> None:
    def checksum(**valkey: str) -> str:
        template = render(valkey=valkey).get("StatefulSet", "valkey")["spec"]["template"]
        found: str = template["metadata"]["annotations"]["checksum/config"]
        return found

    assert checksum() == checksum()
    assert checksum() != checksum(maxmemory="2gb")


def test_each_role_is_a_user_of_the_bundled_server(render: Render) -> None:
    rendered = render(models=[model()])
    for kind, name, role in (
        ("Deployment", "gateway", "gateway"),
        ("Deployment", "worker-tiny", "worker"),
        ("Job", "tiny-register", "worker"),
    ):
        env = rendered.container(kind, name).env
        assert env["TORCHRELAY_REDIS_URL"] == "redis://demo-torchrelay-valkey:6379/0"
        assert env["TORCHRELAY_REDIS_USERNAME"] == role
        wanted = {"secretKeyRef": {"name": "demo-torchrelay-valkey", "key": f"{role}-password"}}
        assert env["TORCHRELAY_REDIS_PASSWORD"] == wanted
    assert rendered.get("Service", "valkey")["spec"]["ports"][0]["port"] == 6379


def test_who_writes_keys_is_a_user_of_its_own_and_workers_do_not_know_it(render: Render) -> None:
    rendered = render(models=[model()])
    env = rendered.container("Deployment", "gateway").env
    url = "redis://admin:$(REDIS_ADMIN_PASSWORD)@demo-torchrelay-valkey:6379/0"
    assert env["TORCHRELAY_GATEWAY_ADMIN_REDIS_URL"] == url
    assert env["REDIS_ADMIN_PASSWORD"]["secretKeyRef"]["key"] == "admin-password"
    names = list(env)  # a reference is replaced only where what it names stands before it
    assert names.index("REDIS_ADMIN_PASSWORD") < names.index("TORCHRELAY_GATEWAY_ADMIN_REDIS_URL")
    assert "REDIS_ADMIN_PASSWORD" not in rendered.container("Deployment", "worker-tiny").env


def test_passwords_are_made_unless_a_secret_is_given(render: Render) -> None:
    made = render().get("Secret", "valkey")
    assert set(made["data"]) == {"gateway-password", "worker-password", "admin-password"}
    assert len(set(made["data"].values())) == 3
    assert made["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    given = render(valkey={"existingSecret": "mine"})
    assert given.all("Secret") == []
    env = given.container("Deployment", "gateway").env
    assert env["TORCHRELAY_REDIS_PASSWORD"]["secretKeyRef"]["name"] == "mine"


def test_with_another_server_there_is_none_bundled(render: Render) -> None:
    rendered = render(redis=EXTERNAL, models=[model()])
    for kind in ("StatefulSet", "Secret", "ConfigMap"):
        assert rendered.all(kind) == []
    assert not [
        name
        for kind in ("Service", "ServiceAccount", "NetworkPolicy")
        for name in rendered.names(kind)
        if "valkey" in name
    ]
    gateway, worker = (rendered.container("Deployment", name).env for name in ("gateway", "worker-tiny"))
    for env, user, key in ((gateway, "gw", "gateway-password"), (worker, "wk", "worker-password")):
        assert env["TORCHRELAY_REDIS_URL"] == EXTERNAL["url"]
        assert env["TORCHRELAY_REDIS_USERNAME"] == user
        assert env["TORCHRELAY_REDIS_PASSWORD"]["secretKeyRef"] == {"name": "redis-users", "key": key}
    assert (
        gateway["TORCHRELAY_GATEWAY_ADMIN_REDIS_URL"] == "rediss://ad:$(REDIS_ADMIN_PASSWORD)@redis.example.com:6380/0"
    )


def test_another_server_without_users_needs_no_secret(render: Render) -> None:
    env = render(redis={"url": "redis://redis:6379/0"}).container("Deployment", "gateway").env
    assert not [name for name in env if "PASSWORD" in name or "USERNAME" in name]
    assert "TORCHRELAY_GATEWAY_ADMIN_REDIS_URL" not in env
    with pytest.raises(ChartError, match=r"redis\.auth\.worker\.username needs redis\.auth\.secretName"):
        render(redis={"url": "redis://redis:6379/0", "auth": {"worker": {"username": "w"}}})


def test_a_password_in_the_url_is_refused(render: Render) -> None:
    with pytest.raises(ChartError, match="url"):
        render(redis={"url": "redis://user:secret@redis:6379/0"})


def test_tls_and_sentinels_are_set_for_both_roles(examples: dict[str, Rendered]) -> None:
    rendered = examples["external-redis"]
    for name in ("gateway", "worker-smollm2-135m-instruct"):
        container = rendered.container("Deployment", name)
        for variable in ("TLS_CA_FILE", "TLS_CERT_FILE", "TLS_KEY_FILE"):
            assert container.env[f"TORCHRELAY_REDIS_{variable}"].rpartition("/")[0] in container.mounts
        assert container.env["TORCHRELAY_REDIS_SENTINEL_USERNAME"] == "sentinel"
        assert container.env["TORCHRELAY_REDIS_SENTINEL_PASSWORD"]["secretKeyRef"]["key"] == "sentinel-password"
        assert container.env["TORCHRELAY_REDIS_MIN_REPLICAS"] == "1"


PASSWORDS = {role: f"{role}-password-of-a-test" for role in ("gateway", "worker", "admin")}


@pytest.fixture
def bundled(render: Render, tmp_path: Path) -> Iterator[int]:
    """The server's port. It runs with what was rendered: configuration, and users as the init container writes them."""
    rendered = render()
    (script,) = rendered.get("StatefulSet", "valkey")["spec"]["template"]["spec"]["initContainers"][0]["args"]
    users = tmp_path / "users.acl"
    make, echo = script.replace("\\\n", " ").strip().splitlines()
    words = make.replace("/passwords/", f"{tmp_path}/").split()
    assert words[:2] == ["torchrelay", "acl"]
    assert words[-2:] == [">", "/users/users.acl"]
    for role, password in PASSWORDS.items():
        (tmp_path / f"{role}-password").write_text(password)
    app = typer.Typer()
    app.command()(acl)
    made = CliRunner().invoke(app, words[2:-2], catch_exceptions=False)
    line = echo.removeprefix("echo '").removesuffix("' >> /users/users.acl")
    users.write_text(made.stdout + line + "\n")
    port = free_port()
    config = rendered.get("ConfigMap", "valkey")["data"]["valkey.conf"]
    changes = {
        "dir /data": f"dir {tmp_path}",
        "/users/users.acl": str(users),
        "port 6379": f"port {port}",
        "* -::*": "127.0.0.1",
    }
    for old, new in changes.items():
        assert old in config
        config = config.replace(old, new)
    (tmp_path / "valkey.conf").write_text(config)
    with Popen([str(find_server()), str(tmp_path / "valkey.conf")], stdout=DEVNULL) as server:
        try:
            wait_for(port)
            yield port
        finally:
            server.terminate()


def wait_for(port: int) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            with connect(port, "probe", "probe") as client:
                client.ping()
            return
        except redis.ConnectionError:
            assert time.monotonic() < end
            time.sleep(0.05)


def connect(port: int, user: str, password: str) -> redis.Redis:
    return redis.Redis(port=port, username=user, password=password, protocol=2)


def test_the_bundled_server_starts_as_configured_and_knows_its_users(bundled: int) -> None:
    with connect(bundled, "gateway", PASSWORDS["gateway"]) as client:
        assert client.set("{shard}:meta", "x")
        assert client.info("memory")["maxmemory_policy"] == "noeviction"
        assert client.info("persistence")["aof_enabled"] == 1
        with pytest.raises(NoPermissionError):
            client.config_get("*")
    with connect(bundled, "worker", PASSWORDS["worker"]) as client, pytest.raises(NoPermissionError):
        client.get("{keys}:x")  # API keys are not for workers
    with connect(bundled, "admin", PASSWORDS["admin"]) as client:
        assert client.set("{keys}:x", "y")


def test_probes_may_ask_whether_it_lives_and_nothing_else(bundled: int, render: Render) -> None:
    container = render().container("StatefulSet", "valkey")
    command = container.spec["livenessProbe"]["exec"]["command"][-1]
    assert "--user probe" in command
    assert command.endswith("ping | grep -q PONG")
    with connect(bundled, "probe", "probe") as client:
        assert client.ping()
        with pytest.raises(NoPermissionError):
            client.get("{shard}:meta")


def test_nobody_gets_in_without_a_password(bundled: int) -> None:
    with (
        redis.Redis(port=bundled, protocol=2) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()
