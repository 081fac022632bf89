"""Everything that is to be shown on a GPU, in one call of at most ten minutes: `make bench-gpu`.

    kernels     Triton attention against the torch back-end, on the device, for every variant that models ask for
    greedy      outputs of tiny models, with fused layers and CUDA graphs, against transformers' own `generate`
    tasks       adapters, structured output, encoder-decoder models and encoders: tiny ones, likewise
    narrow      logits of a random model with fp8, int8 and int4 weights against those in bfloat16, where torchao is
    decode      an 8B Llama shape with random bfloat16 weights: tokens per second, and the share of copy bandwidth
    prefill     the same shape: share of the measured rate of matrix products
    batching    128 requests at once, transformers' continuous batching and ours
    shapes      output tokens per second at full load, in bfloat16 and in fp8 (weights and inputs of the linear layers;
                keys and values are bfloat16), beside what NVIDIA publishes of TensorRT-LLM for FP8

Prints a table, and as the last line one JSON object. Without a GPU it says so and prints {"gpu": null}; `--rehearse`
then runs a toy shape on the CPU, which tests this script and measures nothing. Exits with 1 when an output is wrong.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from common.generation import SamplingParams
from tests.benchmarks import gpu_checks, gpu_tasks
from tests.benchmarks.limits import ModelCost
from worker.assembly import choose_argmax, choose_backend, make_runner
from worker.engine.loop import Engine, Runner
from worker.engine.model import speed_up_for_device
from worker.engine.quantize import Narrow, quantize
from worker.engine.runner import ModelRunner
from worker.engine.scheduler import Chunk, Plan
from worker.engine.sequence import Sequence
from worker.engine.settings import EngineSettings
from worker.engine.types import GenerationRequest

SECONDS: Final = 500.0  # by default, after which no further part is begun
BATCHES: Final = (1, 32, 128, 256)
PREFILLS: Final = (2048, 8192)
# Llama 3.1 8B, FP8, one H100 SXM, output tokens per second at maximum load, by input and output length; as published.
TENSORRT_LLM: Final[Mapping[tuple[int, int], int]] = {
    (128, 128): 28312,
    (128, 2048): 22714,
    (1000, 1000): 15220,
    (2048, 128): 3450,
    (2048, 2048): 9305,
}
_CHECKS: Final = ("kernels", "greedy", "tasks")  # parts that say by name what is right
TARGETS: Final = {"bandwidth_share": 0.85, "over_transformers": 1.5}

_LLAMA_8B: Final[Mapping[str, Any]] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 16384,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}
_TOY: Final[Mapping[str, Any]] = {
    **_LLAMA_8B,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 256,
}


class NoText:
    """A detokenizer that costs nothing."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done: all of it on a GPU, next to nothing in a rehearsal."""

    device: torch.device
    shape: Mapping[str, Any]
    dtype: torch.dtype
    divisor: int  # of lengths and batch sizes
    steps: int
    window_s: float

    def of(self, number: int) -> int:
        return max(1, number // self.divisor)


FULL: Final = Scale(torch.device("cuda"), _LLAMA_8B, torch.bfloat16, 1, 48, 10.0)
REHEARSAL: Final = Scale(torch.device("cpu"), _TOY, torch.float32, 64, 3, 0.3)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the least time of repeated runs."""
    best = float("inf")
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def measure_hardware(scale: Scale) -> dict[str, float]:
    """Bytes per second of a large copy, read and written; operations per second of a large product."""
    size, width = (1 << 31, 8192) if scale.divisor == 1 else (1 << 20, 64)
    source = torch.empty(size, dtype=torch.uint8, device=scale.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(width, width, device=scale.device).to(scale.dtype) for _ in range(2))
    return {
        "copy_bytes_s": 2 * size / seconds(lambda: target.copy_(source), scale.device, 5),
        "matmul_flop_s": 2 * width**3 / seconds(lambda: torch.mm(a, b), scale.device, 10),
    }


def make_model(scale: Scale) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **scale.shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with scale.device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=scale.dtype, attn_implementation="sdpa")
    return model.eval()


def make_prompt(length: int, seed: int, vocab_size: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, vocab_size, (length,), generator=generator).tolist())


class Ours:
    """The engine over the changed model, its cache filling what is left of the memory."""

    def __init__(self, model: PreTrainedModel, scale: Scale, narrow: Narrow | None = None) -> None:
        self.scale = scale
        model.set_attn_implementation("eager")  # transformers' batching has left its own
        self.changes = speed_up_for_device(model)  # what has been changed before stays
        if narrow is not None:
            quantize(model, narrow)
        self.settings = EngineSettings(
            max_num_seqs=scale.of(256),
            token_budget=max(scale.of(8192), scale.of(256)),
            enable_prefix_cache=False,
            speculation=False,  # random weights repeat themselves, and steps with guesses are not replayed
            max_model_len=12288,
        )
        backend = choose_backend(scale.device, scale.dtype, self.settings.block_size)
        started = time.perf_counter()
        self.inner = ModelRunner(model, backend, self.settings)
        self.runner: Runner = make_runner(self.inner, self.settings)
        self.start_s = time.perf_counter() - started
        self.attention, self._argmax = backend.name, choose_argmax(backend)

    @property
    def num_kv_tokens(self) -> int:
        return self.runner.num_blocks * self.settings.block_size

    def engine(self) -> Engine:
        return Engine(self.runner, self.settings, NoText, argmax=self._argmax)

    def request(self, name: str, num_prompt: int, num_output: int, seed: int) -> GenerationRequest:
        prompt = make_prompt(num_prompt, seed, self.runner.vocab_size)
        return GenerationRequest(name, prompt, SamplingParams(max_tokens=num_output, temperature=0.0))


def measure_decode(ours: Ours, batch_size: int, context: int) -> dict[str, float]:
    """Steps of a full batch in steady state, scheduling and sampling included."""
    engine, steps = ours.engine(), ours.scale.steps
    num_prefills = -(-batch_size * context // ours.settings.token_budget)  # steps; the first requests decode meanwhile
    for i in range(batch_size):
        engine.add(ours.request(f"r{i}", context, steps + 2 * num_prefills + 16, i))
    while sum(len(output.deltas) for output in engine.step(0.0).outputs) < batch_size:
        pass
    for _ in range(4):
        engine.step(0.0)
    started = time.perf_counter()
    for _ in range(steps):
        engine.step(0.0)
    step_s = (time.perf_counter() - started) / steps
    return {"tok_s": batch_size / step_s, "step_ms": step_s * 1000, "context": context + (num_prefills + steps) / 2}


def bytes_per_step(model: PreTrainedModel, batch_size: int, context: float) -> float:
    """Weights, without the embedding table of which a row is read, and the keys and values of every context."""
    config, itemsize = model.config, model.dtype.itemsize
    cost = ModelCost.from_config(config.to_dict())
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return (cost.num_weights + batch_size * context * per_token) * itemsize


def measure_prefill(ours: Ours, model: PreTrainedModel, num_tokens: int) -> dict[str, float]:
    sequence = Sequence("r", make_prompt(num_tokens, 1, ours.runner.vocab_size), SamplingParams(max_tokens=1))
    sequence.block_ids.extend(range(1, 2 + num_tokens // ours.settings.block_size))
    plan = Plan((Chunk(sequence, num_tokens, is_last=True),), num_tokens)
    taken = seconds(lambda: ours.runner.execute(plan), ours.scale.device, 3)
    operations = ModelCost.from_config(model.config.to_dict()).operations(num_tokens, 0, 1)
    return {"tok_s": num_tokens / taken, "flop_s": operations / taken}


def run_batch(ours: Ours, num_requests: int, num_prompt: int, num_output: int) -> float:
    """Output tokens per second of requests that come together, prefills included."""
    engine = ours.engine()
    for i in range(num_requests):
        engine.add(ours.request(f"r{i}", num_prompt, num_output, i))
    started = time.perf_counter()
    while engine.has_work:
        engine.step(0.0)
    return num_requests * num_output / (time.perf_counter() - started)


def run_transformers(model: PreTrainedModel, num_requests: int, num_prompt: int, num_output: int) -> float:
    """The same requests through transformers' continuous batching."""
    vocab_size = model.config.vocab_size
    generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    generator: Any = model
    manager = generator.init_continuous_batching(generation_config=generation)
    with torch.inference_mode():
        manager.start()
    try:

        def run(count: int, num_tokens: int) -> float:
            started = time.perf_counter()
            for i in range(count):
                prompt = list(make_prompt(num_prompt, i, vocab_size))
                manager.add_request(prompt, eos_token_id=-1, max_new_tokens=num_tokens)
            left, end = count, started + 120
            while left:
                if time.perf_counter() > end or not manager.is_running():
                    raise RuntimeError(f"{left} of {count} requests were not answered in 120 s")
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    left -= 1
            return count * num_tokens / (time.perf_counter() - started)

        run(2, 4)  # what it prepares at its first steps is not counted
        return run(num_requests, num_output)
    finally:
        manager.stop(block=True, timeout=20)
        manager = None  # and its cache, which took what was free
        gc.collect()
        torch.cuda.empty_cache()


def first_lengths(most: int, num_prompt: int, num_output: int, token_budget: int) -> list[tuple[int, int]]:
    """Return the lengths of prompt and output of the requests that a full load begins with, as `measure_load` says."""
    left = [1 + num_output * i // most for i in range(most)]
    prompts = [num_prompt + num_output - num_left for num_left in left]
    # Steps from each prompt's last until all are computed, each of which gives a token.
    waiting = [math.ceil((sum(prompts) - computed) / token_budget) for computed in itertools.accumulate(prompts)]
    return [(prompt, num_left + steps) for prompt, num_left, steps in zip(prompts, left, waiting, strict=True)]


def measure_load(ours: Ours, num_prompt: int, num_output: int) -> float:
    """Output tokens per second while finished requests are replaced at once.

    It begins as a load that has run for long would be found: the first requests have from none to all of their outputs
    in their prompts, and are to give the rest. None ends while the prompts of the last are computed yet; after that one
    ends in every `num_output / max_num_seqs` steps.
    """
    engine, most = ours.engine(), ours.settings.max_num_seqs
    for i, lengths in enumerate(first_lengths(most, num_prompt, num_output, ours.settings.token_budget)):
        engine.add(ours.request(f"r{i}", *lengths, i))
    begun: set[str] = set()
    while len(begun) < most:
        begun |= {output.request_id for output in engine.step(0.0).outputs if output.deltas}
    num_added, num_tokens, settled_at = most, 0, 0.0
    window_s = ours.scale.window_s
    started = time.perf_counter()
    while (now := time.perf_counter()) < started + window_s * 4 / 3:
        if not settled_at and now > started + window_s / 3:
            settled_at = now
        for output in engine.step(0.0).outputs:
            if settled_at:
                num_tokens += sum(len(delta.token_ids) for delta in output.deltas)
            if output.finished:
                engine.add(ours.request(f"r{num_added}", num_prompt, num_output, num_added % 64))
                num_added += 1
    return num_tokens / (now - settled_at)


class Parts:
    """Runs the parts one after another; one that fails or finds no time left is reported, and the next one begins."""

    def __init__(self, limit_s: float) -> None:
        self._end = time.monotonic() + limit_s
        self.failures: dict[str, str] = {}

    def run(self, name: str, part: Callable[[], Any]) -> Any:
        started = time.monotonic()
        if started > self._end:
            self.failures[name] = "no time was left"
            return None
        try:
            result = part()
        except Exception as error:  # noqa: BLE001 - whatever fails, the other figures are wanted
            self.failures[name] = f"{type(error).__name__}: {error}"[:500]
            result = None
        say(f"{name}: {self.failures.get(name, 'done')}, {time.monotonic() - started:.0f} s")
        return result


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def run_all(scale: Scale, limit_s: float) -> dict[str, Any]:
    """Return the report."""
    parts = Parts(limit_s)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if scale.device.type == "cuda" else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kernels": parts.run("kernels", lambda: gpu_checks.check_kernels(scale.device)),
        "greedy": parts.run("greedy", lambda: gpu_checks.check_greedy(scale.device)),
        "tasks": parts.run("tasks", lambda: gpu_tasks.check_tasks(scale.device)),
        "hardware": parts.run("hardware", lambda: measure_hardware(scale)),
        "narrow": {},
    }
    formats: tuple[Narrow, ...] = ("fp8", "int8", "int4")
    for narrow in formats:
        reason = gpu_checks.why_not(narrow, scale.device)
        report["narrow"][narrow] = (
            parts.run(narrow, partial(gpu_checks.check_narrow, narrow, scale.device))
            if reason is None
            else {"not_run": reason}
        )
    model = parts.run("model", lambda: make_model(scale))
    requests = (scale.of(128), scale.of(512), scale.of(128))
    if model is not None:
        theirs = parts.run("transformers", lambda: run_transformers(model, *requests)) if scale.divisor == 1 else None
        report["batching"] = {"requests": requests, "transformers_tok_s": theirs}
        ours = parts.run("engine", lambda: Ours(model, scale))
        if ours is not None:
            measure_ours(parts, report, ours, model, requests)
            ours = None  # and its cache
            gc.collect()
            if scale.device.type == "cuda":
                torch.cuda.empty_cache()
            measure_fp8(parts, report, model, scale)
    report["failures"] = parts.failures
    wrong = [name for name in _CHECKS if not (report[name] and all(report[name].values()))]
    wrong += [narrow for narrow, found in report["narrow"].items() if not (found and found.get("right", True))]
    report["wrong"] = wrong
    return report


def measure_ours(
    parts: Parts, report: dict[str, Any], ours: Ours, model: PreTrainedModel, requests: tuple[int, int, int]
) -> None:
    scale, hardware = ours.scale, report["hardware"] or {}
    report["engine"] = {
        "attention": ours.attention,
        "changes": list(ours.changes),
        "kv_tokens": ours.num_kv_tokens,
        "start_s": ours.start_s,
    }
    report["decode"] = {}
    for batch in BATCHES:
        size, context = scale.of(batch), scale.of(1024 if batch < 256 else 768)
        figures = parts.run(f"decode {batch}", partial(measure_decode, ours, size, context))
        if figures is not None and hardware:
            rate = bytes_per_step(model, size, figures["context"]) * 1000 / figures["step_ms"]
            figures["bandwidth_share"] = rate / hardware["copy_bytes_s"]
        report["decode"][str(batch)] = figures
    report["prefill"] = {}
    for length in PREFILLS:
        figures = parts.run(f"prefill {length}", partial(measure_prefill, ours, model, scale.of(length)))
        if figures is not None and hardware:
            figures["matmul_share"] = figures["flop_s"] / hardware["matmul_flop_s"]
        report["prefill"][str(length)] = figures
    own = report["batching"]["tok_s"] = parts.run("batching", lambda: run_batch(ours, *requests))
    theirs = report["batching"]["transformers_tok_s"]
    report["batching"]["over_transformers"] = own / theirs if own and theirs else None
    report["shapes"] = {}
    for (num_prompt, num_output), published in TENSORRT_LLM.items():
        name, lengths = f"{num_prompt}/{num_output}", (scale.of(num_prompt), scale.of(num_output))
        figure = parts.run(f"shape {name}", partial(measure_load, ours, *lengths))
        report["shapes"][name] = {"bf16_tok_s": figure, "fp8_tok_s": None, "tensorrt_llm_fp8_tok_s": published}


def measure_fp8(parts: Parts, report: dict[str, Any], model: PreTrainedModel, scale: Scale) -> None:
    """The shapes once more with the same model in fp8, which it stays."""
    reason = gpu_checks.why_not("fp8", scale.device)
    ours = parts.run("engine, fp8", lambda: Ours(model, scale, "fp8")) if reason is None else None
    report["engine_fp8"] = {"not_run": reason} if ours is None else {"kv_tokens": ours.num_kv_tokens}
    if ours is None:
        return
    for (num_prompt, num_output), name in zip(TENSORRT_LLM, report["shapes"], strict=True):
        lengths = (scale.of(num_prompt), scale.of(num_output))
        report["shapes"][name]["fp8_tok_s"] = parts.run(f"shape {name}, fp8", partial(measure_load, ours, *lengths))


def table(report: Mapping[str, Any]) -> str:
    """Return the figures as text."""
    lines = [f"{report['gpu'] or 'rehearsal on a CPU: these figures mean nothing'}, torch {report['torch']}", ""]

    def row(what: str, value: float | None, unit: str, note: str = "") -> None:
        lines.append(f"{what:<42} {'-' if value is None else f'{value:,.2f}':>14} {unit:<10} {note}")

    hardware = report.get("hardware") or {}
    row("copy", hardware.get("copy_bytes_s", 0) / 1e12, "TB/s")
    row("matrix product", hardware.get("matmul_flop_s", 0) / 1e12, "TFLOP/s")
    for batch, figures in (report.get("decode") or {}).items():
        share = (figures or {}).get("bandwidth_share")
        note = "" if share is None else f"{share:.0%} of copy bandwidth"
        row(f"decode, batch {batch}", figures and figures["tok_s"], "tok/s", note)
    for length, figures in (report.get("prefill") or {}).items():
        share = (figures or {}).get("matmul_share")
        note = "" if share is None else f"{share:.0%} of the product's rate"
        row(f"prefill of {length}", figures and figures["tok_s"], "tok/s", note)
    batching = report.get("batching") or {}
    row("128 requests, ours", batching.get("tok_s"), "tok/s")
    row("128 requests, transformers", batching.get("transformers_tok_s"), "tok/s")
    for name, figures in (report.get("shapes") or {}).items():
        row(f"{name} at full load, bf16", figures["bf16_tok_s"], "tok/s")
        note = f"TensorRT-LLM, FP8, as published: {figures['tensorrt_llm_fp8_tok_s']:,}"
        reason = (report.get("engine_fp8") or {}).get("not_run")
        if reason is not None:
            note = f"not run: {reason}; {note}"
        row(f"{name} at full load, fp8", figures["fp8_tok_s"], "tok/s", note)
    for narrow, found in report["narrow"].items():
        if found and "not_run" in found:
            lines.append(f"{narrow} weights: not run: {found['not_run']}")
        elif found:
            lines.append(
                f"{narrow} weights: {'right' if found['right'] else 'wrong'}, logits moved by {found['error']:.3f} of "
                f"their spread, first choice kept in {found['first_choice_kept']:.0%}"
            )
    for part in _CHECKS:
        results = report.get(part) or {}
        lines.append(f"{part}: {sum(map(bool, results.values()))} of {len(results)} right")
        lines += [f"{part}: wrong: {name}" for name, is_right in results.items() if not is_right]
    lines += [f"failed: {name}: {reason}" for name, reason in report["failures"].items()]
    return "\n".join(lines)


def missed(report: Mapping[str, Any]) -> list[str]:
    """Return the targets that were measured and not met."""
    alone = ((report.get("decode") or {}).get("1") or {}).get("bandwidth_share")
    figures = {"bandwidth_share": alone, "over_transformers": (report.get("batching") or {}).get("over_transformers")}
    return [name for name, figure in figures.items() if figure is not None and figure < TARGETS[name]]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="run a toy shape on the CPU: a test of this script")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin no further part after so long")
    parser.add_argument("--window-s", type=float, default=FULL.window_s, help="how long a full load is measured")
    args = parser.parse_args(arguments)
    if not args.rehearse and not torch.cuda.is_available():
        say("not run on a GPU")
        say(json.dumps({"gpu": None}))
        return 0
    report = run_all(REHEARSAL if args.rehearse else replace(FULL, window_s=args.window_s), args.seconds)
    report["missed"] = missed(report)
    say(table(report))
    say(json.dumps(report))
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
