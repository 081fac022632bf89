"""Lets contestants take turns on one machine, so that whatever drifts meets all of them.

Every contestant is a process that loads its model once and is stopped (SIGSTOP) while it is not its turn: it neither
spins nor is swapped for a fresh one, and engines that compile for a minute at start can still be measured beside ones
that do not. In each round every contestant runs the next variant of a workload before any of them runs it again.
Rounds go on until each has enough runs that nothing disturbed, or has used up its spare ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from common.children import die_with_parent
from tests.benchmarks.report import Run, is_quiet
from tests.benchmarks.workload import NUM_VARIANTS

_STOP_S: Final = 20.0
_LOG_TAIL: Final = 1500
_NEW_TEXTS: Final = 10_000  # as their first token: text that no other turn has


class ContestantFailed(Exception):
    """A contestant ended or did not answer in time; the message has the end of its log."""


class Cut(Exception):
    """The measurement is to end now. What was measured until then still counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Who takes part, and in how much: slow engines may run fewer rounds and fewer requests of a workload."""

    name: str  # of the engine
    precision: str  # bf16, fp32, int8: figures are compared within one
    module: str  # such as tests.benchmarks.contestants.engine
    model: str
    python: str = sys.executable
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    rounds: Mapping[str, int] = field(default_factory=dict)  # by workload, where not the measurement's own number
    num_requests: Mapping[str, int] = field(default_factory=dict)  # by workload, where not all
    is_ours: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} {self.precision}"


class Seat:
    """One contestant's process."""

    def __init__(self, entry: Entry, workload: Path, threads: int, log_path: Path) -> None:
        """Start it; `hear` returns its first line when it has loaded."""
        self.entry = entry
        self._log_path = log_path
        command = [entry.python, "-m", entry.module, "--model", entry.model]
        command += ["--workload", str(workload), "--threads", str(threads), *entry.arguments]
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **entry.env},
                start_new_session=True,  # a group of its own, to stop and continue it with its children
                preexec_fn=die_with_parent(),
            )
        self._buffer = b""

    def ask(self, order: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Give an order and wait for the answer. Raises ContestantFailed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise ContestantFailed(self._why(self._end())) from error
        return self.hear(timeout_s)

    def hear(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the next line. Raises ContestantFailed."""
        assert self._process.stdout is not None
        end = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise ContestantFailed(self._why(f"did not answer within {timeout_s:.0f} s"))
                piece = os.read(self._process.stdout.fileno(), 1 << 20)
                if not piece:
                    raise ContestantFailed(self._why(self._end()))
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _why(self, what: str) -> str:
        log = self._log_path.read_text(errors="replace")[-_LOG_TAIL:]
        return f"{self.entry.label} {what}; its log ends:\n{log}"

    def _end(self) -> str:
        # Its pipes close some moments before it can be waited for.
        try:
            return f"has ended (exit status {self._process.wait(_STOP_S)})"
        except subprocess.TimeoutExpired:
            return "has closed its output"

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it, politely first: some have children of their own."""
        self.go_on()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        self._signal(signal.SIGKILL)  # children that outlived it too
        self._process.wait()
        self._process.stdout.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


@dataclass(slots=True)
class Results:
    """What came of it, by the label of the entry."""

    starts: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, list[Run]]] = field(default_factory=dict)  # by workload
    token_ids: dict[str, list[list[int]]] = field(default_factory=dict)  # of the first requests of W1
    peak_memory_mb: dict[str, int] = field(default_factory=dict)
    first_tokens_ms: dict[str, list[float]] = field(default_factory=dict)  # call by call
    sweeps: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)  # figures by requests at a time
    failures: dict[str, str] = field(default_factory=dict)  # why an entry is missing or incomplete


class Measurement:
    """Holds the seats; use as a context manager, which ends them."""

    def __init__(
        self,
        workload: Path,
        folder: Path,
        *,
        threads: int,
        rounds: int = 3,
        spare: int = 2,
        start_timeout_s: float = 400.0,
        run_timeout_s: float = 400.0,
        lock: Path | None = None,
    ) -> None:
        """`rounds` are the undisturbed runs that are wanted, `spare` how many more may be made to get them.

        `folder` takes the logs. `lock` is a file to hold (flock) while one computes, where a machine is shared.
        """
        self.results = Results()
        self._seats: dict[str, Seat] = {}
        self._workload, self._folder, self._threads = workload, folder, threads
        self._rounds, self._spare = rounds, spare
        self._start_timeout_s, self._run_timeout_s = start_timeout_s, run_timeout_s
        self._lock = lock

    def __enter__(self) -> Measurement:
        return self

    def __exit__(self, *_: object) -> None:
        for seat in self._seats.values():
            seat.close()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock, if there is one."""
        if self._lock is None:
            yield
            return
        with self._lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def until_cut(self) -> Iterator[None]:
        """End what is inside at Ctrl-C or SIGTERM, and go on to the report of what there is by then."""
        before = signal.signal(signal.SIGTERM, _cut)
        try:
            yield
        except (Cut, KeyboardInterrupt):
            self.results.failures["all"] = "cut short: figures rest on fewer runs, or are missing"
            note("cut short")
        finally:
            signal.signal(signal.SIGTERM, before)

    def start(self, entry: Entry) -> None:
        """Load a contestant; one that cannot is noted as failed."""
        note(f"{entry.label}: loading")
        with self.alone():
            seat = self._seat(entry)
            self._seats[entry.label] = seat
            try:
                self.results.starts[entry.label] = start = seat.hear(self._start_timeout_s)
            except ContestantFailed as error:
                self._give_up(seat, error)
                return
            finally:
                seat.pause()
        self.results.peak_memory_mb[entry.label] = start["peak_memory_mb"]
        note(f"{entry.label}: ready after {start['ready_s']:.1f} s, first token after {start['first_token_s']:.1f} s")

    def start_anew(self) -> None:
        """End all that take part and load them again: where their memory comes to lie differs from start to start."""
        for seat in list(self._seats.values()):
            del self._seats[seat.entry.label]
            seat.close()
            self.start(seat.entry)

    def once(self, entry: Entry, order: Mapping[str, Any]) -> dict[str, Any]:
        """Start a contestant for one order, and end it. Raises ContestantFailed."""
        with self.alone():
            seat = self._seat(entry)
            try:
                seat.hear(self._start_timeout_s)
                return seat.ask(order, self._run_timeout_s)
            finally:
                seat.close()

    def _seat(self, entry: Entry) -> Seat:
        return Seat(entry, self._workload, self._threads, self._folder / f"{entry.label.replace(' ', '-')}.log")

    def run(self, names: Sequence[str]) -> None:
        """Run workloads in turns, one round of all of them after the other."""
        for variant in range(NUM_VARIANTS):
            for name in names:
                for seat in list(self._seats.values()):
                    if self._needs_more(seat.entry, name):
                        self._take_turn(seat, name, variant)

    def _needs_more(self, entry: Entry, name: str) -> bool:
        runs = self.results.runs.get(entry.label, {}).get(name, [])
        wanted = entry.rounds.get(name, self._rounds)
        return wanted > 0 and sum(map(is_quiet, runs)) < wanted and len(runs) < wanted + self._spare

    def _take_turn(self, seat: Seat, name: str, variant: int, **more: int) -> None:
        label = seat.entry.label
        order = {"workload": name, "variant": variant % NUM_VARIANTS, **more}
        answer = self._ask(seat, {**order, "num_requests": seat.entry.num_requests.get(name)})
        if answer is None:
            return
        run = Run(variant, answer["figures"], answer["others_cpu"], answer["cpu_us_per_token"])
        self.results.runs.setdefault(label, {}).setdefault(name, []).append(run)
        self.results.peak_memory_mb[label] = answer["peak_memory_mb"]
        if answer["token_ids"] and variant == 0:
            self.results.token_ids[label] = answer["token_ids"]
        shown = ", ".join(f"{key} {value:.1f}" for key, value in run.figures.items())
        note(f"{label}: {name} {variant}: {shown} (others {run.others_cpu:.1%})")

    def alternate(self, name: str, count: int) -> None:
        """Run a workload so many times in turns, back and forth, each time on text that none has seen.

        For differences that are small beside what a single run varies by. Runs are numbered from 0 as variants.
        """
        for number, seat in self._back_and_forth(count):
            self._take_turn(seat, name, number, first_token_id=number + 1)

    def first_tokens(self, count: int) -> None:
        """Measure the time to the first token of W2's requests as `alternate` does, but call by call.

        What a machine does to calls that stand a third of a second apart is much the same.
        """
        for number, seat in self._back_and_forth(count):
            answer = self._ask(seat, {"first_token": number % NUM_VARIANTS, "first_token_id": _NEW_TEXTS + number})
            if answer is not None:
                self.results.first_tokens_ms.setdefault(seat.entry.label, []).append(answer["first_token_ms"])

    def _back_and_forth(self, count: int) -> Iterator[tuple[int, Seat]]:
        for number in range(count):
            seats = list(self._seats.values())
            for seat in seats if number % 2 == 0 else reversed(seats):
                yield number, seat

    def sweep(self, widths: Sequence[int]) -> None:
        """Run part of W1 with so many requests at a time, twice as many in all and at least eight."""
        for width in widths:
            for seat in list(self._seats.values()):
                order = {"workload": "W1", "variant": 0, "max_running": width, "num_requests": max(8, 2 * width)}
                # The text has been run before: another first token keeps what the prefix cache has of it from helping.
                answer = self._ask(seat, {**order, "first_token_id": width})
                if answer is not None:
                    self.results.sweeps.setdefault(seat.entry.label, {})[width] = answer["figures"]
                    note(f"{seat.entry.label}: {width} at a time: {answer['figures']['out_tok_s']:.1f} tok/s")

    def _ask(self, seat: Seat, order: Mapping[str, Any]) -> dict[str, Any] | None:
        """None when it failed; it then takes no further part."""
        with self.alone():
            seat.go_on()
            try:
                return seat.ask(order, self._run_timeout_s)
            except ContestantFailed as error:
                self._give_up(seat, error)
                return None
            finally:
                seat.pause()

    def _give_up(self, seat: Seat, error: ContestantFailed) -> None:
        note(str(error))
        self.results.failures[seat.entry.label] = str(error)
        del self._seats[seat.entry.label]
        seat.close()


def _cut(number: int, frame: object) -> None:
    raise Cut


def note(text: str) -> None:
    """Say how it goes, beside the report on standard output."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
