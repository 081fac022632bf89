"""A plan as tensors: what the model and the attention back-end read in one step.

The buffers are allocated once, at their largest, and filled in place through numpy. On the CPU the tensors of a step
are views of them, so a step's batch must not be kept beyond it. On a GPU a copy may be under way still when the next
step is laid out, so steps take turns with two sets of buffers: of two steps in flight, the older one has ended before a
third is laid out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from worker.engine.adapters.types import Adapter
from worker.engine.attention.interface import AttentionBatch
from worker.engine.scheduler import Plan
from worker.engine.seq2seq.batch import SourceBatch, source_batch
from worker.engine.sequence import Sequence
from worker.engine.transfer import to_device


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Which rows of a step have an adapter; there is at least one."""

    forms: tuple[Any, ...]  # of the adapters, as the runner made them
    of_rows: torch.Tensor  # [num_tokens] int32, on the host: index in `forms`, -1 for none


@dataclass(frozen=True, slots=True)
class TokensInFlight:
    """The tokens of a step that nobody has looked at yet: the step behind it takes them where they are."""

    token_ids: torch.Tensor  # [num_rows] int64, on the device
    rows: Mapping[Sequence, int]  # in `token_ids`

    def fill_in(self, input_ids: torch.Tensor, plan: Plan) -> None:
        """Put each sequence's token where the plan has it in `input_ids` [num_tokens], on the device."""
        targets, sources, row = [], [], 0
        for chunk in plan.chunks:
            if chunk.sequence.num_pending:  # it is all that its chunk computes
                targets.append(row)
                sources.append(self.rows[chunk.sequence])
            row += chunk.num_tokens
        places = to_device((*targets, *sources), input_ids.device)
        input_ids.index_copy_(0, places[: len(targets)], self.token_ids[places[len(targets) :]])


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step, packed: all sequences behind one another in a batch of one."""

    input_ids: torch.Tensor  # [1, num_tokens] int64
    position_ids: torch.Tensor  # [1, num_tokens] int64
    logit_rows: torch.Tensor  # [num_logit_rows] int64: the rows whose logits are needed
    attention: AttentionBatch
    adapters: AdapterRows | None = None  # None: no row has one
    sources: SourceBatch | None = None  # None: the model has no encoder


class _Buffer:
    """One-dimensional host memory, seen as a tensor and as an array."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        is_copied = device.type == "cuda"
        self._tensors = [torch.zeros(size, dtype=dtype, pin_memory=is_copied) for _ in range(2 if is_copied else 1)]
        self._device = device
        self.next()

    def next(self) -> None:
        """Begin a step."""
        self._tensors.append(self._tensors.pop(0))
        self._tensor = self._tensors[0]
        self.array = self._tensor.numpy()

    def take(self, size: int) -> torch.Tensor:
        """The first elements, on the device; on the CPU a view."""
        return self._tensor[:size].to(self._device, non_blocking=True)

    def host(self, size: int) -> torch.Tensor:
        """The first elements, where they were written."""
        return self._tensor[:size]


class BatchBuffers:
    """Room for the largest step."""

    def __init__(
        self,
        max_num_tokens: int,
        max_num_seqs: int,
        max_num_blocks: int,
        block_size: int,
        device: torch.device,
        max_scored_rows: int = 0,
        has_sources: bool = False,
    ) -> None:
        """`max_num_seqs` bounds the rows of logits too, drafts' included; but for `max_scored_rows` of prompts.

        `max_num_blocks` is of one sequence; it `has_sources` where the model has an encoder.
        """
        self._block_size = block_size
        self._has_sources = has_sources
        self._device = device
        self._input_ids = _Buffer(max_num_tokens, torch.int64, device)
        self._position_ids = _Buffer(max_num_tokens, torch.int64, device)
        self._logit_rows = _Buffer(max_num_seqs + max_scored_rows, torch.int64, device)
        self._slots = _Buffer(max_num_tokens, torch.int32, device)
        self._row_adapters = _Buffer(max_num_tokens, torch.int32, device)
        self._query_starts = _Buffer(max_num_seqs + 1, torch.int32, device)
        self._context_lens = _Buffer(max_num_seqs, torch.int32, device)
        self._block_tables = _Buffer(max_num_seqs * max_num_blocks, torch.int32, device)
        self._all = [buffer for buffer in vars(self).values() if isinstance(buffer, _Buffer)]

    def fill(self, plan: Plan) -> StepBatch:
        """Lay out a plan. Valid until the next call."""
        for buffer in self._all:
            buffer.next()
        ids, positions, slots = self._input_ids.array, self._position_ids.array, self._slots.array
        starts, lens, logit_rows = self._query_starts.array, self._context_lens.array, self._logit_rows.array
        block_size, num_seqs = self._block_size, len(plan.chunks)
        max_context_len = max(chunk.sequence.num_computed_tokens + chunk.num_tokens for chunk in plan.chunks)
        num_blocks = -(-max_context_len // block_size)
        tables = self._block_tables.array[: num_seqs * num_blocks].reshape(num_seqs, num_blocks)
        row = num_logit_rows = 0
        for index, chunk in enumerate(plan.chunks):
            sequence, start = chunk.sequence, chunk.sequence.num_computed_tokens
            end, next_row = start + chunk.num_tokens, row + chunk.num_tokens
            blocks = np.frombuffer(sequence.block_ids, dtype=np.int32)
            tables[index, : min(len(blocks), num_blocks)] = blocks[:num_blocks]
            if chunk.num_tokens == 1:
                ids[row] = sequence.token_ids[start]
                positions[row] = start
                slots[row] = sequence.block_ids[start // block_size] * block_size + start % block_size
            else:
                ids[row:next_row] = np.frombuffer(sequence.token_ids[start:end] + chunk.drafts, dtype=np.int32)
                span = np.arange(start, end, dtype=np.int32)
                positions[row:next_row] = span
                slots[row:next_row] = blocks[span // block_size] * block_size + span % block_size
            row = next_row
            starts[index + 1] = row
            lens[index] = end
            for logit_row in range(row - chunk.num_logit_rows, row):
                logit_rows[num_logit_rows] = logit_row
                num_logit_rows += 1
        return StepBatch(
            input_ids=self._input_ids.take(row).unsqueeze(0),
            position_ids=self._position_ids.take(row).unsqueeze(0),
            logit_rows=self._logit_rows.take(num_logit_rows),
            attention=AttentionBatch(
                slots=self._slots.take(row),
                block_tables=self._block_tables.take(num_seqs * num_blocks).view(num_seqs, num_blocks),
                query_starts=self._query_starts.take(num_seqs + 1),
                context_lens=self._context_lens.take(num_seqs),
                max_query_len=max(chunk.num_tokens for chunk in plan.chunks),
                max_context_len=max_context_len,
            ),
            adapters=self._adapters(plan, row),
            sources=source_batch(plan, block_size, self._device) if self._has_sources else None,
        )

    def _adapters(self, plan: Plan, num_rows: int) -> AdapterRows | None:
        if not any(chunk.sequence.adapter is not None for chunk in plan.chunks):
            return None  # as in most steps of most workers
        indices: dict[Adapter, int] = {}
        row, of_rows = 0, self._row_adapters.array
        for chunk in plan.chunks:
            adapter = chunk.sequence.adapter
            index = -1 if adapter is None else indices.setdefault(adapter, len(indices))
            of_rows[row : row + chunk.num_tokens] = index
            row += chunk.num_tokens
        return AdapterRows(tuple(adapter.form for adapter in indices), self._row_adapters.host(num_rows))
