"""What adapters cost: a full batch of the base alone against one of two adapters and the base, and of each rank alone.

A random model of SmolLM2-135M's shape prefills and then decodes a batch for each mix of adapters, in turns; figures are
medians over the rounds, of tokens a second. Adapters are of all linear layers, but for `q/v`. Run it on a quiet
machine, from the repository's root: python -m tests.benchmarks.adapters --help
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from common.generation import AdapterRef, SamplingParams
from tests.benchmarks.engine_step import NoText, smollm2_shaped
from tests.builders_adapters import ALL_LINEAR, linear_layers, write_adapter
from worker.assembly import choose_backend, make_runner
from worker.engine.adapters.files import AdapterLimits, LinearShape, read_adapter
from worker.engine.adapters.types import AdapterLease
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.decoder.compile import compile_decoder
from worker.engine.loop import Engine
from worker.engine.model import speed_up_for_device
from worker.engine.runner import ModelRunner
from worker.engine.settings import EngineSettings
from worker.engine.types import GenerationRequest

LEAST_SHARE = 0.8  # of the base's throughput, for two adapters and the base in one batch

# By name: the adapters that the rows of a batch take in turns; None is the base.
MIXES: dict[str, tuple[str | None, ...]] = {
    "base": (None,),
    "two and base": ("rank 8", "rank 16", None),
    "rank 8": ("rank 8",),
    "rank 16": ("rank 16",),
    "q/v rank 8": ("q/v rank 8",),
}


class Bench:
    """An engine, and adapters in memory."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        limits = EngineSettings(
            num_blocks=args.batch * ((args.prompt + args.steps) // 16 + 3),
            token_budget=args.token_budget,
            max_num_seqs=max(64, args.batch),
            enable_prefix_cache=False,
            speculation=False,
        )
        model: PreTrainedModel = smollm2_shaped(getattr(torch, args.dtype), args.device)
        shapes = {name: LinearShape(*shape) for name, shape in linear_layers(model).items()}
        backend = choose_backend(model.device, model.dtype, limits.block_size)
        decoder = None
        if isinstance(backend, CpuAttention) and not args.modules:
            decoder = compile_decoder(model, backend, 8192, int8=args.int8)
        else:
            speed_up_for_device(model)
        runner = ModelRunner(model, backend, limits, decoder, adapt=shapes)
        self.engine = Engine(make_runner(runner, limits), limits, NoText)
        self.leases: dict[str | None, AdapterLease | None] = {None: None}
        for name, rank, targets in (
            ("rank 8", 8, ALL_LINEAR),
            ("rank 16", 16, ALL_LINEAR),
            ("q/v rank 8", 8, ("q_proj", "v_proj")),
        ):
            written = write_adapter(folder / str(len(self.leases)), shapes, rank=rank, targets=targets, std=0.02)
            weights = read_adapter(written, runner.adaptable, AdapterLimits(rank, 1 << 30))
            self.leases[name] = AdapterLease(runner.load_adapter(AdapterRef(name, weights.revision), weights))

    def run(self, mix: tuple[str | None, ...]) -> tuple[float, float]:
        """Prefill and decode one batch; return tokens a second of both."""
        args, engine = self.args, self.engine
        waiting: set[str] = set()
        for index in range(args.batch):
            lease = self.leases[mix[index % len(mix)]]
            sampling = SamplingParams(max_tokens=args.steps + 8, adapter=None if lease is None else lease.adapter.ref)
            prompt = tuple((7919 * (index * args.prompt + i)) % 49000 for i in range(args.prompt))
            request = GenerationRequest(f"r{index}", prompt, sampling)
            waiting.add(request.request_id)
            # The bench's leases last: each request gets one of its own over the same adapter.
            engine.add(request if lease is None else replace(request, adapter=AdapterLease(lease.adapter)))
        names = set(waiting)
        started = time.perf_counter()
        while waiting:
            waiting -= {output.request_id for output in engine.step(0.0).outputs}
        prefill_s = time.perf_counter() - started
        steps = []
        for _ in range(args.steps):
            started = time.perf_counter()
            engine.step(0.0)
            steps.append(time.perf_counter() - started)
        for name in names:
            engine.abort(name)
        engine.step(0.0)
        return args.batch * args.prompt / prefill_s, args.batch / statistics.median(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=12, help="decode steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--token-budget", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--int8", action="store_true", help="int8 weights of the compiled decoder")
    parser.add_argument("--modules", action="store_true", help="transformers' modules instead of the compiled decoder")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in MIXES}
    for number in range(args.rounds + 1):  # the first one warms up
        for name, mix in MIXES.items():
            figures = bench.run(mix)
            if number:
                found[name].append(figures)
    report: dict[str, object] = {
        **{name: getattr(args, name) for name in ("batch", "prompt", "rounds", "dtype", "int8", "modules", "device")},
        "load_average": round(os.getloadavg()[0], 1),
    }
    share = 1.0
    for kind, index in (("prefill", 0), ("decode", 1)):
        medians = {name: statistics.median(figures[index] for figures in runs) for name, runs in found.items()}
        print(f"{kind:8} " + "  ".join(f"{name}: {value:.0f} tok/s" for name, value in medians.items()))  # noqa: T201
        shares = {name: round(value / medians["base"], 3) for name, value in medians.items()}
        report[kind] = {"base_tokens_per_s": round(medians["base"], 1), "shares": shares}
        share = min(share, shares["two and base"]) if kind == "decode" else share
    report["ok"] = share >= LEAST_SHARE
    print(json.dumps(report))  # noqa: T201
    raise SystemExit(0 if report["ok"] else 1)


if __name__ == "__main__":
    main()
