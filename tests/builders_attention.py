"""Batches for tests of attention back-ends, and attention written out in float64, one row at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker.engine.attention.interface import AttentionBatch, AttentionOptions


@dataclass
class Case:
    """Sequences whose keys and values are known in full; the last `query_lens` rows of each are this step's."""

    keys: list[torch.Tensor]  # [context_len, num_kv_heads, key_dim]
    values: list[torch.Tensor]
    query: torch.Tensor
    batch: AttentionBatch
    query_lens: list[int]


def make_case(
    lens: list[tuple[int, int]],
    num_heads: int,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    block_size: int,
    seed: int,
) -> Case:
    """`lens` are (context_len, query_len). Blocks are dealt out in random order; tables end in nonsense."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [-(-context // block_size) for context, _ in lens]
    order = (torch.randperm(sum(num_blocks), generator=generator) + 1).tolist()
    tables = torch.full((len(lens), max(num_blocks) + 1), 10**6, dtype=torch.int32)
    slots: list[int] = []
    for i, (context, query_len) in enumerate(lens):
        own = [order.pop() for _ in range(num_blocks[i])]
        tables[i, : len(own)] = torch.tensor(own, dtype=torch.int32)
        slots += [own[p // block_size] * block_size + p % block_size for p in range(context - query_len, context)]
    starts = torch.tensor([0, *[q for _, q in lens]]).cumsum(0).int()
    return Case(
        keys=[torch.randn(context, num_kv_heads, key_dim, generator=generator) for context, _ in lens],
        values=[torch.randn(context, num_kv_heads, value_dim, generator=generator) for context, _ in lens],
        query=torch.randn(int(starts[-1]), num_heads, key_dim, generator=generator),
        batch=AttentionBatch(
            slots=torch.tensor(slots, dtype=torch.int32),
            block_tables=tables,
            query_starts=starts,
            context_lens=torch.tensor([context for context, _ in lens], dtype=torch.int32),
            max_query_len=max(q for _, q in lens),
            max_context_len=max(context for context, _ in lens),
        ),
        query_lens=[q for _, q in lens],
    )


def distance_bias(num_heads: int, num_distances: int = 21) -> torch.Tensor:
    """Another one for each head and distance, none of them small."""
    generator = torch.Generator().manual_seed(num_heads)
    return torch.randn(num_heads, num_distances, generator=generator) * 2


def by_hand(case: Case, options: AttentionOptions) -> torch.Tensor:
    rows, row = [], 0
    for k, v, query_len in zip(case.keys, case.values, case.query_lens, strict=True):
        for position in range(len(k) - query_len, len(k)):
            first = 0 if options.sliding_window is None else max(0, position + 1 - options.sliding_window)
            num_grouped = case.query.shape[1] // k.shape[1]
            keys = k[first : position + 1].double().repeat_interleave(num_grouped, 1)
            values = v[first : position + 1].double().repeat_interleave(num_grouped, 1)
            scores = torch.einsum("hd,khd->hk", case.query[row].double(), keys) * options.scale
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            if options.distance_bias is not None:
                distances = torch.arange(position - first, -1, -1).clamp(max=options.distance_bias.shape[1] - 1)
                scores = scores + options.distance_bias[:, distances].double()
            weights = scores.exp()
            total = weights.sum(-1, keepdim=True)
            if options.sinks is not None:
                total = total + options.sinks.double().exp()[:, None]
            rows.append(torch.einsum("hk,khd->hd", weights / total, values))
            row += 1
    return torch.stack(rows)
