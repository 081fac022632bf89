"""`make bench-slow-clients`: what clients that read slowly cost the others, and the gateway.

Real processes on this machine: a server for the queue (synced before each answer), one gateway, one worker with a tiny
model, and 256 streams in a process of their own. Phases take turns: all read as fast as they can; then every eighth
reads one message a second, over a connection whose window is small, so that the gateway has to wait for it. The time
between two messages is taken of the other seven eighths alone, in both kinds of phase.

Prints a table and, as its last line, one JSON object. Exits with 1 if a law is broken: slow readers make the others'
99th percentile worse by 20 % or more (the median over the slow phases, each against the phases around it), the
gateway's resident memory grows, a stream misses or repeats a token, or a call fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psutil

from tests.benchmarks.budgets import snapshot
from tests.builders_models import write_tiny_model
from tests.builders_system import System

_MAX_RATIO: Final = 1.20
_MAX_GROWTH: Final = 0.05  # of the gateway's memory, from the first quarter of the time to the last
_MAX_GROWTH_MIB: Final = 4.0  # what the allocator may round up to
_RSS_EVERY_S: Final = 2.0
_MIB: Final = 1 << 20


class Load:
    """The process with the callers. Use as a context manager."""

    def __init__(self, system: System, num_streams: int, slow_every: int) -> None:
        self._command = [sys.executable, "-m", "tests.benchmarks.slow_load"]
        self._command += ["--streams", str(num_streams), "--slow-every", str(slow_every)]
        self._env = {
            **os.environ,
            "TORCHRELAY_ADDRESS": system.gateways[0].address,
            "TORCHRELAY_API_KEY": system.key,
            "TORCHRELAY_MODEL": "tiny",
        }

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, env=self._env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def tell(self, command: str) -> dict[str, Any]:
        """Send a command and return the answer. Raises RuntimeError if the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process with the callers has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def sampled_rss(pid: int) -> Iterator[list[tuple[float, float]]]:
    """Note a process's resident memory every few seconds: (seconds since the start, MiB)."""
    samples: list[tuple[float, float]] = []
    stop = threading.Event()
    process, began = psutil.Process(pid), time.monotonic()

    def sample() -> None:
        while not stop.wait(_RSS_EVERY_S):
            samples.append((time.monotonic() - began, process.memory_info().rss / _MIB))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def run_phases(load: Load, num_rounds: int, phase_s: float, settle_s: float) -> list[dict[str, Any]]:
    """Alternate fast and slow phases, fast first and last; return what was seen in each."""
    phases = []
    for number in range(2 * num_rounds + 1):
        kind = "slow" if number % 2 else "fast"
        load.tell(kind)
        time.sleep(settle_s)
        load.tell(kind)  # what was seen until here is of both
        time.sleep(phase_s - settle_s)
        phases.append({"kind": kind, **load.tell("end")})
        sys.stderr.write(f"{number + 1}/{2 * num_rounds + 1} {phases[-1]}\n")
    return phases


def growth_mib(samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the median memory in the first quarter of the time, and how much more it is in the last."""
    quarter = max(1, len(samples) // 4)
    first = statistics.median(mib for _, mib in samples[:quarter])
    return first, statistics.median(mib for _, mib in samples[-quarter:]) - first


def verdict(phases: Sequence[dict[str, Any]], samples: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Hold what was seen to the laws; phases alternate, fast first and last."""
    ratios = [
        phases[i]["p99_ms"] / statistics.mean((phases[i - 1]["p99_ms"], phases[i + 1]["p99_ms"]))
        for i in range(1, len(phases), 2)
    ]
    first_mib, more_mib = growth_mib(samples)
    ratio = statistics.median(ratios)
    violations = sum(phase["violations"] for phase in phases)
    failed_calls = sum(sum(phase["errors"].values()) for phase in phases)
    slow = [phase for phase in phases if phase["kind"] == "slow"]
    laws = {
        "itl_met": ratio < _MAX_RATIO,
        "rss_met": more_mib <= max(_MAX_GROWTH * first_mib, _MAX_GROWTH_MIB),
        "order_met": violations == 0 and failed_calls == 0,
        # Else the phase was not slow, and the figures say nothing.
        "slow_met": all(phase["slow_messages"] > 0 and phase["slow_tokens"] > phase["slow_messages"] for phase in slow),
    }
    return {
        "fast_p99_ms": round(statistics.median(p["p99_ms"] for p in phases if p["kind"] == "fast"), 1),
        "slow_p99_ms": round(statistics.median(p["p99_ms"] for p in slow), 1),
        "p99_ratio": round(ratio, 3),
        "p99_ratios": [round(value, 3) for value in ratios],
        "rss_mib": round(first_mib, 1),
        "rss_growth_mib": round(more_mib, 2),
        "violations": violations,
        "failed_calls": failed_calls,
        **laws,
        "met": all(laws.values()),
    }


def table(phases: Sequence[dict[str, Any]], phase_s: float, num_slow: int) -> str:
    lines = ["| phase | ITL p50 ms | ITL p99 ms | tokens | slow streams: messages a second, tokens a message |"]
    lines.append("|---|---|---|---|---|")
    for phase in phases:
        per_s = phase["slow_messages"] / phase_s / num_slow
        per_message = phase["slow_tokens"] / max(1, phase["slow_messages"])
        lines.append(
            f"| {phase['kind']} | {phase['p50_ms']:.1f} | {phase['p99_ms']:.1f} | {phase['tokens']} "
            f"| {per_s:.2f}, {per_message:.1f} |"
        )
    return "\n".join(lines) + "\n"


def measure(args: argparse.Namespace, folder: Path) -> int:
    tiny = write_tiny_model(folder / "tiny", "llama", max_position_embeddings=2048, eos_token_id=None)
    with System(folder / "system") as system:
        system.add_gateway()
        system.add_worker(
            tiny,
            TORCHRELAY_ENGINE_NUM_BLOCKS="40000",
            TORCHRELAY_ENGINE_MAX_NUM_SEQS=str(args.streams),
            TORCHRELAY_ENGINE_TOKEN_BUDGET=str(max(512, 2 * args.streams)),
        )
        asyncio.run(system.ready("tiny"))
        gateway = system.gateways[0].process
        assert gateway is not None
        with Load(system, args.streams, args.slow_every) as load:
            load.tell("fast")
            time.sleep(args.warm_up_s)
            before = snapshot(system)
            with sampled_rss(gateway.pid) as samples:
                phases = run_phases(load, args.rounds, args.phase_s, args.settle_s)
            after = snapshot(system)
    found = verdict(phases, samples)
    sys.stdout.write(table(phases, args.phase_s - args.settle_s, -(-args.streams // args.slow_every)))
    report = {
        **found,
        "streams": args.streams,
        "slow_every": args.slow_every,
        "phase_s": args.phase_s,
        "gateway_cpu_s": round(after.gateway_cpu_s - before.gateway_cpu_s, 1),
        "worker_cpu_s": round(after.worker_cpu_s - before.worker_cpu_s, 1),
        "seconds": round(samples[-1][0], 1),
        "phases": phases,
        "rss_samples_mib": [round(mib, 1) for _, mib in samples],
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if found["met"] else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--slow-every", type=int, default=8, help="one stream of so many reads slowly in slow phases")
    parser.add_argument("--rounds", type=int, default=5, help="slow phases; there is one more fast one")
    parser.add_argument("--phase-s", type=float, default=30)
    parser.add_argument("--settle-s", type=float, default=5, help="begin of each phase that does not count")
    parser.add_argument("--warm-up-s", type=float, default=20)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="torchrelay-slow-clients-"))
    try:
        return measure(args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
