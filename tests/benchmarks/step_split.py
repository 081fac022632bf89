"""Where the time of a step goes: the engine's own parts, and inside the model the operations that torch runs.

The model decodes 1, 8 and 32 requests of W1, or prefills a chunk, as a worker would; each step is timed in its parts:

    plan       the scheduler chooses                      forward    the model, but for what is told apart:
    batch      numpy fills the tensors                               attention, and of the compiled decoder
    sample     logits to tokens                                      norms, linears, rotary and head
    update     tokens to deltas: stops, text, blocks

    python -m tests.benchmarks.step_split --model DIR --workload FILE      prints one JSON object
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from tests.benchmarks import report
from tests.benchmarks.contestants.base import Output
from tests.benchmarks.contestants.engine import InProcessEngine, add_arguments
from tests.benchmarks.stopwatch import Stopwatch, watch_engine
from tests.benchmarks.workload import Request, Workload
from worker.engine.device import num_compute_threads

DECODER_PARTS: Final = ("norms", "linears", "rotary", "attention", "head")
PARTS: Final = ("plan", "batch", *DECODER_PARTS, "forward", "sample", "update")
_BATCHES: Final = (1, 8, 32)
_WARM_UP, _STEPS, _PROFILED = 5, 40, 10
_NUM_OPERATIONS: Final = 6  # shown by name


def time_steps(
    contestant: InProcessEngine, watch: Stopwatch, running: dict[str, Output], count: int
) -> dict[str, float]:
    """Run steps; return the medians of the whole and of its parts, milliseconds."""
    from worker.engine.decoder.program import DecoderTimes  # imports torch

    totals, parts = [], []
    decoder = contestant.engine._runner._decoder
    for _ in range(count):
        watch.reset()
        if decoder is not None:
            decoder.times = DecoderTimes()
        started = time.perf_counter()
        contestant.step(running)
        totals.append((time.perf_counter() - started) * 1000)
        spent = watch.reset()
        if decoder is not None and decoder.times is not None:
            for part in DECODER_PARTS:
                inside = getattr(decoder.times, part) * 1000
                spent[part] += inside
                spent["forward"] -= inside
            decoder.times = None
        parts.append(spent)
    medians = {part: statistics.median(spent[part] for spent in parts) for part in PARTS}
    return {"step": statistics.median(totals), **medians}


def profile_steps(contestant: InProcessEngine, running: dict[str, Output], count: int) -> dict[str, float]:
    """Run steps under torch's profiler; return the largest operations' own time, milliseconds a step."""
    from torch.profiler import ProfilerActivity, profile  # torch is not imported before the engine's own settings

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(count):
            contestant.step(running)
    own = Counter({event.key: event.self_cpu_time_total / 1000 / count for event in profiler.key_averages()})
    return dict(own.most_common(_NUM_OPERATIONS))


def split(contestant: InProcessEngine, workload: Workload) -> dict[str, Any]:
    """Return by kind of step the medians of its parts and its largest operations, milliseconds."""
    watch, rows = watch_engine(contestant.engine, PARTS), {}
    prompts = [request.prompt for request in workload.runs["W1"][0]]
    for width in _BATCHES:
        length = _WARM_UP + _STEPS + _PROFILED + 4
        running = {contestant.add(Request(prompt, length)): Output() for prompt in prompts[:width]}
        while not all(output.token_ids for output in running.values()):
            contestant.step(running)
        time_steps(contestant, watch, running, _WARM_UP)
        row: dict[str, Any] = time_steps(contestant, watch, running, _STEPS)
        row["operations"] = profile_steps(contestant, running, _PROFILED)
        rows[f"decode {width}"] = row
        finish(contestant, running)
    for variant in workload.runs["W3"][:2]:  # the first warms up
        running = {contestant.add(variant[0]): Output()}
        rows["prefill chunk"] = time_steps(contestant, watch, running, 1)
        finish(contestant, running)
    return rows


def finish(contestant: InProcessEngine, running: dict[str, Output]) -> None:
    while running:
        contestant.step(running)


def split_table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the parts in milliseconds, and the largest operations by name."""
    lines = []
    for name, row in rows.items():
        operations = ", ".join(f"{key} {value:.1f}" for key, value in row.get("operations", {}).items())
        lines.append([name, *(f"{row[part]:.2f}" for part in ("step", *PARTS)), operations or "-"])
    return report.markdown(["ms", "step", *PARTS, "largest operations of torch, own time"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--workload", type=Path, required=True, help="file written by tests.benchmarks.workload")
    parser.add_argument("--threads", type=int, default=num_compute_threads())
    add_arguments(parser)
    args = parser.parse_args()
    workload = Workload.parse(args.workload.read_text())
    sys.stdout.write(json.dumps(split(InProcessEngine(args), workload)) + "\n")


if __name__ == "__main__":
    main()
