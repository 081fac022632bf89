"""Starts gateways and workers in a fraction of a second: forked off a process that has imported what they need.

A worker's imports take some seconds of a core, and a run of hundreds of kills would spend most of the machine on them.
The child runs the same `main` as `python -m gateway` and `python -m worker` do. Nothing that starts threads (grpc,
OpenMP) has been used when it is forked.

Speaks JSON lines: requests on stdin, answers on stdout.

    {"module": "worker", "env": {...}, "log": "path", "patches": ["name", ...]}  ->  {"pid": 123}
    (a child ends)                                                              ->  {"ended": 123, "status": -9}
"""

from __future__ import annotations

import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from common.children import die_with_parent

_PRELOADED: Final = {
    "gateway": ("gateway.__main__",),
    "worker": (
        "worker.__main__",
        "torch",
        "transformers",
        "worker.process",
        "transformers.models.llama.modeling_llama",
    ),
}
# A worker's imports serve those that are broken on purpose too.
ROLES: Final = {"gateway": "gateway", "worker": "worker", "tests.broken_worker": "worker"}  # by program
_START_S: Final = 60.0


class Zygote:
    """One process that forks children of one role; its answers are heard by a thread."""

    def __init__(self, role: str, env: Mapping[str, str], log: Path) -> None:
        self._role = role
        self._answers: list[int] = []
        self._ended: dict[int, int] = {}
        self._changed = threading.Condition()
        self._starting = threading.Lock()
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.zygote", role],
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
                    self._ended.pop(message["pid"], None)  # numbers are given anew
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


class ForkedProcess:
    """A child of a zygote, with what `subprocess.Popen` offers and tests use."""

    def __init__(self, zygote: Zygote, module: str, env: Mapping[str, str], log: Path) -> None:
        self._zygote = zygote
        self.pid = zygote.start(module, env, log, ())

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self._zygote.status(self.pid)

    def wait(self, timeout: float = _START_S) -> int:
        """Wait for the end; return the exit status. Raises subprocess.TimeoutExpired."""
        try:
            return self._zygote.wait(self.pid, timeout)
        except TimeoutError as error:
            raise subprocess.TimeoutExpired(str(self.pid), timeout) from error

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it as kill -9 does."""
        self.send_signal(signal.SIGKILL)


# -- the process itself ---------------------------------------------------------------------------------------------


def _start(request: dict[str, Any]) -> int:
    """Fork a child that runs a program of ours; return its process id."""
    end_with_us = die_with_parent()
    pid = os.fork()
    if pid:
        return pid
    status = 70  # EX_SOFTWARE
    try:
        os.setsid()
        if end_with_us is not None:
            end_with_us()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.closerange(3, 256)
        os.environ.update(request["env"])
        if request["patches"]:
            from tests.chaos.patches import apply

            apply(request["patches"])
        program = request["module"]
        status = importlib.import_module(f"{program}.__main__" if program in _PRELOADED else program).main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - the child's last words belong into its log
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stderr.flush()
        os._exit(status)


def _answer(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def _reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _answer({"ended": pid, "status": os.waitstatus_to_exitcode(status)})


def _preload(role: str) -> None:
    """Import what a role needs. What a worker does before it imports torch is done here, once for all children."""
    if role == "worker":
        program = importlib.import_module("worker.__main__")
        program.quiet_openmp()
        program.leave_out_triton("cpu")
        program.quiet_openmp = lambda: None  # type: ignore[attr-defined]
        program.leave_out_triton = lambda device: None  # type: ignore[attr-defined]
    for name in _PRELOADED[role]:
        importlib.import_module(name)


def main(role: str) -> None:
    """Import what a role needs, say so, and start children until stdin ends."""
    _preload(role)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.set_blocking(reader, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(reader, selectors.EVENT_READ)
    _answer({"ready": role, "preload": os.environ.get("LD_PRELOAD", "")})
    pending = b""
    while True:
        ready = {key.fd for key, _ in selector.select()}
        if reader in ready:
            os.read(reader, 4096)
            _reap()
        if 0 in ready:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                _answer({"pid": _start(json.loads(line))})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(sys.argv[1])
