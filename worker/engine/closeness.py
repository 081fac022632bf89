"""How far logits may move and still count as the same, for the checks that are made when a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

# Largest relative error that counts as rounding, by the formats that models are served in. Rounding is near 1e-6 in
# fp32 and reaches a few hundredths in bfloat16; a wrong result is near 1.
TOLERANCE: Final[Mapping[torch.dtype, float]] = {torch.float32: 1e-4, torch.bfloat16: 0.15}
# The same where each layer's inputs are rounded to 8 bits: what attention rounds otherwise grows from layer to layer.
FP8_TOLERANCE: Final = 0.4


@dataclass(frozen=True, slots=True)
class Closeness:
    """A passed comparison: `relative_error` found, and the largest allowed."""

    error: float
    tolerance: float


def relative_error(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """Return how far logits [num_tokens, vocab_size] are from the expected ones, relative to each row's spread.

    In fp32 the worst row counts. In bfloat16 it is the median row, since rounding may send a token to another
    expert. NaN if any row of those is NaN.
    """
    errors = (actual - expected).norm(dim=-1) / (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return float(errors.max() if dtype == torch.float32 else errors.median())
