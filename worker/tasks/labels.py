"""Logits of whole texts as scores, and the best of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from common.tasks import LabelScore, ScoreFunction

Array = npt.NDArray[np.float32]


def scores_of(logits: Array, function: ScoreFunction) -> npt.NDArray[np.float64]:
    """Return scores of the last axis."""
    wide = logits.astype(np.float64)
    match function:
        case ScoreFunction.NONE:
            return wide
        case ScoreFunction.SIGMOID:
            return np.asarray(np.exp(-np.logaddexp(0.0, -wide)))
        case ScoreFunction.SOFTMAX:
            return softmax(wide)


def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Over the last axis; -inf is 0."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def best_labels(logits: Array, labels: Sequence[str], function: ScoreFunction, top_k: int) -> tuple[LabelScore, ...]:
    """Return the best `top_k` labels (0: all) of logits [num_labels]; of equal ones the first in the model's order."""
    scores = scores_of(logits, function)
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    return tuple(LabelScore(labels[i], float(scores[i])) for i in order)


def ranked(logits: Array, function: ScoreFunction, top_n: int) -> tuple[tuple[int, float], ...]:
    """Return the best `top_n` documents (0: all) by logits [num_documents]; of equal ones the first."""
    scores = scores_of(logits[:, None], function)[:, 0]
    order = np.argsort(-logits, kind="stable")[: top_n or None]
    return tuple((int(i), float(scores[i])) for i in order)
