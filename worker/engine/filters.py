"""Filters of a sampled row: which of its most probable tokens may be drawn. transformers' warpers, in its order.

    top_h, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff      each over what the ones before it left

They look at the *candidates*, a row's largest scores, and never sort the vocabulary. Of the tokens beyond these a row
knows one of three things, and each filter needs or changes that:

    open        all of them are kept so far: their probability is known from the whole row's sum of exponentials
    closed      none of them is kept: the candidates are all there is
    undecided   some may be kept: the row is to be filtered again, with more candidates

All filters but typical_p keep the most probable tokens, so they close a row as soon as they drop its last candidate.
typical_p keeps tokens whose surprise is near the row's entropy, possibly not the first ones; it closes a row if what it
keeps is nearer than any token beyond the candidates can be.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Final

import torch

from common.generation import SamplingParams
from worker.engine.transfer import on_device

_NEG_INF: Final = float("-inf")
_TOP_H_TOKENS: Final = 100  # top_h chooses among so many, in transformers


def is_unfiltered(params: SamplingParams) -> bool:
    """Whether every token may be drawn."""
    return (
        params.top_k == 0
        and params.top_p >= 1
        and params.min_p == 0
        and params.top_h == 0
        and params.typical_p >= 1
        and params.epsilon_cutoff == 0
        and params.eta_cutoff == 0
    )


@dataclass(frozen=True, slots=True)
class Filters:
    """Parameters of the sampled rows, each [num_rows, 1]."""

    params: Rows[SamplingParams]
    temperature: torch.Tensor  # float32, as the scores
    top_k: torch.Tensor  # int64, 0 is off
    top_p: torch.Tensor  # float64, as the rest; 1 is off
    min_p: torch.Tensor  # 0 is off
    top_h: torch.Tensor  # 0 is off
    typical_p: torch.Tensor  # 1 is off
    epsilon: torch.Tensor  # 0 is off
    eta: torch.Tensor  # 0 is off

    @classmethod
    def of(cls, params: Rows[SamplingParams], device: torch.device) -> Filters:
        values = [
            [p.temperature, p.top_k, p.top_p, p.min_p, p.top_h, p.typical_p, p.epsilon_cutoff, p.eta_cutoff]
            for p in params
        ]
        table = on_device(torch.tensor(values, dtype=torch.float64), device)
        temperature, top_k, *others = (table[:, i : i + 1] for i in range(table.shape[-1]))
        return cls(params, temperature.float(), top_k.long(), *others)

    def of_rows(self, rows: Rows[int]) -> Filters:
        return Filters.of([self.params[i] for i in rows], self.temperature.device)

    def any(self, asks: Callable[[SamplingParams], bool]) -> bool:
        return any(map(asks, self.params))


class _Rows:
    """What the filters so far left of the rows."""

    def __init__(self, scores: torch.Tensor, top: torch.Tensor, filters: Filters) -> None:
        self.top = top
        self.keep = top > _NEG_INF
        num_candidates, vocab_size = top.shape[-1], scores.shape[-1]
        # Beyond a candidate that is forbidden there are only others.
        self.closed = ~self.keep[:, -1:] if num_candidates < vocab_size else torch.ones_like(self.keep[:, -1:])
        self.undecided = torch.zeros_like(self.closed)
        of_all, entropies = _of_all(scores, filters)
        self._of_all = of_all  # [num_rows, 1] float64: logsumexp of whole rows that some filter may find open
        self._entropies = entropies  # likewise, entropy

    def apply(self, is_on: torch.Tensor, passes: torch.Tensor) -> None:
        """A filter that keeps the most probable tokens: `is_on` [num_rows, 1], `passes` [num_rows, num_candidates]."""
        self.keep &= passes | ~is_on
        self.closed |= ~self.keep[:, -1:]
        self.undecided |= is_on & ~self.closed

    def kept(self) -> torch.Tensor:
        """The scores that are left, others -inf."""
        return self.top.masked_fill(~self.keep, _NEG_INF)

    def logprobs(self, kept: torch.Tensor) -> torch.Tensor:
        """Of the candidates, among all that is left; -inf for those that are not."""
        return kept - torch.where(self.closed, kept.logsumexp(-1, keepdim=True), self._of_all)

    def entropy(self, logprobs: torch.Tensor) -> torch.Tensor:
        """[num_rows, 1], of what is left."""
        return torch.where(self.closed, -(logprobs.exp() * logprobs).nansum(-1, keepdim=True), self._entropies)


def filter_candidates(scores: torch.Tensor, top: torch.Tensor, filters: Filters) -> tuple[torch.Tensor, torch.Tensor]:
    """Which candidates survive [num_rows, K], and in which rows [num_rows] that is known, and no other token does.

    `scores` [num_rows, vocab_size] are divided by the temperature already; `top` float64 holds the candidates' scores
    in descending order. Of equal scores at the edge of top_p, as in transformers, any may fall out.
    """
    rows = _Rows(scores, top, filters)
    if filters.any(lambda p: p.top_h > 0):
        _apply_top_h(rows, filters)
    if filters.any(lambda p: p.top_k > 0):
        kth = rows.kept().gather(1, filters.top_k.clamp(1, top.shape[-1]) - 1)
        # Ties of the kth stay. More than there are candidates: the last one is kept, and the row undecided.
        rows.apply(filters.top_k > 0, top >= kth)
    if filters.any(lambda p: p.top_p < 1):
        # transformers drops by ascending cumulated probability <= 1 - top_p, which is the same as keeping while the
        # probability of all larger ones is < top_p.
        probs = rows.logprobs(rows.kept()).exp()
        rows.apply(filters.top_p < 1, probs.cumsum(-1) - probs < filters.top_p)
    if filters.any(lambda p: p.min_p > 0):
        rows.apply(filters.min_p > 0, (top - top[:, :1]).exp() >= filters.min_p)
    if filters.any(lambda p: p.typical_p < 1):
        _apply_typical_p(rows, filters.typical_p)
    if filters.any(lambda p: p.epsilon_cutoff > 0):
        kept = rows.kept()
        passes = (rows.logprobs(kept).exp() >= filters.epsilon) | (kept >= kept.amax(-1, keepdim=True))
        rows.apply(filters.epsilon > 0, passes)
    if filters.any(lambda p: p.eta_cutoff > 0):
        kept = rows.kept()
        logprobs = rows.logprobs(kept)
        least = torch.minimum(filters.eta, filters.eta.sqrt() * (-rows.entropy(logprobs)).exp())
        rows.apply(filters.eta > 0, (logprobs.exp() >= least) | (kept >= kept.amax(-1, keepdim=True)))
    return rows.keep, (rows.closed & ~rows.undecided)[:, 0]


def _apply_top_h(rows: _Rows, filters: Filters) -> None:
    """Keep the most probable of the top 100 while their cumulated entropy is at most top_h of all of theirs.

    In float32 and by the steps of transformers' Categorical: with top_h 1 both sums are of the same terms.
    """
    top = rows.top[:, :_TOP_H_TOKENS].float()
    logits = top - top.logsumexp(-1, keepdim=True)
    probs = logits.softmax(-1)
    entropy = -(logits.clamp(min=torch.finfo(logits.dtype).min) * probs).sum(-1)
    most = (entropy * filters.top_h[:, 0].float())[:, None]
    passes = torch.zeros_like(rows.keep)
    passes[:, : top.shape[-1]] = (-probs * probs.log()).cumsum(-1) <= most
    passes[:, 0] = True
    is_on = filters.top_h > 0
    rows.keep &= passes | ~is_on
    rows.closed |= is_on


def _apply_typical_p(rows: _Rows, mass: torch.Tensor) -> None:
    """Keep the tokens whose surprise is nearest to the entropy, until they have this probability."""
    is_on = mass < 1
    logprobs = rows.logprobs(rows.kept())
    entropy = rows.entropy(logprobs)
    distance = (-logprobs - entropy).abs()
    ordered, order = distance.sort(-1)
    cumulated = logprobs.exp().gather(1, order).cumsum(-1)
    num_before = (cumulated < mass).sum(-1, keepdim=True)
    farthest = ordered.gather(1, num_before.clamp(max=ordered.shape[-1] - 1))
    # No token beyond the candidates is less surprising than the last of them.
    nearest_beyond = -logprobs[:, -1:] - entropy
    is_sure = (num_before < ordered.shape[-1]) & (farthest < nearest_beyond)
    rows.keep &= (distance <= farthest) | ~is_on
    rows.undecided |= is_on & ~rows.closed & ~is_sure
    rows.closed |= is_on & is_sure


def _of_all(scores: torch.Tensor, filters: Filters) -> tuple[torch.Tensor, torch.Tensor]:
    """logsumexp and entropy [num_rows, 1] float64 of the whole rows that need them, 0 elsewhere."""
    of_all = torch.zeros(len(scores), 1, dtype=torch.float64, device=scores.device)
    entropies = of_all.clone()
    weighed = [i for i, p in enumerate(filters.params) if _weighs_all(p)]
    if weighed:
        part, index = _select(scores, weighed)
        sums = part.logsumexp(-1, keepdim=True)
        of_all.index_copy_(0, index, sums.double())
    spread = [i for i in weighed if _spreads_over_all(filters.params[i])]
    if spread:
        part, index = _select(scores, spread)
        logprobs = part - of_all.index_select(0, index).float()
        entropies.index_copy_(0, index, -(logprobs.exp() * logprobs).nansum(-1, keepdim=True).double())
    return of_all, entropies


def _select(scores: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    index = on_device(torch.tensor(rows), scores.device)
    return scores if len(rows) == len(scores) else scores.index_select(0, index), index


def _weighs_all(params: SamplingParams) -> bool:
    """Whether a filter may ask for probabilities while the row is open."""
    asks = params.top_p < 1 or params.typical_p < 1 or params.epsilon_cutoff > 0 or params.eta_cutoff > 0
    return asks and params.top_k == 0 and params.top_h == 0


def _spreads_over_all(params: SamplingParams) -> bool:
    """Whether a filter may ask for the entropy while the row is open."""
    return (params.typical_p < 1 or params.eta_cutoff > 0) and params.top_p >= 1 and params.min_p == 0
