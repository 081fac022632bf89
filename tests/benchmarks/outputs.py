"""What several outputs of one prompt cost before they decode: time and KV blocks of n outputs against those of one.

A random model of SmolLM2-135M's shape prefills a prompt of a thousand tokens with n=1 and n=8 in turns; the time is
that of all steps up to the one that gives every output its first token. Run it on a quiet machine, from the
repository's root: python -m tests.benchmarks.outputs --help
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from common.generation import SamplingParams
from tests.benchmarks.engine_step import NoText, smollm2_shaped
from worker.assembly import choose_backend
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.decoder.compile import compile_decoder
from worker.engine.loop import Engine
from worker.engine.runner import ModelRunner
from worker.engine.settings import EngineSettings
from worker.engine.types import GenerationRequest


def make_engine(dtype: torch.dtype, device: str, num_prompt_tokens: int, most_outputs: int) -> Engine:
    """Every prompt is computed: nothing is kept for later hits."""
    settings = EngineSettings(
        num_blocks=num_prompt_tokens // 16 + 4 * most_outputs + 16,
        token_budget=512,
        max_num_seqs=max(64, most_outputs),
        enable_prefix_cache=False,
    )
    model = smollm2_shaped(dtype, device)
    backend = choose_backend(model.device, dtype, settings.block_size)
    decoder = compile_decoder(model, backend, 8192) if isinstance(backend, CpuAttention) else None
    return Engine(ModelRunner(model, backend, settings, decoder), settings, NoText)


def first_tokens(engine: Engine, request_id: str, num_prompt_tokens: int, num_outputs: int) -> tuple[float, int]:
    """Return the milliseconds until every output has its first token, and the blocks that are taken then."""
    sampling = SamplingParams(max_tokens=4, temperature=1.0, seed=1, num_outputs=num_outputs)
    prompt = tuple((7919 * i) % 49000 for i in range(num_prompt_tokens))
    engine.add(GenerationRequest(request_id, prompt, sampling))
    started = time.perf_counter()
    begun: set[int] = set()
    while len(begun) < num_outputs:
        for output in engine.step(0.0).outputs:
            begun |= {delta.output_index for delta in output.deltas}
    elapsed_ms = (time.perf_counter() - started) * 1000
    stats = engine.stats()
    engine.abort(request_id)
    engine.step(0.0)
    return elapsed_ms, stats.num_blocks - stats.num_free_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=1000, help="tokens of the prompt")
    parser.add_argument("--outputs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    engine = make_engine(getattr(torch, args.dtype), args.device, args.prompt, args.outputs)
    times: dict[int, list[float]] = {1: [], args.outputs: []}
    blocks: dict[int, int] = {}
    for number in range(args.rounds + 1):  # the first one warms up
        for num_outputs, found in times.items():
            elapsed_ms, blocks[num_outputs] = first_tokens(engine, f"{number}-{num_outputs}", args.prompt, num_outputs)
            if number:
                found.append(elapsed_ms)
    one, many = (statistics.median(times[n]) for n in (1, args.outputs))
    print(  # noqa: T201
        json.dumps(
            {
                "prompt_tokens": args.prompt,
                "outputs": args.outputs,
                "rounds": args.rounds,
                "ms_one": round(one, 1),
                "ms_many": round(many, 1),
                "time_ratio": round(many / one, 3),
                "blocks_one": blocks[1],
                "blocks_many": blocks[args.outputs],
                "block_ratio": round(blocks[args.outputs] / blocks[1], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
