"""Times the CPU attention kernel per layer: `python -m tests.benchmarks.attention [--level avx2] [--layers 8]`.

9 query heads, 3 kv heads, 64 dimensions; contexts of 512 at batch 1, else spread over 64 to 1024. `sdpa` is torch's
attention called for each sequence over contiguous keys and values, which no paged cache has: a bound for what torch
could do. Layers take turns, so that a step's cache, not a layer's, must fit the processor's. Prints a line of JSON per
row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.attention.interface import AttentionBatch, AttentionOptions, LayerShape

HEADS, KV_HEADS, DIM = 9, 3, 64


def make_batch(num_queries: list[int], context_lens: list[int], block_size: int) -> tuple[AttentionBatch, int]:
    """Return a batch on shuffled blocks, and the number of blocks."""
    needed = [-(-n // block_size) for n in context_lens]
    num_blocks = sum(needed) + 1
    order = (torch.randperm(num_blocks - 1) + 1).tolist()
    tables = torch.zeros(len(needed), max(needed), dtype=torch.int32)
    slots = []
    for i, n in enumerate(needed):
        tables[i, :n] = torch.tensor([order.pop() for _ in range(n)])
        slots += [
            int(tables[i, p // block_size]) * block_size + p % block_size
            for p in range(context_lens[i] - num_queries[i], context_lens[i])
        ]
    batch = AttentionBatch(
        slots=torch.tensor(slots, dtype=torch.int32),
        block_tables=tables,
        query_starts=torch.tensor([0, *num_queries]).cumsum(0).to(torch.int32),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        max_query_len=max(num_queries),
        max_context_len=max(context_lens),
    )
    return batch, num_blocks


def milliseconds(run: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Return the least and the median time of repeated runs."""
    for _ in range(3):
        run()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times), statistics.median(times)


def measure(
    attention: CpuAttention,
    dtype: torch.dtype,
    num_queries: list[int],
    context_lens: list[int],
    layers: int,
    seconds: float,
) -> dict[str, list[float]]:
    """Return per way the least and the median milliseconds of one layer."""
    batch, num_blocks = make_batch(num_queries, context_lens, attention.block_size)
    shape, device, options = LayerShape(KV_HEADS, DIM, DIM), torch.device("cpu"), AttentionOptions(scale=DIM**-0.5)
    rows = torch.randn(sum(num_queries), HEADS + 2 * KV_HEADS, DIM).to(dtype)
    query, key, value = rows.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    caches = [attention.allocate(shape, num_blocks, dtype, device) for _ in range(layers)]
    for cache in caches:
        cache.keys.normal_()
        cache.values.normal_()

    def paged() -> None:
        for cache in caches:
            attention.attend(query, key, value, cache, batch, options)

    contiguous = [
        [(torch.randn(1, KV_HEADS, n, DIM).to(dtype), torch.randn(1, KV_HEADS, n, DIM).to(dtype)) for n in context_lens]
        for _ in range(layers)
    ]
    masks = [
        None if n == 1 else torch.ones(n, length, dtype=torch.bool).tril(length - n)
        for n, length in zip(num_queries, context_lens, strict=True)
    ]
    queries = [part.transpose(0, 1)[None] for part in query.split(num_queries)]

    def sdpa() -> None:
        for layer in contiguous:
            for part, (keys, values), mask in zip(queries, layer, masks, strict=True):
                torch.nn.functional.scaled_dot_product_attention(part, keys, values, attn_mask=mask, enable_gqa=True)

    times = {"paged": milliseconds(paged, seconds), "sdpa": milliseconds(sdpa, seconds)}
    return {name: [round(t / layers, 4) for t in pair] for name, pair in times.items()}


def main() -> None:
    """Run every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--level", help="instruction set (default: the CPU's best)")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    attention = CpuAttention(arguments.level)
    rows = {"decode 1": ([1], [512])}
    for n in (8, 32):
        rows[f"decode {n}"] = ([1] * n, torch.linspace(64, 1024, n).int().tolist())
    rows["prefill 256"] = ([256], [256])
    rows["prefill 512 on 512"] = ([512], [1024])
    for name, (num_queries, context_lens) in rows.items():
        for dtype in (torch.float32, torch.bfloat16):
            with torch.inference_mode():
                times = measure(attention, dtype, num_queries, context_lens, arguments.layers, arguments.seconds)
            row = {"row": name, "dtype": str(dtype).removeprefix("torch."), "min_median_ms_per_layer": times}
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
