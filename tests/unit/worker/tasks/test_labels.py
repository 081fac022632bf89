from __future__ import annotations

import numpy as np
import pytest
import torch

from common.tasks import ScoreFunction
from worker.tasks.labels import best_labels, ranked, scores_of
from worker.tasks.pooling import Pooling, pool

LOGITS = np.array([0.5, 3.0, -2.0, 3.0], np.float32)


def test_scores_are_those_of_torch() -> None:
    tensor = torch.tensor(LOGITS).double()
    assert np.allclose(scores_of(LOGITS, ScoreFunction.SOFTMAX), tensor.softmax(-1))
    assert np.allclose(scores_of(LOGITS, ScoreFunction.SIGMOID), tensor.sigmoid())
    assert np.allclose(scores_of(LOGITS, ScoreFunction.NONE), tensor)
    huge = np.array([1e4, -1e4], np.float32)
    for function in ScoreFunction:
        assert np.isfinite(scores_of(huge, function)).all()


def test_the_best_come_first_and_equal_ones_in_the_model_s_order() -> None:
    found = best_labels(LOGITS, "abcd", ScoreFunction.SIGMOID, 0)
    assert [one.label for one in found] == ["b", "d", "a", "c"]
    assert [one.label for one in best_labels(LOGITS, "abcd", ScoreFunction.SOFTMAX, 2)] == ["b", "d"]
    assert [index for index, _ in ranked(LOGITS, ScoreFunction.SIGMOID, 3)] == [1, 3, 0]
    assert ranked(LOGITS[:1], ScoreFunction.NONE, 0) == ((0, 0.5),)


@pytest.mark.parametrize("pooling", list(Pooling))
def test_padding_is_not_pooled(pooling: Pooling) -> None:
    hidden = torch.randn(3, 7, 5)
    lengths = torch.tensor([7, 1, 4])
    together = pool(hidden, lengths, pooling)
    for row, length in enumerate(lengths.tolist()):
        own = hidden[row, :length]
        expected = {
            Pooling.MEAN: own.mean(0),
            Pooling.CLS: own[0],
            Pooling.MAX: own.amax(0),
            Pooling.LAST: own[-1],
            Pooling.MEAN_SQRT_LEN: own.sum(0) / length**0.5,
        }[pooling]
        assert torch.allclose(together[row], expected, atol=1e-6)
