"""`make soak`: an hour of steady load with a fault a minute; what every process and the server take, and its growth.

Faults end most processes every few minutes. So what shows is growth of the server's data, of those processes that live
longer, and of whatever outlives a process. Draws a plot where matplotlib is installed. The last line is one JSON
object; exits with 1 where a law was broken or something grew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from tests.chaos.run import Plan, figures, run, table
from tests.chaos.system import ChaosSystem, Size

_SAMPLE_S: Final = 5.0
_RETENTION_MS: Final = 60_000
_MAX_GROWTH: Final = 1.1  # of the last third over the middle one
_MIB: Final = 1 << 20


@dataclass(slots=True)
class Curves:
    """Samples over time: seconds since the start, and a figure of each series, None where there was none."""

    times: list[float] = field(default_factory=list)
    series: dict[str, list[float | None]] = field(default_factory=dict)

    def add(self, at: float, figures: Mapping[str, float]) -> None:
        """Add one sample of all series."""
        for name in figures:
            self.series.setdefault(name, [None] * len(self.times))
        self.times.append(at)
        for name, values in self.series.items():
            values.append(figures.get(name))

    def thirds(self, name: str) -> tuple[float, float, float]:
        """Return the median of each third of a series."""
        values = self.series[name]
        size = -(-len(values) // 3)
        parts = [[v for v in values[at : at + size] if v is not None] for at in range(0, len(values), size)]
        parts += [[]] * (3 - len(parts))
        first, middle, last = (statistics.median(part) if part else 0.0 for part in parts)
        return first, middle, last


async def sample(system: ChaosSystem, curves: Curves) -> None:
    """Sample until cancelled."""
    began = time.monotonic()
    while True:
        found: dict[str, float] = {}
        pids = {party.name: party.pid for party in system.parties if party.is_running}
        pids["server"] = system.server.pid
        for name, pid in pids.items():
            if pid is not None:
                with contextlib.suppress(psutil.Error):
                    memory = psutil.Process(pid).memory_full_info()
                    # What is its own: the rest it shares with the process that it was forked off.
                    found[f"{name} MiB"] = (memory.rss if name == "server" else memory.uss) / _MIB
        with contextlib.suppress(Exception):  # a fault has its way with the server: no sample of it
            async with asyncio.timeout(1):
                info = await system.superuser.info("memory")
                found["data MiB"] = info["used_memory"] / _MIB
                found["keys"] = await system.superuser.dbsize()
        curves.add(time.monotonic() - began, found)
        await asyncio.sleep(_SAMPLE_S)


def growths(curves: Curves) -> dict[str, float]:
    """Return how the last third of each series compares with the middle one; the first holds the start."""
    found = {}
    for name in curves.series:
        _, middle, last = curves.thirds(name)
        found[name] = round(last / middle, 3) if middle else 1.0
    return found


def draw(curves: Curves, path: Path) -> bool:
    """Draw all series; return False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {
        "own memory of workers and gateways, MiB": [n for n in curves.series if n.startswith(("worker", "gateway"))],
        "memory of the server, MiB": ["server MiB", "data MiB"],
        "keys in the server": ["keys"],
    }
    figure, all_axes = pyplot.subplots(len(groups), 1, figsize=(9, 8), sharex=True)
    minutes = [at / 60 for at in curves.times]
    for axes, (title, names) in zip(all_axes, groups.items(), strict=True):
        for name in names:
            values: list[Any] = curves.series.get(name, [])
            axes.plot(
                minutes, [float("nan") if v is None else v for v in values], lw=0.9, label=name.removesuffix(" MiB")
            )
        axes.set(title=title, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=3, loc="lower right")
    all_axes[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    return True


def main(arguments: Sequence[str]) -> int:
    """Run, draw, judge, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--duration", type=float, default=3600.0)
    parser.add_argument("--interval", type=float, default=60.0)
    parser.add_argument("--callers", type=int, default=12)
    parser.add_argument("--plot", default="build/soak.png")
    given = parser.parse_args(arguments)
    plan = Plan(
        seed=given.seed,
        duration_s=given.duration,
        interval_s=given.interval,
        num_callers=given.callers,
        size=Size(gateways=2, workers=2),
        env={"TORCHRELAY_QUEUE_RETENTION_MS": str(_RETENTION_MS)},
    )
    folder = Path(tempfile.mkdtemp(prefix="torchrelay-soak-"))
    Path("build").mkdir(exist_ok=True)
    curves = Curves()
    result = asyncio.run(
        run(plan, folder, Path("build") / f"chaos-truth-{plan.num_prompts}.json", lambda system: sample(system, curves))
    )
    found = growths(curves)
    grown = [name for name, growth in found.items() if growth > _MAX_GROWTH]
    sys.stdout.write(
        f"{table(result)}\n\n| series | first third | middle | last | last : middle |\n|---|---|---|---|---|\n"
    )
    for name, growth in found.items():
        first, middle, last = curves.thirds(name)
        sys.stdout.write(f"| {name} | {first:.1f} | {middle:.1f} | {last:.1f} | {growth:.3f} |\n")
    sys.stdout.write(f"{result.report}\n")
    if draw(curves, Path(given.plot)):
        sys.stdout.write(f"drawn: {given.plot}\n")
    if result.report.num_violations:
        result.history.write(folder / "history.jsonl")
        sys.stdout.write(f"history and logs: {folder}\n")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    line = {**figures(plan, result), "target": "soak", "growth": found, "grown": grown}
    sys.stdout.write(json.dumps(line) + "\n")
    return 1 if result.report.num_violations or grown else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
