"""Paged attention in plain torch: correct on every device, the oracle and the fallback of the faster back-ends.

Keys and values are gathered from their blocks into contiguous tensors and attended over with SDPA. Prefills go one by
one; decodes together, in groups of similar length so that padding at most doubles the work. What depends on the step
but not on the layer is prepared once, by the first layer.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

import torch
from torch.nn.functional import scaled_dot_product_attention

from worker.engine.attention.interface import AttentionBatch, AttentionOptions, LayerCache, LayerShape

_LONG_CONTEXT: Final = 128  # tokens


@dataclass(slots=True)
class _Group:
    """Sequences that compute equally many tokens, attended over together."""

    rows: torch.Tensor | slice  # of the packed batch, sequence by sequence
    num_seqs: int
    num_queries: int  # rows of each sequence
    blocks: torch.Tensor  # [num_seqs * num_blocks] int64
    first_positions: torch.Tensor  # [num_seqs] int64: position of each sequence's first row
    num_keys: int  # gathered keys that are looked at; those behind a shorter sequence's end are masked
    is_padded: bool
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)  # by sliding window

    def mask(self, window: int | None) -> torch.Tensor | None:
        """[num_seqs, 1, 1, num_queries, num_keys] bool, True where a row sees a key; None: every row sees all."""
        if window not in self.masks:
            self.masks[window] = self._build_mask(window)
        return self.masks[window]

    def biases(self, table: torch.Tensor) -> torch.Tensor:
        """[num_seqs, num_heads, num_queries, num_keys], of a table [num_heads, num_distances]."""
        device = self.blocks.device
        queries = self.first_positions[:, None] + torch.arange(self.num_queries, device=device)
        distances = queries[:, :, None] - torch.arange(self.num_keys, device=device)
        return table[:, distances.clamp(0, table.shape[1] - 1)].transpose(0, 1).contiguous()

    def _build_mask(self, window: int | None) -> torch.Tensor | None:
        if self.num_queries == 1 and not self.is_padded and (window is None or self.num_keys <= window):
            return None
        device = self.blocks.device
        keys = torch.arange(self.num_keys, device=device)
        queries = self.first_positions[:, None] + torch.arange(self.num_queries, device=device)
        mask = keys <= queries[:, :, None]
        if window is not None:
            mask &= keys > queries[:, :, None] - window
        return mask[:, None, None]


@dataclass(slots=True)
class _Prepared:
    slots: torch.Tensor  # [num_tokens] int64
    groups: list[_Group]


class TorchAttention:
    """Keys and values are [num_blocks, block_size, num_kv_heads, dim]."""

    name = "torch_ref"

    def __init__(self, block_size: int = 16) -> None:
        self.block_size = block_size
        # Of the latest batches: layers with attention across take turns with two.
        self._prepared: deque[tuple[AttentionBatch, _Prepared]] = deque(maxlen=2)

    def allocate(self, shape: LayerShape, num_blocks: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        size = (num_blocks, self.block_size, shape.num_kv_heads)
        return LayerCache(
            keys=torch.zeros(*size, shape.key_dim, dtype=dtype, device=device),
            values=torch.zeros(*size, shape.value_dim, dtype=dtype, device=device),
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        prepared = next((known for other, known in self._prepared if other is batch), None)
        if prepared is None:
            prepared = self._prepare(batch)
            self._prepared.append((batch, prepared))
        cache.keys.view(-1, *key.shape[1:]).index_copy_(0, prepared.slots, key)
        cache.values.view(-1, *value.shape[1:]).index_copy_(0, prepared.slots, value)
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        for group in prepared.groups:
            output[group.rows] = self._attend_group(query[group.rows], cache, group, options)
        return output

    def _prepare(self, batch: AttentionBatch) -> _Prepared:
        starts, lens = batch.query_starts.tolist(), batch.context_lens.tolist()
        decodes: dict[int, list[int]] = {}  # by number of blocks, rounded up to a power of two
        groups: list[_Group] = []
        for seq, context_len in enumerate(lens):
            num_queries = starts[seq + 1] - starts[seq]
            if num_queries == 1:
                decodes.setdefault(self._group_key(seq, context_len, batch.slots.device), []).append(seq)
            elif num_queries:
                groups.append(self._group(batch, [seq], starts, lens))
        groups.extend(self._group(batch, seqs, starts, lens) for seqs in decodes.values())
        return _Prepared(batch.slots.long(), groups)

    def _group_key(self, seq: int, context_len: int, device: torch.device) -> int:
        """Decodes of equal keys are attended over together: those of about equal length.

        On the CPU long ones stay alone (a negative key): padding and masks cost more there than calls.
        """
        if device.type == "cpu" and context_len > _LONG_CONTEXT:
            return -1 - seq
        return (-(-context_len // self.block_size) - 1).bit_length()

    def _group(self, batch: AttentionBatch, seqs: list[int], starts: list[int], lens: list[int]) -> _Group:
        device = batch.slots.device
        num_queries = starts[seqs[0] + 1] - starts[seqs[0]]
        num_keys = max(lens[seq] for seq in seqs)
        num_blocks = -(-num_keys // self.block_size)
        # Rows of the table are only defined up to their sequence's last block: point the rest at the scratch block.
        num_own_blocks = torch.tensor([-(-lens[seq] // self.block_size) for seq in seqs], device=device)
        table = batch.block_tables[torch.tensor(seqs, device=device), :num_blocks].long()
        table = table.masked_fill(torch.arange(num_blocks, device=device) >= num_own_blocks[:, None], 0)
        first_rows = [starts[seq] for seq in seqs]
        is_one_piece = first_rows == list(range(first_rows[0], first_rows[0] + len(seqs) * num_queries, num_queries))
        return _Group(
            rows=slice(first_rows[0], first_rows[0] + len(seqs) * num_queries)
            if is_one_piece
            else torch.tensor(first_rows, device=device),  # decodes: one row each
            num_seqs=len(seqs),
            num_queries=num_queries,
            blocks=table.flatten(),
            first_positions=torch.tensor([lens[seq] - num_queries for seq in seqs], device=device),
            num_keys=num_keys,
            is_padded=any(lens[seq] != num_keys for seq in seqs),
        )

    def _attend_group(
        self, query: torch.Tensor, cache: LayerCache, group: _Group, options: AttentionOptions
    ) -> torch.Tensor:
        """`query` is [num_seqs * num_queries, num_heads, key_dim]; returns the same rows of values."""
        num_heads, num_kv_heads = query.shape[1], cache.keys.shape[2]
        # [num_seqs, num_kv_heads, heads per kv head, num_queries, key_dim]
        grouped = query.view(group.num_seqs, group.num_queries, num_kv_heads, num_heads // num_kv_heads, -1).permute(
            0, 2, 3, 1, 4
        )
        keys, values = self._gather(cache.keys, group), self._gather(cache.values, group)
        if group.is_padded:
            # A mask does not stop a NaN that a failed request left behind: NaN plus -inf and 0 times NaN are NaN.
            ends = group.first_positions + group.num_queries
            is_behind_end = torch.arange(group.num_keys, device=query.device) >= ends[:, None]
            keys = keys.masked_fill(is_behind_end[:, None, None, :, None], 0)
            values = values.masked_fill(is_behind_end[:, None, None, :, None], 0)
        mask = group.mask(options.sliding_window)
        if options.distance_bias is not None:
            output = _explicit(grouped, keys, values, mask, options, group.biases(options.distance_bias))
        elif options.softcap is None and options.sinks is None:
            output = _sdpa(grouped, keys, values, mask, options.scale)
        else:
            output = _explicit(grouped, keys, values, mask, options)
        return output.permute(0, 3, 1, 2, 4).reshape(-1, num_heads, values.shape[-1])

    def _gather(self, blocks: torch.Tensor, group: _Group) -> torch.Tensor:
        """[num_seqs, num_kv_heads, 1, num_keys, dim]"""
        gathered = blocks.index_select(0, group.blocks)
        gathered = gathered.view(group.num_seqs, -1, *blocks.shape[2:])[:, : group.num_keys]
        return gathered.transpose(1, 2).unsqueeze(2)


def _sdpa(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    num_seqs, num_kv_heads, num_grouped, num_queries, _ = query.shape
    if num_queries == 1:  # the heads of a group read the same keys: let them be the queries
        rows = query.squeeze(3)
        output = scaled_dot_product_attention(
            rows, keys.squeeze(2), values.squeeze(2), attn_mask=None if mask is None else mask.squeeze(2), scale=scale
        )
        return output.unsqueeze(3)
    output = scaled_dot_product_attention(
        query.reshape(num_seqs, num_kv_heads * num_grouped, num_queries, -1),
        keys.squeeze(2),
        values.squeeze(2),
        attn_mask=None if mask is None else mask.squeeze(2),
        scale=scale,
        enable_gqa=num_grouped > 1,
    )
    return output.view(num_seqs, num_kv_heads, num_grouped, num_queries, -1)


def _explicit(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    options: AttentionOptions,
    biases: torch.Tensor | None = None,
) -> torch.Tensor:
    """What SDPA lacks: soft-capped scores (Gemma 2, arXiv:2408.00118), sinks, and a bias by distance (T5)."""
    scores = (query @ keys.transpose(-1, -2)).float() * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if biases is not None:
        scores += biases.view(scores.shape)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if options.sinks is not None:
        num_seqs, num_kv_heads, num_grouped, num_queries, _ = query.shape
        sinks = options.sinks.float().view(1, num_kv_heads, num_grouped, 1, 1).expand(num_seqs, -1, -1, num_queries, 1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1].to(values.dtype) @ values
    return scores.softmax(-1).to(values.dtype) @ values
