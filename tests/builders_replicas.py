"""Parts for tests of replication: servers that follow each other, lag, part and get promoted; a proxy; a sentinel."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis as redis_sync

from common.embedded import EmbeddedServer, find_server
from tests.ports import free_port

_WAIT_S = 30.0


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

    def follow(self, primary: Node, through: int | None = None) -> None:
        """Become a replica, with all that the primary has; by way of a proxy's port, if one is given."""
        self.client.execute_command("REPLICAOF", "127.0.0.1", through or primary.port)
        wait_until(lambda: self.info().get("master_link_status") == "up", "the replica's link")
        wait_until(lambda: self.offset == primary.offset, "the replica's offset")
        # An older primary sends nothing more before the replica's first acknowledgement, up to a second later.
        primary.client.publish("followed", "")
        wait_until(lambda: primary.is_acknowledged_by(self), "the replica's acknowledgement")

    def is_acknowledged_by(self, replica: Node) -> bool:
        """Whether the other has acknowledged all that it was sent."""
        info = self.info()
        known = [value for key, value in info.items() if key.startswith("slave") and isinstance(value, dict)]
        return any(int(one["port"]) == replica.port and one["offset"] == info["master_repl_offset"] for one in known)

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


class Proxy:
    """Forwards TCP connections to a port, which can change; can stand still, and cut all that it has."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._moves = threading.Event()
        self._moves.set()
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # closed
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._sockets |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._moves.wait()
                sink.sendall(data)
        self._close(source, sink)

    def _close(self, *sockets: socket.socket) -> None:
        for one in sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
            with self._lock:
                self._sockets.discard(one)

    def freeze(self) -> None:
        """From now on nothing arrives, and nobody is told."""
        self._moves.clear()

    def cut(self) -> None:
        """End all connections; what was held up is lost."""
        with self._lock:
            sockets = list(self._sockets)
        self._close(*sockets)
        self._moves.set()

    def switch(self, target: int) -> None:
        """Lead to another server, as a failover does."""
        self._target = target
        self.cut()

    def close(self) -> None:
        self._listener.close()
        self.cut()


@contextmanager
def running_proxy(target: int) -> Iterator[Proxy]:
    proxy = Proxy(target)
    try:
        yield proxy
    finally:
        proxy.close()


@contextmanager
def running_sentinel(
    folder: Path, name: str, primary: Node, *config: str, program: Path | None = None
) -> Iterator[int]:
    """One sentinel, a quorum of its own, that takes a server for dead after half a second. Yields its port."""
    folder.mkdir(parents=True)
    port = free_port()
    lines = (
        f"port {port}",
        "bind 127.0.0.1",
        f"dir {folder}",
        f"logfile {folder / 'sentinel.log'}",
        f"sentinel monitor {name} 127.0.0.1 {primary.port} 1",
        f"sentinel down-after-milliseconds {name} 500",
        f"sentinel failover-timeout {name} 5000",
        *config,
    )
    path = folder / "sentinel.conf"
    path.write_text("\n".join(lines) + "\n")
    process = subprocess.Popen(
        [str(program or find_server()), str(path), "--sentinel"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with redis_sync.Redis(port=port) as client:

            def knows_a_replica() -> bool:
                assert process.poll() is None, (folder / "sentinel.log").read_text()
                with suppress(redis_sync.RedisError):
                    return len(client.execute_command("SENTINEL", "REPLICAS", name)) > 0
                return False

            if not any("requirepass" in line or "user default" in line for line in config):
                wait_until(knows_a_replica, "the sentinel's knowledge of a replica")
        yield port
    finally:
        process.kill()
        process.wait()
