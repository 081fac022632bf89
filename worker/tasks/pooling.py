"""One vector of a text from its tokens': the ways that sentence-transformers' models are trained with."""

from __future__ import annotations

from enum import StrEnum

import torch


class Pooling(StrEnum):
    """How a text's vector is made."""

    MEAN = "mean"
    CLS = "cls"  # the first token's
    MAX = "max"
    LAST = "last"  # the last token's
    MEAN_SQRT_LEN = "mean_sqrt_len"  # the sum over the square root of the length


def pool(hidden: torch.Tensor, lengths: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Return [num_texts, size] of `hidden` [num_texts, num_tokens, size]; a text's tokens are its first `lengths`."""
    match pooling:
        case Pooling.CLS:
            return hidden[:, 0]
        case Pooling.LAST:
            return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    inside = torch.arange(hidden.shape[1], device=hidden.device)[None] < lengths[:, None]
    if pooling is Pooling.MAX:
        return hidden.masked_fill(~inside[:, :, None], float("-inf")).amax(1)
    total = torch.einsum("nth,nt->nh", hidden, inside.to(hidden.dtype))
    count = lengths[:, None].to(hidden.dtype)
    return total / (count if pooling is Pooling.MEAN else count.sqrt())
