"""What processes cost: CPU seconds, peak memory, and the share of the machine that was not theirs. Linux only."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

_TICKS = os.sysconf("SC_CLK_TCK")


def descendants(pid: int | None = None) -> list[int]:
    """Return the ids of all living descendants of a process, by default of this one."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid or os.getpid()}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    except OSError:  # it has ended meanwhile
        pass
    return found


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process and its ended children have used; 0 when it is gone."""
    return sum(_stat(f"/proc/{pid}/stat")[11:15]) / _TICKS


def main_thread_cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process's first thread alone; 0 when it is gone."""
    return sum(_stat(f"/proc/{pid}/task/{pid}/stat")[11:13]) / _TICKS


def seconds_since_start() -> float:
    """Return how long this process has existed, interpreter start included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - _stat("/proc/self/stat")[19] / _TICKS


def _stat(path: str) -> list[int]:
    """The numbers behind the command's name and state; zeros when the process is gone."""
    try:
        text = Path(path).read_text()
    except OSError:
        return [0] * 49
    return [0, *map(int, text.rsplit(")", 1)[1].split()[1:])]  # the state is a letter


def peak_memory_mb(pids: Iterable[int]) -> int:
    """Return the sum of the processes' peak resident memory (VmHWM), MiB."""
    total_kib = 0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        total_kib += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return round(total_kib / 1024)


class OthersShare:
    """Measures which share of the machine's CPU others used inside a `with`, time stolen by the host included.

    0 means that the machine was ours. `own` names the processes that are not others.
    """

    def __init__(self, own: Callable[[], Iterable[int]]) -> None:
        self._own = own
        self.share = 0.0

    def __enter__(self) -> OthersShare:
        self._before = self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        others_s, now = (after - before for after, before in zip(self._read(), self._before, strict=True))
        self.share = max(0.0, others_s / (now * (os.cpu_count() or 1))) if now else 0.0

    def _read(self) -> tuple[float, float]:
        first_line = Path("/proc/stat").read_text().split("\n", 1)[0]
        user, nice, system, idle, io_wait, irq, soft_irq, steal = map(int, first_line.split()[1:9])
        del idle, io_wait
        busy_s = (user + nice + system + irq + soft_irq + steal) / _TICKS
        return busy_s - sum(cpu_s(pid) for pid in self._own()), time.perf_counter()
