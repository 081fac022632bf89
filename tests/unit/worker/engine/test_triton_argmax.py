"""The Triton kernels that find the largest score of each row; through Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from tests.builders_triton import DEVICE
from worker.engine.kernels.triton.argmax import argmax

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 200, 4096, 9001])
def test_it_is_torch_s_and_of_equal_scores_the_first(width: int, dtype: torch.dtype) -> None:
    scores = torch.randn(5, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    scores[1] = -3.0  # all equal
    scores[2, width // 2 :] = scores.max() + 1
    assert argmax(scores.to(DEVICE)).tolist() == scores.float().argmax(-1).tolist()
    assert argmax(scores.to(DEVICE))[1] == 0


@pytest.mark.parametrize(("value", "others"), [(INF, 1.0), (NAN, 1.0), (NAN, -INF), (-INF, -INF)])
def test_a_row_whose_largest_score_is_not_finite_is_told_by_the_sign(value: float, others: float) -> None:
    scores = torch.full((3, 5000), others)
    scores[1, 4500] = value
    scores[[0, 2], 7] = 2.0
    found = argmax(scores.to(DEVICE)).tolist()
    assert (found[0], found[2]) == (7, 7)
    assert found[1] < 0
    assert ~found[1] < 5000


def test_rows_may_lie_apart_and_there_may_be_none() -> None:
    scores = torch.randn(6, 300).to(DEVICE)
    assert argmax(scores[::2, 10:210]).tolist() == scores[::2, 10:210].argmax(-1).tolist()
    assert argmax(scores[:0]).tolist() == []
