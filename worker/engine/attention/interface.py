"""What an attention back-end is, and what it is told about a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of one layer's keys and values."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, all blocks. The layout inside a block belongs to the back-end that allocated it."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the tokens of a step stand: `num_seqs` sequences packed behind one another into `num_tokens` rows.

    Sequence i owns rows query_starts[i]:query_starts[i+1], the last rows of its context of context_lens[i] tokens. In a
    step that is padded, sequences without a row or a context come last, and then rows that are no sequence's: their
    keys and values go to the scratch block, and what attention returns for them is undefined.
    """

    # [num_tokens] int32: block_id * block_size + offset, where each row's key and value are written
    slots: torch.Tensor
    block_tables: torch.Tensor  # [num_seqs, max_num_blocks] int32; entries behind a sequence's last block are not read
    query_starts: torch.Tensor  # [num_seqs + 1] int32
    context_lens: torch.Tensor  # [num_seqs] int32, this step's rows included
    max_query_len: int
    max_context_len: int


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a layer asks of attention besides its tensors."""

    scale: float
    sliding_window: int | None = None  # a row sees its last `sliding_window` tokens, itself included
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: torch.Tensor | None = None  # [num_heads]: a logit per head that joins the softmax and is dropped (gpt_oss)
    # [num_heads, num_distances] float32: added to a score by how far the key is behind the row, the last one for all
    # that are farther (T5). Not every back-end knows it; one that does not refuses it.
    distance_bias: torch.Tensor | None = None


class AttentionBackend(Protocol):
    """Writes a step's keys and values into the cache and attends over it. Causal; query heads may share kv heads."""

    name: str
    block_size: int

    def allocate(self, shape: LayerShape, num_blocks: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """Return the cache of one layer; block 0 is a scratch block that is never handed out."""
        ...

    def attend(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, key_dim], any strides but a contiguous last dimension
        key: torch.Tensor,  # [num_tokens, num_kv_heads, key_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, value_dim]
        cache: LayerCache,
        batch: AttentionBatch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Return [num_tokens, num_heads, value_dim], contiguous, in query's dtype."""
        ...
