"""Row 18: what the server has acknowledged when it is killed during a slow sync, by policy."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import redis as redis_sync
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from common.embedded import EmbeddedServer, find_server
from tests.chaos import shim
from tests.chaos.shim import Shim, build, wrap_program

pytestmark = pytest.mark.skipif(shim.compiler() is None, reason="needs a C compiler")


def num_lost(folder: Path, policy: str) -> tuple[int, int]:
    """Write until the server is killed while a sync takes 3 s; return how many writes were acknowledged, and lost."""
    slow = Shim(build(folder), folder / "shim")
    server = EmbeddedServer(folder / "data", program=wrap_program(find_server(), slow, folder / "program"))
    server.start()
    acknowledged = 0

    def write() -> None:
        nonlocal acknowledged
        with redis_sync.Redis(unix_socket_path=str(server.socket_path), retry=Retry(NoBackoff(), 0)) as client:
            client.config_set("appendfsync", policy)
            while True:
                try:
                    client.rpush("log", acknowledged)
                except RedisError:
                    return
                acknowledged += 1
                if acknowledged == 100:
                    slow.set_fsync_delay(3)

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(3.5)
    server.kill()
    writer.join()
    slow.set_fsync_delay(0)
    server.start()
    with redis_sync.Redis(unix_socket_path=str(server.socket_path)) as client:
        kept = client.llen("log")
    server.stop()
    slow.close()
    return acknowledged, acknowledged - kept


def test_synced_before_each_answer_nothing_is_lost(tmp_path: Path) -> None:
    acknowledged, lost = num_lost(tmp_path, "always")
    assert acknowledged >= 100
    assert lost <= 0  # a write that was not acknowledged may have been kept


def test_synced_each_second_acknowledged_writes_are_lost(tmp_path: Path) -> None:
    """Not a wish: the reason why the default is another. If this fails, the warning in the README is out of date."""
    acknowledged, lost = num_lost(tmp_path, "everysec")
    assert acknowledged > 100
    assert lost > 0
