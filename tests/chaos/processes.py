"""Gateways and workers as processes that can be killed, stopped and started again within moments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_START_S = 60.0


class Zygote:
    """One process that forks children of one role; see `tests.chaos.zygote`. A context manager."""

    def __init__(self, role: str, env: Mapping[str, str], log: Path) -> None:
        self._role = role
        self._answers: list[int] = []
        self._ended: dict[int, int] = {}
        self._changed = threading.Condition()
        self._starting = threading.Lock()
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.zygote", role],
                env={**os.environ, **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        self._is_ready = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            with self._changed:
                if "pid" in message:
                    self._answers.append(message["pid"])
                elif "ended" in message:
                    self._ended[message["ended"]] = message["status"]
                else:
                    self._is_ready = True
                self._changed.notify_all()

    def wait_ready(self) -> None:
        """Wait until everything is imported. Raises RuntimeError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_ready, _START_S):
                raise RuntimeError(f"the process that starts {self._role}s is not ready")

    def start(self, module: str, env: Mapping[str, str], log: Path, patches: tuple[str, ...]) -> int:
        """Start a child; return its process id."""
        request: dict[str, Any] = {"module": module, "env": dict(env), "log": str(log), "patches": list(patches)}
        with self._starting:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            with self._changed:
                if not self._changed.wait_for(lambda: self._answers, _START_S):
                    raise RuntimeError(f"no {self._role} was started")
                return self._answers.pop()

    def status(self, pid: int) -> int | None:
        """Return a child's exit status, None while it runs."""
        with self._changed:
            return self._ended.get(pid)

    def wait(self, pid: int, timeout_s: float) -> int:
        """Wait for a child's end; return its status. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: pid in self._ended, timeout_s):
                raise TimeoutError(f"{self._role} {pid} does not end")
            return self._ended[pid]

    def close(self) -> None:
        """End it, and all its children with it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


@dataclass
class Party:
    """A gateway or worker: started, killed and started again under one name, each time as a new incarnation."""

    name: str
    module: str
    zygote: Zygote
    env: dict[str, str]
    log_path: Path
    patches: tuple[str, ...] = ()
    address: str = ""  # of a gateway
    admin_address: str = ""
    pid: int | None = None
    wanted: bool = True  # whoever tends the system starts it again when it has ended
    num_starts: int = 0
    log_offset: int = 0  # where its present life begins in its log
    statuses: list[int] = field(default_factory=list)

    def start(self) -> None:
        """Start it; it must not be running."""
        assert not self.is_running
        self.log_offset = self.log_path.stat().st_size if self.log_path.exists() else 0
        self.pid = self.zygote.start(self.module, self.env, self.log_path, self.patches)
        self.num_starts += 1

    @property
    def is_running(self) -> bool:
        return self.pid is not None and self.zygote.status(self.pid) is None

    def signal(self, number: int) -> bool:
        """Send a signal; return whether there was anything to send it to."""
        if not self.is_running or self.pid is None:
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        """As kill -9 does."""
        if self.signal(signal.SIGKILL):
            self.wait(10)

    def wait(self, timeout_s: float) -> int:
        """Wait for the end; return the exit status. Raises TimeoutError."""
        assert self.pid is not None
        status = self.zygote.wait(self.pid, timeout_s)
        self.statuses.append(status)
        return status

    def log(self) -> str:
        """Return what its present life has logged."""
        if not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as file:
            file.seek(self.log_offset)
            return file.read().decode(errors="replace")
