"""Parts for tests of replication: a primary and a replica, that lag, part and get promoted."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis as redis_sync

from common.embedded import EmbeddedServer

_WAIT_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll. Raises AssertionError."""
    end = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} does not hold after {_WAIT_S:.0f} s"
        time.sleep(0.02)


@dataclass
class Node:
    """A server, and a client that may do anything."""

    server: EmbeddedServer
    port: int
    client: redis_sync.Redis

    def info(self) -> dict[str, Any]:
        return dict(self.client.info("replication"))

    def follow(self, primary: Node) -> None:
        """Become a replica, with all that the primary has."""
        self.client.execute_command("REPLICAOF", "127.0.0.1", primary.port)
        wait_until(lambda: self.info().get("master_link_status") == "up", "the replica's link")
        wait_until(lambda: self.offset == primary.offset, "the replica's offset")

    @property
    def offset(self) -> int:
        info = self.info()
        return int(info["slave_repl_offset"] if info["role"] == "slave" else info["master_repl_offset"])

    def promote(self) -> None:
        """Be a primary, with what came so far."""
        self.client.execute_command("REPLICAOF", "NO", "ONE")

    def freeze(self) -> None:
        assert self.server.pid is not None
        os.kill(self.server.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.server.pid is not None
        os.kill(self.server.pid, signal.SIGCONT)


@contextmanager
def running_node(folder: Path, program: Path | None = None) -> Iterator[Node]:
    """A server with a port, that begins to send a replica its data at once."""
    port = free_port()
    server = EmbeddedServer(folder, program=program, port=port)
    with server, redis_sync.Redis(unix_socket_path=str(server.socket_path)) as client:
        client.config_set("repl-diskless-sync-delay", 0)
        client.config_set("repl-timeout", 3600)  # a frozen replica stays connected
        node = Node(server, port, client)
        try:
            yield node
        finally:
            if server.is_running:
                node.thaw()
