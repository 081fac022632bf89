"""`torchrelay serve` as a newcomer runs it: one terminal, real processes, and what is said when it cannot work."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.builders_models import write_tiny_model
from tests.ports import free_port

PROGRAM = Path(sys.executable).parent / "torchrelay"
PATIENCE_S = 120


@dataclass
class Terminal:
    """Where serve runs: its addresses, its home, and the processes that were started in it."""

    home: Path
    address: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        xdg = {"XDG_CONFIG_HOME": str(self.home / "config"), "XDG_DATA_HOME": str(self.home / "data")}
        return {**os.environ, "TORCHRELAY_LOG_FORMAT": "json", **xdg}

    def serve(self, *args: str, **env: str) -> subprocess.Popen[str]:
        addresses = ("--address", self.address, "--admin-address", f"127.0.0.1:{free_port()}")
        addresses += ("--openai-address", f"127.0.0.1:{free_port()}", "--metrics-address", "")
        with (self.home / "log").open("a") as log:
            process = subprocess.Popen(
                [PROGRAM, "serve", *addresses, *args],
                env={**self.env, **env},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.processes.append(process)
        return process

    def banner(self, process: subprocess.Popen[str]) -> str:
        """Read until all of it is printed."""
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "StreamGenerate" in line:
                return "".join(lines)
        pytest.fail(f"no banner; the log:\n{self.log()}")

    def log(self) -> str:
        return (self.home / "log").read_text()

    def generate(self, *args: str) -> str:
        command = [PROGRAM, "generate", "--address", self.address, "--max-tokens", "4", *args, "a question"]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    found = Terminal(tmp_path)
    yield found
    for process in found.processes:
        if process.poll() is None:
            process.terminate()
            process.wait(PATIENCE_S)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_printed_key_answers_also_after_a_crash_and_a_second_start(terminal: Terminal, model: Path) -> None:
    serving = terminal.serve("--model", str(model))
    banner = terminal.banner(serving)
    key = re.search(r"tr_\w+", banner)
    assert key is not None
    text = terminal.generate()
    children = {" ".join(child.cmdline()): child for child in psutil.Process(serving.pid).children()}
    worker = next(child for line, child in children.items() if line.endswith("-m worker"))
    worker.kill()
    assert terminal.generate() == text, "the job waits for the worker's successor"
    serving.send_signal(signal.SIGINT)
    assert serving.wait(PATIENCE_S) == 0
    until(lambda: not any(child.is_running() for child in children.values()))
    again = terminal.serve("--model", str(model))
    assert key.group() in terminal.banner(again), "the same key serves the same data"
    assert terminal.generate("--api-key", key.group()) == text


def test_a_model_that_cannot_be_loaded_ends_it(terminal: Terminal) -> None:
    serving = terminal.serve("--model", str(terminal.home / "nothing"))
    assert serving.wait(PATIENCE_S) == 1
    assert "worker-0 cannot start" in terminal.log()
    assert "worker.failed" in terminal.log()
    assert str(terminal.home / "nothing") in terminal.log()


@pytest.mark.parametrize(
    ("variable", "said"), [("XDG_DATA_HOME", "cannot keep the queue"), ("XDG_CONFIG_HOME", "cannot keep a key")]
)
def test_a_home_that_cannot_be_written_is_named(terminal: Terminal, model: Path, variable: str, said: str) -> None:
    serving = terminal.serve("--model", str(model), **{variable: "/dev/null"})
    assert serving.wait(PATIENCE_S) == 1
    assert said in terminal.log()
    assert "Traceback" not in terminal.log()
