"""What a step reads of sources, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from worker.engine.attention.interface import AttentionBatch
from worker.engine.blocks import SCRATCH_BLOCK
from worker.engine.plan import Chunk, Plan
from worker.engine.transfer import on_device


@dataclass(frozen=True, slots=True)
class SourceRows:
    """A source that a step reads."""

    token_ids: torch.Tensor  # [1, num_tokens] int64
    slots: torch.Tensor  # [num_tokens] int32: where the keys and values of its tokens are written


@dataclass(frozen=True, slots=True)
class SourceBatch:
    """What the rows of a step attend over across, and the sources that are read for it."""

    attention: AttentionBatch  # each row of the step as a sequence of one, whose context is its source
    new: tuple[SourceRows, ...] = ()


def source_batch(plan: Plan, block_size: int, device: torch.device) -> SourceBatch:
    """Lay out the sources of a plan, all of whose sequences have one. For any number of steps."""
    chunks = plan.chunks
    num_rows = [chunk.num_tokens for chunk in chunks]
    lengths = [num_source_tokens(chunk) for chunk in chunks]
    tables = np.zeros((len(chunks), max(len(chunk.sequence.source_block_ids) for chunk in chunks)), dtype=np.int32)
    for index, chunk in enumerate(chunks):
        blocks = chunk.sequence.source_block_ids
        tables[index, : len(blocks)] = blocks
    return SourceBatch(
        across(np.repeat(tables, num_rows, axis=0), np.repeat(lengths, num_rows), block_size, device),
        tuple(_rows(chunk, block_size, device) for chunk in chunks if chunk.num_source_tokens),
    )


def num_source_tokens(chunk: Chunk) -> int:
    """Tokens that a chunk's rows attend over across."""
    assert chunk.sequence.source is not None, "a model with an encoder has nothing to read"
    return len(chunk.sequence.source.token_ids)


def across(
    tables: np.ndarray,  # [num_rows, max_num_blocks] int32
    lengths: np.ndarray,  # [num_rows]: tokens of each row's source
    block_size: int,
    device: torch.device,
) -> AttentionBatch:
    """Return the batch in which each row of a step is a decode of its own, whose context is its source."""
    num_rows = len(tables)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return on_device(torch.from_numpy(array.astype(np.int32)), device)

    return AttentionBatch(
        slots=tensor(np.full(num_rows, SCRATCH_BLOCK * block_size)),
        block_tables=tensor(tables),
        query_starts=tensor(np.arange(num_rows + 1)),
        context_lens=tensor(lengths),
        max_query_len=1,
        max_context_len=int(lengths.max()),
    )


def _rows(chunk: Chunk, block_size: int, device: torch.device) -> SourceRows:
    source, blocks = chunk.sequence.source, chunk.sequence.source_block_ids
    assert source is not None
    return source_rows(np.array(source.token_ids), np.array(blocks), block_size, device)


def source_rows(token_ids: np.ndarray, blocks: np.ndarray, block_size: int, device: torch.device) -> SourceRows:
    """Lay out a source that is to be read into blocks of its own."""
    places = np.arange(len(token_ids))
    slots = (blocks[places // block_size] * block_size + places % block_size).astype(np.int32)
    return SourceRows(
        on_device(torch.from_numpy(token_ids.astype(np.int64))[None], device),
        on_device(torch.from_numpy(slots), device),
    )
