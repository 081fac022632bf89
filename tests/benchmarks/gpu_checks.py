"""Whether what a GPU computes is right: attention kernels by variant, tiny models by token, narrow weights too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from tests.builders_engine import TokenNames, generate, make_request, make_settings, reference_tokens, tiny_model
from worker.assembly import choose_argmax, choose_backend, make_runner
from worker.engine.attention.interface import AttentionBackend, AttentionBatch, AttentionOptions, LayerShape
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.closeness import FP8_TOLERANCE, relative_error
from worker.engine.device import DeviceError
from worker.engine.loadcheck import check_module, plain_logits
from worker.engine.loop import Engine
from worker.engine.model import speed_up_for_device
from worker.engine.quantize import NARROW_TOLERANCE, Narrow, check_device, missing_package, quantize
from worker.engine.runner import ModelRunner

_BLOCK: Final = 16
# (context, new rows) of a mixed step; all earlier rows are prefilled before it.
_SEQUENCES: Final = [(1, 1), (700, 1), (3000, 1), (513, 513), (1200, 200), (90, 3)]
_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_FAMILIES: Final = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt2", "phi3")


@dataclass(frozen=True, slots=True)
class Variant:
    """What attention is asked for."""

    name: str
    num_heads: int
    shape: LayerShape
    dtype: torch.dtype = torch.bfloat16
    sliding_window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False


VARIANTS: Final = (
    Variant("llama 8b", 32, LayerShape(8, 128, 128)),
    Variant("llama 8b float32", 32, LayerShape(8, 128, 128), torch.float32),
    Variant("llama 8b float16", 32, LayerShape(8, 128, 128), torch.float16),
    Variant("smollm2", 9, LayerShape(3, 64, 64)),
    Variant("one kv head", 71, LayerShape(1, 64, 64)),
    Variant("a kv head each", 12, LayerShape(12, 80, 80)),
    Variant("window", 32, LayerShape(8, 128, 128), sliding_window=512),
    Variant("window, softcap, wide heads", 8, LayerShape(4, 256, 256), sliding_window=1000, softcap=50.0),
    Variant("window, sinks", 64, LayerShape(8, 64, 64), sliding_window=128, has_sinks=True),
    Variant("narrow values", 16, LayerShape(16, 192, 128)),
    Variant("narrow values float32", 4, LayerShape(2, 24, 8), torch.float32, softcap=5.0, has_sinks=True),
)


def check_kernels(device: torch.device) -> dict[str, bool]:
    """By variant, whether the device's attention gives what torch's gives."""
    divisor = 1 if device.type == "cuda" else 20
    lens = [(max(1, -(-context // divisor)), max(1, new // divisor)) for context, new in _SEQUENCES]
    variants = VARIANTS if divisor == 1 else [v for v in VARIANTS if v.dtype != torch.float16]
    return {variant.name: _error(variant, lens, device) <= _TOLERANCE[variant.dtype] for variant in variants}


@torch.inference_mode()
def _error(variant: Variant, lens: list[tuple[int, int]], device: torch.device) -> float:
    """The largest difference in a mixed step, relative to the largest value; infinite for a NaN."""
    generator = torch.Generator().manual_seed(3)
    shape, dtype = variant.shape, variant.dtype
    num_rows = sum(context for context, _ in lens)

    def rand(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    query = rand(num_rows, variant.num_heads, shape.key_dim)
    key, value = rand(num_rows, shape.num_kv_heads, shape.key_dim), rand(num_rows, shape.num_kv_heads, shape.value_dim)
    sinks = torch.linspace(-2, 4, variant.num_heads, device=device) if variant.has_sinks else None
    options = AttentionOptions(shape.key_dim**-0.5, variant.sliding_window, variant.softcap, sinks)
    tables = _tables([context for context, _ in lens])
    backends: list[AttentionBackend] = [choose_backend(device, dtype, _BLOCK), TorchAttention(_BLOCK)]
    outputs = []
    for backend in backends:
        cache = backend.allocate(shape, int(tables.max()) + 1, dtype, device)
        for ends_at, spans in enumerate(([(0, c - n) for c, n in lens], [(c - n, c) for c, n in lens])):
            batch, rows = _step(tables, spans, [context for context, _ in lens], device)
            output = backend.attend(query[rows], key[rows], value[rows], cache, batch, options)
            if ends_at == 1:
                outputs.append(output.double())
    worst = float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())
    return worst if worst == worst else float("inf")


def _tables(context_lens: list[int]) -> torch.Tensor:
    """Block tables [num_seqs, max_num_blocks] of scattered blocks."""
    needed = [-(-n // _BLOCK) for n in context_lens]
    order = (torch.randperm(sum(needed), generator=torch.Generator().manual_seed(4)) + 1).tolist()
    tables = torch.zeros(len(needed), max(needed), dtype=torch.int32)
    for i, n in enumerate(needed):
        tables[i, :n] = torch.tensor([order.pop() for _ in range(n)])
    return tables


def _step(
    tables: torch.Tensor, spans: list[tuple[int, int]], context_lens: list[int], device: torch.device
) -> tuple[AttentionBatch, torch.Tensor]:
    """The batch that computes these positions of the sequences, and which rows of all sequences' rows they are."""
    members = [(i, start, end) for i, (start, end) in enumerate(spans) if end > start]
    firsts = [sum(context_lens[:i]) for i in range(len(context_lens))]
    slots, rows, starts = [], [], [0]
    for i, start, end in members:
        slots += [int(tables[i, p // _BLOCK]) * _BLOCK + p % _BLOCK for p in range(start, end)]
        rows += range(firsts[i] + start, firsts[i] + end)
        starts.append(len(rows))

    def on_device(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    batch = AttentionBatch(
        slots=on_device(slots),
        block_tables=tables[[i for i, _, _ in members]].to(device),
        query_starts=on_device(starts),
        context_lens=on_device([end for _, _, end in members]),
        max_query_len=max(end - start for _, start, end in members),
        max_context_len=max(end for _, _, end in members),
    )
    return batch, torch.tensor(rows, device=device)


def check_greedy(device: torch.device) -> dict[str, bool]:
    """By family, whether all outputs are transformers' own: fp32, requests that join, chunks, a cache too small."""
    return {family: _is_identical(family, device) for family in _FAMILIES}


def _is_identical(family: str, device: torch.device) -> bool:
    model = tiny_model(family)
    torch.nn.Module.to(model, device)
    requests = [
        make_request(f"r{n}", [(7 * i + n) % 190 + 3 for i in range(n)], max_tokens=20) for n in (1, 17, 40, 5, 90, 64)
    ]
    expected = [reference_tokens(model, r.prompt_token_ids, r.sampling) for r in requests]
    speed_up_for_device(model)
    settings = make_settings(block_size=_BLOCK, num_blocks=20, token_budget=48, max_num_seqs=6)
    backend = choose_backend(device, model.dtype, _BLOCK)
    runner = make_runner(ModelRunner(model, backend, settings), settings)
    results = generate(Engine(runner, settings, TokenNames, argmax=choose_argmax(backend)), *requests)
    return [results[r.request_id].tokens[0] for r in requests] == expected


def why_not(narrow: Narrow, device: torch.device) -> str | None:
    """Return why these weights cannot be had here; None where they can."""
    reason = missing_package(narrow)
    try:
        check_device(narrow, device, torch.bfloat16)
    except DeviceError as error:
        return reason or str(error)
    return reason


@torch.inference_mode()
def check_narrow(narrow: Narrow, device: torch.device) -> dict[str, Any]:
    """How far narrow weights move the logits of a random model in bfloat16, and whether these are right then.

    Right is what is no further away than a worker allows, and the same packed, paged and in chunks as alone.
    """
    model = tiny_model("llama", hidden_size=512, intermediate_size=1024, num_attention_heads=8, vocab_size=2000)
    torch.nn.Module.to(model, device, torch.bfloat16)
    expected = plain_logits(model)
    if device.type == "cuda":  # on a CPU, layers would be packed for oneDNN
        speed_up_for_device(model)
    layers = quantize(model, narrow).layers
    actual = plain_logits(model)
    pairs = list(zip(actual, expected, strict=True))
    error = max(relative_error(a, e, torch.bfloat16) for a, e in pairs)
    kept = torch.cat([a.argmax(-1) == e.argmax(-1) for a, e in pairs]).float().mean()
    packed = check_module(
        model, choose_backend(device, torch.bfloat16, _BLOCK), FP8_TOLERANCE if narrow == "fp8" else None
    )
    return {
        "error": error,
        "first_choice_kept": float(kept),
        "packed_error": packed,
        "layers": len(layers),
        "right": bool(layers) and error <= NARROW_TOLERANCE[narrow],
    }
