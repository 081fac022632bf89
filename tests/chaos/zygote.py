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
import sys
from pathlib import Path
from typing import Any, Final

from common.children import die_with_parent
from tests.chaos.patches import apply

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
        apply(request["patches"])
        status = importlib.import_module(f"{request['module']}.__main__").main()
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
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(sys.argv[1])
