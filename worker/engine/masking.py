"""Masks of allowed tokens, applied to scores: which rows need it, and the doing."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Final, Protocol

import numpy as np
import torch

from common.generation import SamplingParams
from worker.engine.grammar import TokenMasks
from worker.engine.history import TokenHistory
from worker.engine.transfer import on_device

_NEG_INF: Final = float("-inf")


class MaskableRow(Protocol):
    """What a row of logits belongs to."""

    @property
    def sampling(self) -> SamplingParams: ...
    @property
    def history(self) -> TokenHistory | None: ...


def rows_to_mask(masks: TokenMasks | None, rows: Rows[MaskableRow], best: list[int] | None) -> set[int]:
    """The rows whose token depends on their mask: not those that take the largest logit, which it allows.

    That is what most constrained greedy rows of a model do that knows the form by itself. `best`, each row's token of
    the largest logit, is unknown where a look at it would wait for the device.
    """
    if masks is None:
        return set()
    if best is None:
        return set(masks.rows)
    return {
        i
        for k, i in enumerate(masks.rows)
        if rows[i].history is not None or rows[i].sampling.temperature > 0 or not masks.allows(k, best[i])
    }


def apply_masks(scores: torch.Tensor, masks: TokenMasks) -> None:
    """Leave each masked row of scores [num_rows, vocab_size] nothing but the tokens of its mask, in place."""
    if not masks.rows:
        return
    vocab_size = scores.shape[-1]
    if scores.device.type == "cpu":
        bits = np.unpackbits(masks.words.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        forbidden = torch.from_numpy(bits) == 0
    else:  # so that an eighth of a byte per token goes to the device
        words = on_device(torch.from_numpy(masks.words), scores.device)
        places = torch.arange(32, dtype=torch.int32, device=scores.device)
        forbidden = ((words[:, :, None] >> places) & 1 == 0).flatten(1)[:, :vocab_size]
    if len(masks.rows) == len(scores):
        scores.masked_fill_(forbidden, _NEG_INF)
        return
    index = on_device(torch.tensor(masks.rows), scores.device)
    scores.index_copy_(0, index, scores[index].masked_fill_(forbidden, _NEG_INF))
