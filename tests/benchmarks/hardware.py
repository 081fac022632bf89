"""Measures the machine: read bandwidth, and rates of multiply-adds: from registers alone, and of libraries' products.

python -m tests.benchmarks.hardware [--threads N] [--shapes DIR]      prints one JSON object
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from tests.benchmarks.limits import Hardware
from tests.benchmarks.processes import OthersShare
from tests.benchmarks.report import MAX_OTHERS
from worker.engine.kernels.build import LEVEL_FLAGS, KernelBuildError, find_compiler, supported_levels

_READ_BYTES: Final = 512 << 20  # far more than any cache
_SQUARE, _SMALL_SQUARE = 2048, 256
_CYCLED_BYTES: Final = 120 << 20  # copies of a weight, so that it comes from memory as it does in a step
_PEAK: Final = Path(__file__).with_name("peak.cpp")
_PEAK_S, _PEAK_RUNS = "0.2", 5
_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}


def seconds(call: Callable[[], object], budget_s: float = 0.3, passes: int = 3, spare: int = 3) -> float:
    """Return the best of some passes' median times of a call: a limit is what the machine can do, not what it did once.

    Passes that others disturb are made again while there are spare ones.
    """
    call()
    medians: list[float] = []
    num_quiet = 0
    while num_quiet < passes and len(medians) < passes + spare:
        times: list[float] = []
        end = time.perf_counter() + budget_s
        with OthersShare(lambda: [os.getpid()]) as others:
            while time.perf_counter() < end or len(times) < 5:
                started = time.perf_counter()
                call()
                times.append(time.perf_counter() - started)
        medians.append(statistics.median(times))
        num_quiet += others.share < MAX_OTHERS
    return min(medians)


def read_bandwidth() -> dict[str, float]:
    """Return bytes per second of reading: a sum, and matrix-vector products, which is how decoding reads."""
    numbers = torch.ones(_READ_BYTES // 4)
    rates = {"sum": _READ_BYTES / seconds(numbers.sum)}
    for name, dtype in _DTYPES.items():
        matrix = torch.ones(_READ_BYTES // 2048 // dtype.itemsize, 2048, dtype=dtype)
        vector = torch.ones(1, 2048, dtype=dtype)
        rates[f"{name} matrix-vector"] = _READ_BYTES / seconds(
            lambda matrix=matrix, vector=vector: torch.nn.functional.linear(vector, matrix)
        )
    return rates


def instruction_rates(threads: int) -> dict[str, float]:
    """Return operations per second by precision from registers to registers; none without a compiler."""
    try:
        compiler = find_compiler()
    except KernelBuildError:
        return {}
    flags = ("-std=c++17", "-O3", "-ffp-contract=fast", "-Wno-psabi", "-pthread", *LEVEL_FLAGS[supported_levels()[0]])
    headers = Path(sys.modules[find_compiler.__module__].__file__ or "").parent
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        command = [*compiler.command, *flags, f"-I{headers}", str(_PEAK), "-o", str(program)]
        subprocess.run(command, check=True, timeout=120)
        runs = [
            subprocess.run([program, str(threads), _PEAK_S], capture_output=True, text=True, check=True, timeout=60)
            for _ in range(_PEAK_RUNS)
        ]
    columns = zip(*([float(rate) for rate in run.stdout.split()] for run in runs), strict=True)
    return dict(zip(("fp32", "bf16", "int8"), map(max, columns), strict=True))


def peak_rates(threads: int) -> dict[str, float]:
    """Return operations per second by precision: the best of registers alone and of torch's and numpy's large products.

    Where a processor has no instructions for a narrow format, torch's kernels for it may take a thousand times longer;
    engines widen it instead, and its rate is that of float32.
    """
    rates = {"fp32": max(_rate(_torch_product(torch.float32), _SQUARE), _rate(_numpy_product, _SQUARE))}
    worth_a_look = _rate(_torch_product(torch.float32), _SMALL_SQUARE) / 4
    for name, product in (("bf16", _torch_product(torch.bfloat16)), ("int8", _byte_product)):
        small = _rate(product, _SMALL_SQUARE)
        rates[name] = max(rates["fp32"], _rate(product, _SQUARE) if small > worth_a_look else small)
    registers = instruction_rates(threads)
    widened = registers.get("fp32", 0.0)
    return {name: max(rate, registers.get(name, 0.0), widened) for name, rate in rates.items()}


Product = Callable[[int], Callable[[], object]]  # by the size of the squares


def _rate(product: Product, size: int) -> float:
    return 2 * size**3 / seconds(product(size))


def _torch_product(dtype: torch.dtype) -> Product:
    def make(size: int) -> Callable[[], object]:
        square = torch.randn(size, size).to(dtype)
        return lambda: square @ square

    return make


def _numpy_product(size: int) -> Callable[[], object]:
    square = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    return lambda: square @ square


def _byte_product(size: int) -> Callable[[], object]:
    square = torch.randint(-64, 64, (size, size), dtype=torch.int8)
    return lambda: torch._int_mm(square, square)


def shape_rates(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what torch's linear reaches at the model's shapes: microseconds a call and operations per second."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    rows = []
    for inputs, outputs in ((hidden, inner), (inner, hidden), (hidden, vocab)):
        for num_rows in (1, 8, 32, 128):
            row: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "rows": num_rows}
            for name, dtype in _DTYPES.items():
                copies = max(1, _CYCLED_BYTES // (inputs * outputs * dtype.itemsize))
                weights = [torch.randn(outputs, inputs, dtype=dtype) for _ in range(copies)]
                vectors = torch.randn(num_rows, inputs, dtype=dtype)

                def call(vectors: torch.Tensor = vectors, weights: list[torch.Tensor] = weights) -> None:
                    for weight in weights:
                        torch.nn.functional.linear(vectors, weight)

                time_s = seconds(call, 0.2, passes=1) / copies
                row[f"{name}_us"] = round(time_s * 1e6, 1)
                row[f"{name}_gops"] = round(2 * num_rows * inputs * outputs / time_s / 1e9, 1)
            rows.append(row)
    return rows


def measure(threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return {"threads": threads, "read_bytes_s": read_bandwidth(), "multiply_add_s": peak_rates(threads)}


def parse(measured: dict[str, Any]) -> Hardware:
    """Return what `measure` found, bandwidth being the best way of reading."""
    return Hardware(max(measured["read_bytes_s"].values()), measured["multiply_add_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", type=Path, help="a model folder whose linear layers are measured too")
    args = parser.parse_args()
    with torch.inference_mode():
        measured = measure(args.threads)
        if args.shapes is not None:
            measured["shapes"] = shape_rates(json.loads((args.shapes / "config.json").read_text()))
    sys.stdout.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main()
