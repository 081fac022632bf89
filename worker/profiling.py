"""`torchrelay worker --profile N`: a Chrome trace of N steps, and a table of where their time went.

The engine says which part of a step begins; all else happens here, on its thread, as torch's profiler wants it. On a
GPU the forward pass returns when its kernels are queued, and it is sampling that waits for them: there the trace tells,
not the table.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import structlog
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from worker.engine.decoder.program import CompiledDecoder, DecoderTimes
from worker.engine.types import Part

_log = structlog.get_logger(__name__)

_WARM_UP_STEPS: Final = 8  # the first ones allocate and, on a GPU, compile
_PARTS: Final[tuple[Part, ...]] = ("plan", "batch", "forward", "sample", "update")
_BETWEEN: Final = "between steps"  # until there is work again, and until earlier results are committed


class StepProfiler:
    """Watches an engine's steps by `on_part`, writes what it saw once, and then stands aside."""

    def __init__(
        self,
        num_steps: int,
        path: Path,
        device: torch.device,
        decoder: CompiledDecoder | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        write: Callable[[str], object] = sys.stderr.write,
    ) -> None:
        """Profile `num_steps` steps that computed something, after some more; write the trace to `path`.

        `decoder` tells what its forward passes consist of, `clock` seconds. The table goes to `write`.
        """
        self._num_steps = num_steps
        self._path = path
        self._decoder = decoder
        self._clock = clock
        self._write = write
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile = profile(activities=activities)
        self._seconds = dict.fromkeys((*_PARTS, _BETWEEN), 0.0)
        self._num_warm = 0  # steps before the profile, with a forward pass as all that are counted
        self._num_profiled = 0
        self._is_recording = False
        self._is_done = False
        self._part: Part | None = None  # None before the first step: the engine may run the model to measure it
        self._since = 0.0
        self._range: record_function | None = None

    def on_part(self, part: Part) -> None:
        """A part of a step begins."""
        if self._is_done or (self._part is None and part != "plan"):
            return
        if self._is_recording:
            self._close_part()
        if part == "forward":
            self._num_warm += not self._is_recording
            self._num_profiled += self._is_recording
        elif part == "plan" and not self._is_recording and self._num_warm >= _WARM_UP_STEPS:
            self._start()
        elif part == "end" and self._num_profiled == self._num_steps:
            self._finish()
            return
        self._part = part
        if self._is_recording:
            if part != "end":
                self._range = record_function(part)
                self._range.__enter__()  # type: ignore[no-untyped-call]
            self._since = self._clock()

    def _close_part(self) -> None:
        assert self._part is not None, "a recording begins with a part"
        self._seconds[_BETWEEN if self._part == "end" else self._part] += self._clock() - self._since
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _start(self) -> None:
        if self._decoder is not None:
            self._decoder.times = DecoderTimes()
        self._profile.start()
        self._is_recording = True

    def _finish(self) -> None:
        self._is_done = True
        inside: dict[str, float] = {}
        if self._decoder is not None and self._decoder.times is not None:
            times = self._decoder.times
            self._decoder.times = None
            inside = {field[0]: getattr(times, field[0]) for field in DecoderTimes._fields_}
        self._write(table(self._seconds, inside, self._num_profiled))
        self._profile.stop()
        if self._export():
            _log.info("profile.written", path=str(self._path.absolute()), steps=self._num_profiled)
        else:  # a worker does not end for want of its trace
            _log.error("profile.not_written", path=str(self._path.absolute()))

    def _export(self) -> bool:
        """Whether the file was written: torch only prints that it was not."""
        try:
            self._path.unlink(missing_ok=True)
            self._profile.export_chrome_trace(str(self._path))
            return self._path.stat().st_size > 0
        except (OSError, RuntimeError):
            return False


def table(seconds: Mapping[str, float], inside_forward: Mapping[str, float], num_steps: int) -> str:
    """Return lines of milliseconds per step and share of the whole, for each part in turn.

    `inside_forward` are seconds within the part "forward"; what is left of it stands there as "rest".
    """
    whole = sum(seconds.values())
    rows: list[tuple[str, float]] = []
    for part, spent in seconds.items():
        rows.append((part, spent))
        if part == "forward" and inside_forward:
            rows += [(f"  {name}", value) for name, value in inside_forward.items()]
            rows.append(("  rest", spent - sum(inside_forward.values())))
    lines = [f"{'part':<16}{'ms/step':>10}{'share':>8}"]
    for name, spent in (*rows, ("all", whole)):
        lines.append(f"{name:<16}{spent / num_steps * 1000:>10.3f}{spent / whole if whole else 0.0:>8.1%}")
    return f"profile of {num_steps} steps\n" + "\n".join(lines) + "\n"
