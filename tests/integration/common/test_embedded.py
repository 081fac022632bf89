from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis as redis_sync
import structlog

from common.embedded import EmbeddedServer, EmbeddedServerError, describe_durability
from common.redis import connect
from common.settings import RedisSettings
from tests.builders_common import FlakyRedis, server_under_test


@pytest.fixture
def own(tmp_path: Path) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path / "data", program=server_under_test())
    yield server
    server.kill()


def client_of(server: EmbeddedServer) -> redis_sync.Redis:
    return redis_sync.Redis(unix_socket_path=str(server.socket_path))


def wait_until_gone(pid: int) -> None:
    end = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the server outlives its parent"
        time.sleep(0.02)


def test_what_was_acknowledged_survives_kill_and_stop(own: EmbeddedServer) -> None:
    for number, end in enumerate([own.kill, own.stop, own.kill]):
        own.start()
        with client_of(own) as client:
            assert client.xlen("log") == number
            client.xadd("log", {"n": number})
        end()
        assert not own.is_running
    own.start()
    with client_of(own) as client:
        assert client.xlen("log") == 3


def test_it_listens_on_its_socket_alone_unless_a_port_is_asked_for(own: EmbeddedServer) -> None:
    own.start()
    assert own.pid is not None
    assert [c for c in psutil.Process(own.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN] == []
    assert own.socket_path.stat().st_mode & 0o077 == 0


def test_two_servers_never_share_a_data_directory(own: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.embedded._LOCK_TIMEOUT_S", 0.2)
    own.start()
    second = EmbeddedServer(own.socket_path.parent, program=server_under_test())
    with pytest.raises(EmbeddedServerError, match="another server uses"):
        second.start()
    own.stop()
    second.start()
    second.stop()


def test_a_torn_end_of_the_log_is_cut_and_said_aloud(own: EmbeddedServer) -> None:
    own.start()
    with client_of(own) as client:
        for number in range(10):
            client.set(f"k{number}", number)
    own.kill()
    (log,) = own.socket_path.parent.glob("appendonlydir/*.incr.aof")
    os.truncate(log, log.stat().st_size - 7)
    with structlog.testing.capture_logs() as events:
        own.start()
    assert "server.log_truncated" in [event["event"] for event in events if event["log_level"] == "warning"]
    with client_of(own) as client:
        assert client.dbsize() == 9


def test_a_log_damaged_in_the_middle_is_not_loaded_in_part(own: EmbeddedServer) -> None:
    own.start()
    with client_of(own) as client:
        for number in range(10):
            client.set(f"k{number}", number)
    own.kill()
    (log,) = own.socket_path.parent.glob("appendonlydir/*.incr.aof")
    content = bytearray(log.read_bytes())
    at = content.index(b"*3", len(content) // 2)
    content[at] = 0xFF
    log.write_bytes(content)
    with pytest.raises(EmbeddedServerError, match=r"server\.log"):
        own.start()
    assert not own.is_running


def test_a_long_data_directory_still_has_a_socket(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / ("long" * 40), program=server_under_test()) as server, client_of(server) as client:
        assert client.ping()
        assert len(str(server.socket_path)) < 100


if sys.platform.startswith("linux"):  # elsewhere the kernel has no such service, and the lock alone guards

    def test_the_server_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from common.embedded import EmbeddedServer\n"
            f"s = EmbeddedServer(Path({str(tmp_path / 'data')!r})); s.start()\n"
            "sys.stdout.write(f'\\n{s.pid} is it\\n'); sys.stdout.flush(); sys.stdin.read()"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            pid = next(int(line.split()[0]) for line in parent.stdout if line.endswith(b" is it\n"))
            parent.send_signal(signal.SIGKILL)
        wait_until_gone(pid)


def test_a_program_that_is_no_server_is_reported(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="ended with status"):
        EmbeddedServer(tmp_path, program=Path("/bin/false")).start()


async def test_durability_is_described_as_it_is(own: EmbeddedServer) -> None:
    own.start()
    client = connect(RedisSettings(url=own.url))
    described = await describe_durability(client)
    assert (described.survives_process, described.survives_host, described.survives_failover) == (True, True, False)
    with client_of(own) as superuser:
        superuser.config_set("appendfsync", "everysec")
        assert (await describe_durability(client)).survives_process is False
        superuser.config_set("appendfsync", "no")
        assert (await describe_durability(client)).survives_host is False
        superuser.config_set("appendonly", "no")
        described = await describe_durability(client)
        assert (described.survives_process, described.survives_host) == (False, False)
    await client.aclose()


async def test_durability_is_unknown_where_the_server_does_not_tell(
    gateway_redis: FlakyRedis, worker_redis: FlakyRedis
) -> None:
    as_gateway = await describe_durability(gateway_redis)  # may ask INFO, not CONFIG
    assert (as_gateway.survives_host, as_gateway.survives_failover) == (None, False)
    as_worker = await describe_durability(worker_redis)
    assert (as_worker.survives_process, as_worker.survives_failover) == (None, None)
