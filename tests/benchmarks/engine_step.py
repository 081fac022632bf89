"""How long one decode step of the engine takes, and how much of it is not the model.

A random model of SmolLM2-135M's shape decodes a full batch in steady state; every step is timed in its parts:

    plan       the scheduler chooses
    batch      numpy fills the tensors
    forward    the model, attention included
    sample     logits to tokens
    update     tokens to deltas: stops, text, blocks

Run it on a quiet machine, from the repository's root: python -m tests.benchmarks.engine_step --help
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from common.generation import SamplingParams
from tests.benchmarks.stopwatch import watch_engine
from worker.assembly import choose_backend
from worker.engine.cost import UNMEASURED
from worker.engine.loop import Engine
from worker.engine.probe import probe_cost
from worker.engine.runner import ModelRunner
from worker.engine.settings import EngineSettings
from worker.engine.types import GenerationRequest

PARTS = ("plan", "batch", "forward", "sample", "update")


class NoText:
    """A detokenizer that costs nothing."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def smollm2_shaped(dtype: torch.dtype, device: str) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device)


def measure(model: PreTrainedModel, batch_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the steps, in milliseconds."""
    settings = EngineSettings(
        num_blocks=batch_size * (args.context // 16 + 8) + 64,
        token_budget=1024,
        max_num_seqs=64,
        speculation=args.speculation,
    )
    backend = choose_backend(model.device, model.dtype, settings.block_size)
    runner = ModelRunner(model, backend, settings)
    cost = probe_cost(runner, settings) if args.speculation else UNMEASURED
    engine = Engine(runner, settings, NoText, cost=cost)
    sampling = SamplingParams(
        max_tokens=args.warmup + args.steps + 1000,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        logprobs=args.logprobs,
    )
    generator = torch.Generator().manual_seed(1)
    for i in range(batch_size):
        # Contexts spread evenly around --context, as in a batch whose requests came at different times.
        length = args.context if batch_size == 1 else args.context // 8 + 7 * args.context * i // (4 * (batch_size - 1))
        prompt = torch.randint(0, 49152, (length,), generator=generator).tolist()
        engine.add(GenerationRequest(f"r{i}", tuple(prompt), sampling))
    while sum(len(output.deltas) for output in engine.step(0.0).outputs) < batch_size:
        pass
    watch = watch_engine(engine, PARTS, torch.cuda.synchronize if model.device.type == "cuda" else lambda: None)
    totals, parts, num_tokens = [], [], 0
    for step in range(args.warmup + args.steps):
        watch.reset()
        started = time.perf_counter()
        result = engine.step(0.0)
        total = (time.perf_counter() - started) * 1000
        if step >= args.warmup:
            totals.append(total)
            parts.append(watch.reset())
            num_tokens += sum(len(delta.token_ids) for output in result.outputs for delta in output.deltas)
    figures: dict[str, Any] = {"batch": batch_size, "step_ms": statistics.median(totals), "step_ms_min": min(totals)}
    figures |= {f"{part}_ms": statistics.median(spent[part] for spent in parts) for part in PARTS}
    figures["overhead_ms"] = statistics.median(
        total - spent["forward"] for total, spent in zip(totals, parts, strict=True)
    )
    figures["tokens_per_step"] = num_tokens / args.steps
    figures["tokens_per_s"] = figures["tokens_per_step"] * 1000 / figures["step_ms"]
    rounded = {key: round(value, 3) for key, value in figures.items()}
    return {**rounded, "attention": backend.name, "speculation": args.speculation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="batch sizes, at most 64")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each batch size")
    parser.add_argument("--warmup", type=int, default=5, help="steps before those")
    parser.add_argument("--context", type=int, default=512, help="mean context in tokens, without the new ones")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--logprobs", action="store_true")
    parser.add_argument("--speculation", action="store_true", help="guess tokens; a random model soon repeats itself")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = smollm2_shaped(getattr(torch, args.dtype), args.device)
    for batch_size in args.batch:
        print(json.dumps(measure(model, batch_size, args)), flush=True)  # noqa: T201  # the script's output


if __name__ == "__main__":
    main()
