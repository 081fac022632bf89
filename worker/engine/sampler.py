"""The sampler: from the logits of a mixed batch to one token per row, without sorting the vocabulary.

Rows are told apart by what they ask for, and pay only for that:

    greedy                       argmax
    penalties                    a copy of the row, changed at the tokens seen or banned only
    top_k, top_p, min_p          the CANDIDATES largest scores; all filters work on those
    a grammar                    a copy of the row, without the tokens that may not come next
    none of the three            the candidates, then the few other tokens whose noise could beat them
    filter wider than that       eight times as many candidates, and so on

Processors and filters are transformers' own, in its order: repetition_penalty, no_repeat_ngram_size, temperature,
top_k, top_p, min_p (`generation/logits_process.py`). Tokens are drawn with the noise of `noise.py`, hence reproducibly.

On a GPU a look at a result waits for the device. There the choice is made without one, rows without filters from the
whole vocabulary at once, and everything comes to the host in one copy; only rows that turn out to need more candidates
are drawn again.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import numpy as np
import torch

from common.generation import SamplingParams
from worker.engine.grammar import TokenMasks
from worker.engine.history import TokenHistory
from worker.engine.noise import gumbel, least_hash, ordered_hash, row_key

CANDIDATES: Final = 256
_CPU_CHUNK: Final = 1 << 17  # hashes at a time: all temporaries stay in the second-level cache
_DEVICE_CHUNK: Final = 1 << 25
_NEG_INF: Final = float("-inf")

# [num_rows, vocab_size] to [num_rows] int64: the largest score's token, or ~token where that score is not finite.
Argmax: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class LogitRow(Protocol):
    """What a row of logits belongs to: a sequence, or one as it would be if its drafts were tokens."""

    @property
    def sampling(self) -> SamplingParams: ...
    @property
    def output_index(self) -> int: ...
    @property
    def num_tokens(self) -> int:
        """Position of the token to be chosen."""
        ...

    @property
    def history(self) -> TokenHistory | None: ...


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One token per row of the logits."""

    token_ids: list[int]
    logprobs: dict[int, float]  # by row, for rows that asked: of the raw logits, before penalties and temperature
    invalid_rows: list[int]  # logits with NaN or infinity as their largest; the token means nothing


@dataclass(frozen=True, slots=True)
class _Filters:
    """Parameters of the sampled rows, each [num_rows, 1]."""

    temperature: torch.Tensor  # float32, as the scores
    top_k: torch.Tensor  # int64, 0 is off
    top_p: torch.Tensor  # float64, 1 is off
    min_p: torch.Tensor  # float64, 0 is off
    any_top_p: bool  # some row's may be below 1

    @classmethod
    def of(cls, rows: Rows[LogitRow], device: torch.device) -> _Filters:
        params = [row.sampling for row in rows]
        values = [[p.temperature, p.top_k, p.top_p, p.min_p] for p in params]
        table = _on_device(torch.tensor(values, dtype=torch.float64), device)
        any_top_p = any(p.top_p < 1 for p in params)
        return cls(table[:, 0:1].float(), table[:, 1:2].long(), table[:, 2:3], table[:, 3:4], any_top_p)

    def of_rows(self, index: torch.Tensor) -> _Filters:
        return _Filters(
            self.temperature[index], self.top_k[index], self.top_p[index], self.min_p[index], self.any_top_p
        )

    @property
    def are_off(self) -> torch.Tensor:
        """[num_rows] bool"""
        return ((self.top_k == 0) & (self.top_p >= 1) & (self.min_p == 0))[:, 0]


class Sampler:
    """Stateless but for constants of its device."""

    def __init__(self, device: torch.device, argmax: Argmax | None = None, *, may_wait: bool | None = None) -> None:
        """`argmax` takes torch's place over the vocabulary where there is a faster one.

        `may_wait` is whether results may be looked at on the way; default: where that costs nothing, on a CPU.
        """
        self._device = device
        self._argmax: Argmax = argmax or _argmax
        self._may_wait = device.type == "cpu" if may_wait is None else may_wait
        self._vocabulary = torch.empty(0, dtype=torch.int32, device=device)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, rows: Rows[LogitRow], masks: TokenMasks | None = None) -> SampledTokens:
        """Choose the token of each row. `logits` is [num_rows, vocab_size], any float type, not changed.

        A row with a mask gets one of the tokens that this allows, unless all of those are forbidden otherwise.
        """
        sampled = self._sample(logits, rows, masks, self._may_wait)
        again = [i for i, token_id in enumerate(sampled.token_ids) if token_id < 0]
        if not again:
            return sampled
        index = _on_device(torch.tensor(again), self._device)
        masks = masks.of(again) if masks is not None else None
        widened = self._sample(logits[index], [rows[i] for i in again], masks, may_wait=True)
        for i, token_id in zip(again, widened.token_ids, strict=True):
            sampled.token_ids[i] = token_id
        sampled.logprobs.update((again[i], logprob) for i, logprob in widened.logprobs.items())
        return sampled

    def _sample(
        self, logits: torch.Tensor, rows: Rows[LogitRow], masks: TokenMasks | None, may_wait: bool
    ) -> SampledTokens:
        """One copy from the device at the end. A negative token stands for a row that needs more candidates."""
        scores = logits.float()
        best = self._argmax(scores)
        masked = _rows_to_mask(masks, rows, best.tolist() if masks is not None and may_wait else None)
        penalised = [i for i, row in enumerate(rows) if row.history is not None or i in masked]
        free = [i for i, row in enumerate(rows) if row.history is None and i not in masked]
        sampled = [i for i in free if rows[i].sampling.temperature > 0]
        wanted = [i for i, row in enumerate(rows) if row.sampling.logprobs]
        if not (penalised or sampled or wanted):  # a small step's time is felt: nothing but what it needs
            found = best.tolist()
            return SampledTokens(
                token_ids=[token_id if token_id >= 0 else ~token_id for token_id in found],
                logprobs={},
                invalid_rows=[i for i, token_id in enumerate(found) if token_id < 0],
            )
        is_valid = best >= 0
        tokens = torch.where(is_valid, best, ~best)
        if penalised or sampled:
            penalised.sort(key=lambda i: rows[i].sampling.temperature > 0)  # greedy ones first
            order = penalised + sampled
            index = _on_device(torch.tensor(order), self._device)
            changed = masks.of(order) if masks is not None else None
            chosen = self._sample_rows(scores[index], [rows[i] for i in order], len(penalised), changed, may_wait)
            tokens.index_copy_(0, index, chosen)
        results = [tokens.double(), is_valid.double()]
        if wanted:
            results.append(self._logprobs(scores, tokens, wanted))
        sizes = [len(result) for result in results]
        token_ids, validity, *logprobs = torch.split(torch.cat(results).cpu(), sizes)
        return SampledTokens(
            token_ids=[int(token_id) for token_id in token_ids.tolist()],
            logprobs=dict(zip(wanted, logprobs[0].tolist(), strict=True)) if wanted else {},
            invalid_rows=[i for i, valid in enumerate(validity.tolist()) if not valid],
        )

    def _sample_rows(
        self,
        scores: torch.Tensor,
        rows: Rows[LogitRow],
        num_penalised: int,
        masks: TokenMasks | None,
        may_wait: bool,
    ) -> torch.Tensor:
        """Penalised and masked rows first, greedy ones before sampled ones. Overwrites `scores`."""
        if num_penalised:
            _penalise(scores, rows[:num_penalised])
        if masks is not None and masks.rows:
            _forbid(scores, masks)
        num_greedy = sum(1 for row in rows if row.sampling.temperature == 0)
        if num_greedy == len(rows):
            return scores.argmax(-1)
        drawn = self._draw(scores[num_greedy:], rows[num_greedy:], may_wait)
        return torch.cat([scores[:num_greedy].argmax(-1), drawn]) if num_greedy else drawn

    def _draw(self, scores: torch.Tensor, rows: Rows[LogitRow], may_wait: bool) -> torch.Tensor:
        filters = _Filters.of(rows, self._device)
        words = [row_key(row.sampling.seed, row.output_index, row.num_tokens) for row in rows]
        keys = _on_device(torch.tensor(words, dtype=torch.int32), self._device)
        scores /= filters.temperature
        if may_wait:
            return self._draw_among(CANDIDATES, scores, keys, filters)
        return self._draw_without_waiting(scores, keys, filters, rows)

    def _draw_without_waiting(
        self, scores: torch.Tensor, keys: torch.Tensor, filters: _Filters, rows: Rows[LogitRow]
    ) -> torch.Tensor:
        """Draw filtered rows from the candidates, -1 where those do not suffice, and the others from all tokens."""
        top, ids = scores.topk(min(CANDIDATES, scores.shape[-1]), dim=-1)
        top = top.double()
        keep, is_complete = _filter_candidates(scores, top, filters)
        noisy = (top + gumbel(ordered_hash(keys, ids.int()))).masked_fill_(~keep, _NEG_INF)
        drawn = torch.where(is_complete, ids.gather(1, noisy.argmax(-1, keepdim=True))[:, 0], -1)
        unfiltered = [
            i for i, p in enumerate(row.sampling for row in rows) if p.top_k == 0 and p.top_p >= 1 and p.min_p == 0
        ]
        chunk = max(1, _DEVICE_CHUNK // scores.shape[-1])
        vocabulary = self._all_ids(scores.shape[-1])
        for start in range(0, len(unfiltered), chunk):
            index = _on_device(torch.tensor(unfiltered[start : start + chunk]), self._device)
            totals = gumbel(ordered_hash(keys[index], vocabulary)).add_(scores[index])
            drawn.index_copy_(0, index, totals.argmax(-1))
        return drawn

    def _all_ids(self, vocab_size: int) -> torch.Tensor:
        if len(self._vocabulary) != vocab_size:
            self._vocabulary = torch.arange(vocab_size, dtype=torch.int32, device=self._device)
        return self._vocabulary

    def _draw_among(
        self, num_candidates: int, scores: torch.Tensor, keys: torch.Tensor, filters: _Filters
    ) -> torch.Tensor:
        """Draw from the largest scores; rows that turn out to need more of them get more."""
        top, ids = scores.topk(min(num_candidates, scores.shape[-1]), dim=-1)  # descending
        top = top.double()
        keep, is_complete = _filter_candidates(scores, top, filters)
        noisy = (top + gumbel(ordered_hash(keys, ids.int()))).masked_fill_(~keep, _NEG_INF)
        best, at = noisy.max(-1)
        drawn = ids.gather(1, at[:, None])[:, 0]
        if bool(is_complete.all()):
            return drawn
        is_unfiltered = filters.are_off
        everything = (is_unfiltered & ~is_complete).nonzero()[:, 0]
        if len(everything):
            drawn[everything] = self._draw_from_all(
                scores[everything], keys[everything], best[everything], drawn[everything], bound=top[everything, -1]
            )
        wider = (~is_unfiltered & ~is_complete).nonzero()[:, 0]
        if len(wider):
            drawn[wider] = self._draw_among(8 * num_candidates, scores[wider], keys[wider], filters.of_rows(wider))
        return drawn

    def _draw_from_all(
        self, scores: torch.Tensor, keys: torch.Tensor, best: torch.Tensor, best_ids: torch.Tensor, bound: torch.Tensor
    ) -> torch.Tensor:
        """Finish the draw of rows without filters.

        `best` [num_rows] is the largest score plus noise among the candidates, `bound` the score that no other token
        exceeds: only a token with noise above best - bound can win, and few have that. So all tokens are hashed, but
        logarithms are taken of few.
        """
        vocab_size = scores.shape[-1]
        vocabulary = self._all_ids(vocab_size)
        drawn = best_ids.clone()
        chunk = max(1, (_CPU_CHUNK if self._device.type == "cpu" else _DEVICE_CHUNK) // vocab_size)
        for start in range(0, len(scores), chunk):
            part = slice(start, start + chunk)
            hashes = ordered_hash(keys[part], vocabulary)
            row, token = (hashes >= least_hash(best[part] - bound[part])[:, None]).nonzero(as_tuple=True)
            totals = scores[part][row, token].double() + gumbel(hashes[row, token])
            # The largest of each row's few; of equal ones the smallest id.
            largest = best[part].scatter_reduce(0, row, totals, "amax")
            wins = (totals == largest[row]) & (totals > best[part][row])
            nobody = torch.full_like(drawn[part], vocab_size)
            winner = nobody.scatter_reduce(0, row[wins], token[wins], "amin")
            drawn[part] = torch.where(winner < vocab_size, winner, drawn[part])
        return drawn

    def _logprobs(self, scores: torch.Tensor, tokens: torch.Tensor, wanted: list[int]) -> torch.Tensor:
        """[len(wanted)] float64, of these rows' tokens."""
        index = _on_device(torch.tensor(wanted), self._device)
        picked = scores[index]
        chosen = tokens[index, None].clamp(min=0)  # a row that is drawn again gets its own later
        return (picked.gather(1, chosen)[:, 0] - picked.logsumexp(-1)).double()


def _argmax(scores: torch.Tensor) -> torch.Tensor:
    tokens = scores.argmax(-1)  # a NaN counts as the largest
    return torch.where(scores.gather(1, tokens[:, None])[:, 0].isfinite(), tokens, ~tokens)


def _on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy from the host without waiting for what the device does."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _penalise(scores: torch.Tensor, rows: Rows[LogitRow]) -> None:
    """Repetition penalty, then banned n-grams, in place; touches only the tokens concerned."""
    vocab_size = scores.shape[-1]
    flat = scores.view(-1)
    seen, penalties, banned = [], [], []
    for i, row in enumerate(rows):
        if row.history is None:
            continue
        if row.history.seen_ids:
            ids = np.frombuffer(row.history.seen_ids, dtype=np.int32)
            seen.append(ids[ids < vocab_size].astype(np.int64) + i * vocab_size)
            penalties.append(np.full(len(seen[-1]), row.sampling.repetition_penalty, dtype=np.float32))
        banned += [i * vocab_size + token_id for token_id in row.history.banned_ids() if token_id < vocab_size]
    if seen:
        index = _on_device(torch.from_numpy(np.concatenate(seen)), scores.device)
        penalty = _on_device(torch.from_numpy(np.concatenate(penalties)), scores.device)
        values = flat[index]
        flat[index] = torch.where(values < 0, values * penalty, values / penalty)
    if banned:
        flat.index_fill_(0, _on_device(torch.tensor(banned), scores.device), _NEG_INF)


def _rows_to_mask(masks: TokenMasks | None, rows: Rows[LogitRow], best: list[int] | None) -> set[int]:
    """The rows whose token depends on their mask: not those that take the largest logit, which it allows.

    That is what most constrained greedy rows of a model do that knows the form by itself. `best` is unknown where a
    look at it would wait for the device.
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


def _forbid(scores: torch.Tensor, masks: TokenMasks) -> None:
    """Leave each masked row nothing but the tokens of its mask, in place."""
    vocab_size = scores.shape[-1]
    if scores.device.type == "cpu":
        bits = np.unpackbits(masks.words.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        forbidden = torch.from_numpy(bits) == 0
    else:  # so that an eighth of a byte per token goes to the device
        words = _on_device(torch.from_numpy(masks.words), scores.device)
        places = torch.arange(32, dtype=torch.int32, device=scores.device)
        forbidden = ((words[:, :, None] >> places) & 1 == 0).flatten(1)[:, :vocab_size]
    if len(masks.rows) == len(scores):
        scores.masked_fill_(forbidden, _NEG_INF)
        return
    index = _on_device(torch.tensor(masks.rows), scores.device)
    scores.index_copy_(0, index, scores[index].masked_fill_(forbidden, _NEG_INF))


def _filter_candidates(scores: torch.Tensor, top: torch.Tensor, filters: _Filters) -> tuple[torch.Tensor, torch.Tensor]:
    """Which candidates survive [num_rows, K], and in which rows [num_rows] no token but candidates does.

    `top` holds the candidates' scores in descending order. transformers drops by ascending cumulated probability <= 1 -
    top_p, which is the same as keeping while the probability of all larger ones is < top_p.
    """
    num_candidates = top.shape[-1]
    is_whole = num_candidates == scores.shape[-1]
    has_top_k = filters.top_k > 0
    kth = top.gather(1, filters.top_k.clamp(1, num_candidates) - 1)
    keep = (top >= kth) | ~has_top_k  # ties of the kth stay, as in transformers
    # With top_k the candidates are all there is, if the smallest is out already; otherwise top_p and min_p must end the
    # row.
    is_complete = torch.where(has_top_k[:, 0], ~keep[:, -1], False)
    if filters.any_top_p:
        of_kept = top.masked_fill(~keep, _NEG_INF).logsumexp(-1, keepdim=True)
        total = torch.where(has_top_k, of_kept, scores.logsumexp(-1, keepdim=True).double())
        probs = (top - total).exp().masked_fill(~keep, 0)
        keep &= (probs.cumsum(-1) - probs < filters.top_p) | (filters.top_p >= 1)
    keep &= (top - top[:, :1]).exp() >= filters.min_p
    keep[:, 0] = True
    is_complete |= ~has_top_k[:, 0] & ~keep[:, -1]
    # Where the smallest candidate is forbidden, so is all that is not among them.
    return keep, is_complete | is_whole | (top[:, -1] == _NEG_INF)
