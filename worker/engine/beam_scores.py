"""The best continuations of beams, from the logits of a mixed batch.

Each row's log-probabilities are edited as its request asks (`edits.py`), then the largest few of each row are taken in
one pass over all rows, without sorting the vocabulary; what is the best over the beams of one request is chosen among
these on the host (`beams.py`). Rows of other requests pay nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Protocol

import torch

from common.generation import SamplingParams
from worker.engine.edits import edit_scores
from worker.engine.history import TokenHistory
from worker.engine.transfer import on_device, to_device

_NEG_INF = float("-inf")


class Beam(Protocol):
    """What a row of logits belongs to."""

    @property
    def sampling(self) -> SamplingParams: ...
    @property
    def history(self) -> TokenHistory | None: ...


@dataclass(frozen=True, slots=True)
class PlainRow:
    """What the sampler sees in the place of a beam: a row that costs no more than a look whether it is valid."""

    sampling: SamplingParams
    output_index: int
    num_tokens: int
    history: None = None
    matcher: None = None


@torch.inference_mode()
def best_continuations(
    logits: torch.Tensor, beams: Rows[Beam], totals: Rows[float], num_best: int
) -> list[list[tuple[float, int]]]:
    """Return of each beam its best continuations, at most `num_best`: sums of log-probabilities with token ids.

    `logits` is [num_beams, vocab_size], any float type, not changed; `totals` are the sums so far. A sum of -inf is a
    token that may not come; one of NaN comes from invalid logits.
    """
    scores = logits.float()
    count = min(num_best, scores.shape[-1])
    if any(beam.history is not None for beam in beams):
        scores = scores.log_softmax(-1)
        _edit(scores, beams)
        best, ids = scores.topk(count, dim=-1)
    else:
        best, ids = scores.topk(count, dim=-1)
        best = best - scores.logsumexp(-1, keepdim=True)
    best = best + on_device(torch.tensor(totals, dtype=torch.float32), best.device)[:, None]
    table = torch.cat([best.double(), ids.double()], dim=-1).cpu().tolist()
    return [[(row[i], int(row[count + i])) for i in range(count)] for row in table]


def _edit(scores: torch.Tensor, beams: Rows[Beam]) -> None:
    edited = [i for i, beam in enumerate(beams) if beam.history is not None]
    index = to_device(edited, scores.device)
    part = scores[index]
    edit_scores(part, [beams[i] for i in edited])
    again = [k for k, i in enumerate(edited) if beams[i].sampling.renormalize_logits]
    if again:
        rows = to_device(again, scores.device)
        # Of a row that allows nothing no probabilities are left: it stays as it is.
        normalized = part[rows].log_softmax(-1)
        part[rows] = normalized.masked_fill_(normalized.isnan(), _NEG_INF)
    scores[index] = part
