"""`top`, `queue` and `drain`, against a server on a socket, and in a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator

import grpc
import pytest

from tests.unit.torchrelay.cli.conftest import Command
from tests.unit.torchrelay.cli.test_fleet_view import NOW_MS, make_snapshot, make_worker
from tests.unit.torchrelay.toy import KEY, Failure
from torchrelay.admin.v1beta1 import fleet_pb2 as pb
from torchrelay.cli import fleet_stream

GONE = Failure(grpc.StatusCode.UNAVAILABLE)
STOPPING = Failure(grpc.StatusCode.UNAVAILABLE, "GATEWAY_STOPPING", "this gateway is stopping")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_stream, "_PAUSE_S", 0.0)


def later(tokens: int, *, by_ms: int = 2000) -> pb.FleetSnapshot:
    """A snapshot with the next report of the same worker."""
    return make_snapshot(make_worker(tokens=tokens, age_ms=400 - by_ms), at_ms=NOW_MS + by_ms)


def test_top_prints_one_picture_with_rates_into_a_pipe(run: Command) -> None:
    for arguments in ((), ("--once",)):
        run.toy.snapshots = [make_snapshot(make_worker(tokens=100)), later(700)]
        shown = run("top", *arguments).stdout
        assert "300 tok/s" in shown.splitlines()[0]
        assert "abcdefgh" in shown
        assert "\x1b" not in shown
    request = run.toy.requests[-1]
    assert (request.interval.ToMilliseconds(), request.include_generations, request.page_size) == (500, True, 100)


def test_top_goes_on_with_one_line_of_json_for_each_snapshot(run: Command) -> None:
    run.toy.snapshots = [make_snapshot(), GONE, later(10), STOPPING, later(20, by_ms=4000), Failure(
        grpc.StatusCode.PERMISSION_DENIED, "METHOD_NOT_ALLOWED", "this key may not call this method"
    )]  # fmt: skip
    result = run("top", "--json", "--model", "tiny", "--interval", "2", status=1)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [one["workers"][0].get("generated_tokens") for one in found] == [None, "10", "20"]
    notes = result.stderr.splitlines()
    assert notes[:2] == [
        "the gateway does not answer; trying again",
        "this gateway is stopping; trying again",
    ]
    assert "this key may not do that" in notes[2]
    assert (run.toy.requests[-1].model, run.toy.requests[-1].interval.seconds) == ("tiny", 2)


def test_top_prints_one_line_of_json_and_ends(run: Command) -> None:
    run.toy.snapshots = [make_snapshot()]
    (found,) = run.objects("top", "--once", "--json")
    assert found["models"][0]["num_dead_letters"] == 5


def test_a_gateway_that_was_never_there_is_an_error_at_once(run: Command) -> None:
    run.toy.failures = [GONE]
    assert "nothing answers at" in run("top", "--once", status=1).stderr
    assert "--interval" in run("top", "--interval", "0.1", status=2).stderr


def test_the_admin_key_goes_with_streams_too(run: Command) -> None:
    run.toy.snapshots = [make_snapshot()]
    run("queue", "--admin-key", KEY)
    assert run.toy.keys[-1] == f"Bearer {KEY}"


def test_the_queue_is_a_table_or_a_line_of_json_for_each_model(run: Command) -> None:
    run.toy.snapshots = [make_snapshot()]
    rows = [line.split() for line in run("queue").stdout.splitlines()]
    assert rows[0][:4] == ["MODEL", "PRIORITY", "TENANT", "WAITING"]
    assert rows[2][1:6] == ["normal", "acme", "41", "1", "min"]
    (model,) = run.objects("queue", "--json", "--model", "smollm2-135m-instruct")
    assert [one.get("num_waiting", 0) for one in model["classes"]] == [0, 41, 7]
    assert run.toy.requests[-1].model == "smollm2-135m-instruct"


# -- drain


@pytest.fixture
def workers(run: Command) -> list[pb.Worker]:
    run.toy.workers = [make_worker(name) for name in ("aaaaaaaa", "aaaaaabb", "cccccccc")]
    return run.toy.workers


def test_a_worker_is_named_by_its_id_or_a_beginning_that_is_its_own(run: Command, workers: list[pb.Worker]) -> None:
    for given in (workers[2].worker_id, "cccccc", "aaaaaabb"):
        (line,) = run("drain", given).stdout.splitlines()
        assert line.split()[0].startswith(given)
        assert line.endswith(" asked")
    for given, fault in (("ccc", "at least 6"), ("aaaaaa", "2 workers' ids begin"), ("dddddd", "no live worker")):
        assert fault in re.sub(r"[\s│]+", " ", run("drain", given, status=2).stderr)
    for wrong in ((), ("cccccc", "--model", "tiny")):
        assert "--model" in run("drain", *wrong, status=2).stderr


def test_drain_waits_until_all_have_left(run: Command, workers: list[pb.Worker]) -> None:
    left = [make_snapshot(*workers[index:]) for index in range(3)]
    run.toy.snapshots = [left[0], left[1], GONE, left[1], left[2], make_snapshot(make_worker("new"))]
    found = run.objects("drain", "--model", workers[0].model, "--wait", "--json")
    asked, gone = (
        [worker.worker_id for worker in workers],
        [one["worker_id"] for one in found if one["state"] == "gone"],
    )
    assert [one["worker_id"] for one in found if one["state"] == "asked"] == asked
    assert gone == asked


def test_a_worker_that_is_not_there_any_more_is_named(run: Command) -> None:
    run.toy.failures = [Failure(grpc.StatusCode.NOT_FOUND, "WORKER_NOT_FOUND", "no such worker is alive")]
    assert "`torchrelay ps --workers` shows" in run("drain", "a" * 26, status=1).stderr
    run.toy.workers = []
    assert "no worker is alive" in run("drain", "--model", "tiny", "--wait").stderr


# -- in a terminal


class Terminal:
    """`torchrelay top` with a terminal of its own, 80 by 24."""

    def __init__(self, address: str) -> None:
        self.output = b""
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from torchrelay.cli.main import main; main()", "top"],
            env={**os.environ, "TORCHRELAY_ADMIN_ADDRESS": address, "COLUMNS": "80", "LINES": "24", "TERM": "xterm"},
            preexec_fn=lambda: os.login_tty(slave),  # its controlling terminal: Ctrl-C becomes a signal
        )
        os.close(slave)

    def read_until(self, text: str, timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while text not in self.output.decode(errors="replace"):
            assert time.monotonic() < end, self.output.decode(errors="replace")
            if select.select([self._master], [], [], 0.1)[0]:
                self.output += os.read(self._master, 1 << 16)

    def press(self, keys: str) -> int:
        """Press keys; return the status that the command ends with."""
        os.write(self._master, keys.encode())
        end = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < end, "it does not end"
            with contextlib.suppress(OSError):  # nobody has the terminal open any more
                if select.select([self._master], [], [], 0.1)[0]:
                    self.output += os.read(self._master, 1 << 16)
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(run: Command) -> Iterator[Terminal]:
    run.toy.snapshots = [make_snapshot()]
    terminal = Terminal(run.toy.address)
    yield terminal
    terminal.close()


@pytest.mark.parametrize("keys", ["xq", "\x03"], ids=["q", "Ctrl-C"])
def test_top_draws_until_somebody_has_seen_enough(run: Command, terminal: Terminal, keys: str) -> None:
    terminal.read_until("smollm2")
    run.toy.snapshots[:] = [GONE, GONE, make_snapshot(make_worker("zzzzzzzzzz"))]
    terminal.read_until("the gateway does not answer; trying again")
    terminal.read_until("zzzzzzzz")
    assert terminal.press(keys) == 0
    assert "Traceback" not in terminal.output.decode()
