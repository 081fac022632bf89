"""What the benchmark commands share: their options, the workload file, the reference, the report."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tests.benchmarks import plots, report, workload
from tests.benchmarks.contestants.base import NUM_COMPARED
from tests.benchmarks.hardware import parse as parse_hardware
from tests.benchmarks.limits import WEIGHT_BYTES, ModelCost, limits
from tests.benchmarks.report import Summary
from tests.benchmarks.turns import Entry, Measurement, Results, note
from tests.benchmarks.workload import NAMES, Workload
from worker.engine.demo import demo_model_dir
from worker.engine.device import num_compute_threads

# Ours, with the arguments of contestants.engine that choose them.
PRECISIONS: Final = {
    "bf16": ("--dtype", "bfloat16"),
    "int8": ("--dtype", "bfloat16", "--quantization", "int8"),
    "fp32": ("--dtype", "float32"),
}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="`demo` or a model folder")
    parser.add_argument("--texts", type=Path, default=workload.TEXT_FOLDER, help="folder with the licence texts")
    parser.add_argument("--only", default=",".join(NAMES), help="workloads, such as W2,W3")
    parser.add_argument("--rounds", type=int, default=3, help="undisturbed runs behind each figure")
    parser.add_argument("--spare", type=int, default=2, help="more runs allowed where others disturbed some")
    parser.add_argument("--threads", type=int, default=num_compute_threads(), help="threads that compute")
    parser.add_argument("--kv-cache-mib", type=int, default=1024, help="our memory for keys and values")
    parser.add_argument("--speculation", action="store_true", help="let ours guess tokens, which others do not here")
    parser.add_argument(
        "--lock", type=Path, help="file to lock while one computes, on a machine that others measure on"
    )
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="for logs, the reference and plots")
    return parser


class Bench:
    """One command's measurement in the making."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Raises TextsMissing, DemoModelError."""
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # contestants are ended on the way
        self.args = args
        self.model = demo_model_dir() if args.model == "demo" else Path(args.model).resolve()
        self.workload: Workload = workload.build_for(self.model, args.texts)
        self.names = [name for name in NAMES if name in args.only.split(",")]
        self.folder: Path = args.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.workload_path = self.folder / "workload.json"
        self.workload_path.write_text(self.workload.dump())

    def measurement(self) -> Measurement:
        args = self.args
        return Measurement(
            self.workload_path,
            self.folder,
            threads=args.threads,
            rounds=args.rounds,
            spare=args.spare,
            lock=args.lock,
        )

    def our_entry(self, precision: str, **more: Any) -> Entry:
        arguments = (*PRECISIONS[precision], "--kv-cache-mib", str(self.args.kv_cache_mib))
        if self.args.speculation:
            arguments = (*arguments, "--speculation")
        return Entry(
            name="torchrelay",
            precision=precision,
            module="tests.benchmarks.contestants.engine",
            model=str(self.model),
            arguments=arguments,
            is_ours=True,
            **more,
        )

    def reference(self, measurement: Measurement) -> list[list[int]]:
        """Return the greedy ids of W1's first requests from transformers in fp32; decoded once per workload.

        Raises ContestantFailed.
        """
        order = {"workload": "W1", "variant": 0, "num_requests": NUM_COMPARED, "max_running": 1}
        token_ids: list[list[int]] = self._of_reference(measurement, order)["token_ids"]
        return token_ids

    def reference_scores(self, measurement: Measurement, num_windows: int) -> list[dict[str, list[Any]]]:
        """Return how transformers in fp32 predicts the windows; computed once per text. Raises ContestantFailed."""
        scores: list[dict[str, list[Any]]] = self._of_reference(measurement, {"score": num_windows})["scores"]
        return scores

    def _of_reference(self, measurement: Measurement, order: dict[str, Any]) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps([self.workload_path.read_text(), order]).encode()).hexdigest()
        path = self.folder / f"reference-{digest[:16]}.json"
        if not path.exists():
            note("transformers fp32: decoding the reference")
            entry = Entry(
                name="transformers",
                precision="fp32",
                module="tests.benchmarks.contestants.transformers_generate",
                model=str(self.model),
                arguments=("--dtype", "float32"),
            )
            path.write_text(json.dumps(measurement.once(entry, order)))
        answer: dict[str, Any] = json.loads(path.read_text())
        return answer

    def hardware(self, measurement: Measurement) -> dict[str, Any]:
        """Measure the machine."""
        note("measuring the hardware")
        command = [sys.executable, "-m", "tests.benchmarks.hardware", "--threads", str(self.args.threads)]
        env = {**os.environ, "OPENBLAS_NUM_THREADS": str(self.args.threads)}
        with measurement.alone():
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
        measured: dict[str, Any] = json.loads(done.stdout)
        return measured

    def split(self, measurement: Measurement, precision: str) -> dict[str, Any]:
        """Measure where a step of ours spends its time, by kind of step."""
        note(f"measuring the parts of a step in {precision}")
        command = [sys.executable, "-m", "tests.benchmarks.step_split", "--workload", str(self.workload_path)]
        command += ["--model", str(self.model), "--threads", str(self.args.threads)]
        with measurement.alone(), (self.folder / "step-split.log").open("wb") as log:
            done = subprocess.run(
                [*command, *self.our_entry(precision).arguments], check=True, stdout=subprocess.PIPE, stderr=log
            )
        rows: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return rows

    def limits(self, measured: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Return the best possible figures by precision and column key."""
        cost = ModelCost.from_config(json.loads((self.model / "config.json").read_text()))
        hardware = parse_hardware(measured)
        return {precision: limits(cost, self.workload, hardware, precision) for precision in WEIGHT_BYTES}

    def summaries(self, entries: Sequence[Entry], results: Results, reference: list[list[int]] | None) -> list[Summary]:
        """Return what is said of each entry that ran, in their order."""
        found = []
        for entry in entries:
            if entry.label not in results.starts:
                continue
            start = results.starts[entry.label]
            wanted = {name: entry.rounds.get(name, self.args.rounds) for name in NAMES}
            figures, disturbed = report.figures_of(results.runs.get(entry.label, {}), wanted)
            figures["RSS"] = results.peak_memory_mb[entry.label]
            outputs = results.token_ids.get(entry.label)
            found.append(
                Summary(
                    entry.name,
                    entry.precision,
                    entry.is_ours,
                    figures,
                    disturbed,
                    entry.num_requests,
                    start["ready_s"],
                    start["first_token_s"],
                    report.drift(outputs, reference) if outputs and reference else None,
                )
            )
        return found


def print_tables(*tables: str) -> None:
    sys.stdout.write("\n" + "\n".join(tables) + "\n")


def show_plots(
    folder: Path, results: Results, splits: Mapping[str, Mapping[str, Any]], found: Sequence[Summary]
) -> None:
    """Draw, and say where; without matplotlib say what is missing."""
    try:
        for path in plots.draw(folder, results.sweeps, splits, found):
            sys.stdout.write(f"drawn: {path}\n")
    except plots.NoMatplotlib as error:
        note(str(error))


def print_report(target: str, found: Sequence[Summary], results: Results, more: Mapping[str, Any]) -> None:
    """Print the last line: one JSON object with every figure and every run behind it."""
    contestants = {
        summary.label: {
            "figures": {key: round(value, 3) for key, value in summary.figures.items()},
            "disturbed": sorted(summary.disturbed),
            "partial": dict(summary.partial),
            "ready_s": round(summary.ready_s, 2),
            "first_token_s": round(summary.first_token_s, 2),
            "drift": None if summary.drift is None else asdict(summary.drift),
            "info": results.starts[summary.label]["info"],
            "runs": {name: [_run(run) for run in runs] for name, runs in results.runs.get(summary.label, {}).items()},
        }
        for summary in found
    }
    line = {"target": target, **more, "contestants": contestants, "failures": results.failures}
    sys.stdout.write(json.dumps(line) + "\n")


def _run(run: report.Run) -> dict[str, Any]:
    return {
        "variant": run.variant,
        "others_cpu": round(run.others_cpu, 3),
        **{key: round(value, 3) for key, value in run.figures.items()},
        "cpu_us_per_token": {part: round(value, 1) for part, value in run.cpu_us_per_token.items()},
    }
