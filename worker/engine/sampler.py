"""The sampler: from the logits of a mixed batch to one token per row, without sorting the vocabulary.

Rows are told apart by what they ask for, and pay only for that:

    greedy                       argmax
    penalties, biases, bans      a copy of the row, changed at the tokens concerned only (`edits.py`)
    a grammar                    a copy of the row, without the tokens that may not come next (`masking.py`)
    top_k, top_p, typical_p ...  the CANDIDATES largest scores; all filters work on those (`filters.py`)
    no filter                    the candidates, then the few other tokens whose noise could beat them
    filter wider than that       eight times as many candidates, and so on

Processors and filters are transformers' own, in its order (`generation/logits_process.py`). Tokens are drawn with the
noise of `noise.py`, hence reproducibly.

On a GPU a look at a result waits for the device. There the choice is made without one, rows without filters from the
whole vocabulary at once, and everything comes to the host in one copy; only rows that turn out to need more candidates
are drawn again. So `begin` returns while the device still computes, and the next step can be given to it before anybody
looks at this one's tokens (see `flight.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

import torch

from common.generation import SamplingParams
from worker.engine.edits import edit_scores
from worker.engine.filters import Filters, filter_candidates, is_unfiltered
from worker.engine.grammar import TokenMasks
from worker.engine.history import TokenHistory
from worker.engine.masking import apply_masks, rows_to_mask
from worker.engine.noise import gumbel, least_hash, ordered_hash, row_key
from worker.engine.scores import TokenDetails, TokenScores, wants_logprobs
from worker.engine.transfer import ToHost, on_device

CANDIDATES: Final = 256
_CPU_CHUNK: Final = 1 << 17  # hashes at a time: all temporaries stay in the second-level cache
_DEVICE_CHUNK: Final = 1 << 25
_NEG_INF: Final = float("-inf")
# In the place of a token:
_UNDECIDED: Final = -1  # the row needs more candidates
_FORBIDDEN: Final = -2  # no token is allowed

# [num_rows, vocab_size] to [num_rows] int64: the largest score's token, or ~token where that score is not finite. The
# scores are float32, or on a GPU of any float type.
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
    details: dict[int, TokenDetails] = field(default_factory=dict)  # by row, for rows that asked for alternatives
    forbidden_rows: list[int] = field(default_factory=list)  # what the row asks for leaves no token; likewise
    unmet_rows: list[int] = field(default_factory=list)  # needed more candidates than there was memory for; likewise


@dataclass(frozen=True, slots=True)
class _RowThen:
    """A row as it was when its token was to be chosen."""

    sampling: SamplingParams
    output_index: int
    num_tokens: int
    history: TokenHistory | None


class PendingTokens:
    """Tokens that are chosen on the device and on their way to the host."""

    def __init__(
        self,
        best: torch.Tensor,  # [num_rows] int64 on the device; ~token where logits are invalid, negative if undecided
        packed: torch.Tensor,
        read: Callable[[torch.Tensor], SampledTokens],
        draw_again: Callable[[list[int]], SampledTokens] | None = None,
    ) -> None:
        """`packed` comes to the host, where `read` makes tokens of it; `draw_again` chooses those of undecided rows."""
        self._best = best
        self._packed = ToHost(packed)
        self._read = read
        self._draw_again = draw_again
        self.redrawn_rows: list[int] = []  # once there is a result: rows whose token on the device is another one

    @property
    def token_ids(self) -> torch.Tensor:
        """[num_rows] int64 on the device: what the next step may read, valid ids even where they mean nothing."""
        return self._best.clamp(min=0)

    def result(self) -> SampledTokens:
        """Wait for the tokens. To be called once; the step's logits may be overwritten by then."""
        sampled = self._read(self._packed.wait())
        again = [i for i, token_id in enumerate(sampled.token_ids) if token_id == _UNDECIDED]
        if again:
            assert self._draw_again is not None, "undecided where results may be looked at"
            self.redrawn_rows = again
            try:
                widened = self._draw_again(again)
            except torch.OutOfMemoryError:
                sampled.unmet_rows.extend(again)
                return sampled
            for i, token_id in zip(again, widened.token_ids, strict=True):
                sampled.token_ids[i] = token_id
            sampled.logprobs.update((again[i], logprob) for i, logprob in widened.logprobs.items())
            sampled.details.update((again[i], details) for i, details in widened.details.items())
        return sampled


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

        A row with a mask gets one of the tokens that this allows.
        """
        return self.begin(logits, rows, masks).result()

    @torch.inference_mode()
    def begin(self, logits: torch.Tensor, rows: Rows[LogitRow], masks: TokenMasks | None = None) -> PendingTokens:
        """As `sample`, but without waiting where that is not needed."""
        return self._begin(logits, rows, masks, self._may_wait)

    def _begin(
        self, logits: torch.Tensor, rows: Rows[LogitRow], masks: TokenMasks | None, may_wait: bool
    ) -> PendingTokens:
        """One copy from the device at the end. The token of a row that needs more candidates is _UNDECIDED."""
        raw = logits.float() if self._device.type == "cpu" else logits
        best = self._argmax(raw)
        masked = rows_to_mask(masks, rows, best.tolist() if masks is not None and may_wait else None)
        edited = [i for i, row in enumerate(rows) if row.history is not None or i in masked]
        unedited = [i for i, row in enumerate(rows) if row.history is None and i not in masked]
        sampled = [i for i in unedited if rows[i].sampling.temperature > 0]
        wanted = [(i, row.sampling.top_logprobs) for i, row in enumerate(rows) if wants_logprobs(row.sampling)]
        if not (edited or sampled or wanted):  # a small step's time is felt: nothing but what it needs
            return PendingTokens(best, best, _read_best)
        scores = raw.float()
        is_valid = best >= 0
        tokens = torch.where(is_valid, best, ~best)
        if edited or sampled:
            edited.sort(key=lambda i: rows[i].sampling.temperature > 0)  # greedy ones first
            order = edited + sampled
            index = on_device(torch.tensor(order), self._device)
            of_order = masks.of(order) if masks is not None else None
            chosen = self._sample_rows(scores[index], [rows[i] for i in order], len(edited), of_order, may_wait)
            tokens.index_copy_(0, index, chosen)
        scored = TokenScores.of(scores, tokens, wanted) if wanted else []
        results = [tokens.double(), is_valid.double(), *(group.table.flatten() for group in scored)]
        sizes = [len(result) for result in results]

        def read(packed: torch.Tensor) -> SampledTokens:
            found_ids, validity, *tables = torch.split(packed, sizes)
            token_ids = [int(token_id) for token_id in found_ids.tolist()]
            found = SampledTokens(
                token_ids=token_ids,
                logprobs={},
                invalid_rows=[i for i, valid in enumerate(validity.tolist()) if not valid],
                forbidden_rows=[i for i, token_id in enumerate(token_ids) if token_id == _FORBIDDEN],
            )
            for group, table in zip(scored, tables, strict=True):
                group.read(table.tolist(), found.logprobs, found.details)
            return found

        packed = torch.cat(results)
        if may_wait or all(rows[i].sampling.temperature == 0 for i in (*edited, *sampled)):
            return PendingTokens(tokens, packed, read)
        # By then the runner may have written its logits anew, and sequences may have got longer.
        kept = scores.clone() if scores is logits else scores
        then = [_RowThen(row.sampling, row.output_index, row.num_tokens, row.history) for row in rows]

        def draw_again(again: list[int]) -> SampledTokens:
            index = on_device(torch.tensor(again), self._device)
            of_again = masks.of(again) if masks is not None else None
            return self._begin(kept[index], [then[i] for i in again], of_again, may_wait=True).result()

        return PendingTokens(tokens, packed, read, draw_again)

    def _sample_rows(
        self, scores: torch.Tensor, rows: Rows[LogitRow], num_edited: int, masks: TokenMasks | None, may_wait: bool
    ) -> torch.Tensor:
        """Edited and masked rows first, greedy ones before sampled ones. Overwrites `scores`."""
        if num_edited:
            edit_scores(scores[:num_edited], rows[:num_edited])
        if masks is not None:
            apply_masks(scores, masks)
        num_greedy = sum(1 for row in rows if row.sampling.temperature == 0)
        tokens = self._argmax(scores[:num_greedy])
        tokens = tokens.masked_fill(tokens < 0, _FORBIDDEN)  # of a row whose logits are invalid, it means nothing
        if num_greedy == len(rows):
            return tokens
        drawn = self._draw(scores[num_greedy:], rows[num_greedy:], may_wait)
        return torch.cat([tokens, drawn]) if num_greedy else drawn

    def _draw(self, scores: torch.Tensor, rows: Rows[LogitRow], may_wait: bool) -> torch.Tensor:
        filters = Filters.of([row.sampling for row in rows], self._device)
        words = [row_key(row.sampling.seed, row.output_index, row.num_tokens) for row in rows]
        keys = on_device(torch.tensor(words, dtype=torch.int32), self._device)
        scores /= filters.temperature
        if may_wait:
            return self._draw_among(CANDIDATES, scores, keys, filters)
        return self._draw_without_waiting(scores, keys, filters)

    def _draw_without_waiting(self, scores: torch.Tensor, keys: torch.Tensor, filters: Filters) -> torch.Tensor:
        """Draw filtered rows from the candidates, where those suffice, and the others from all tokens."""
        top, ids = scores.topk(min(CANDIDATES, scores.shape[-1]), dim=-1)
        top = top.double()
        keep, is_complete = filter_candidates(scores, top, filters)
        noisy = (top + gumbel(ordered_hash(keys, ids.int()))).masked_fill_(~keep, _NEG_INF)
        drawn = torch.where(is_complete, ids.gather(1, noisy.argmax(-1, keepdim=True))[:, 0], _UNDECIDED)
        unfiltered = [i for i, params in enumerate(filters.params) if is_unfiltered(params)]
        chunk = max(1, _DEVICE_CHUNK // scores.shape[-1])
        vocabulary = self._all_ids(scores.shape[-1])
        for start in range(0, len(unfiltered), chunk):
            index = on_device(torch.tensor(unfiltered[start : start + chunk]), self._device)
            totals = gumbel(ordered_hash(keys[index], vocabulary)).add_(scores[index])
            drawn.index_copy_(0, index, totals.argmax(-1))
        return drawn.masked_fill_(top[:, 0] == _NEG_INF, _FORBIDDEN)

    def _all_ids(self, vocab_size: int) -> torch.Tensor:
        if len(self._vocabulary) != vocab_size:
            self._vocabulary = torch.arange(vocab_size, dtype=torch.int32, device=self._device)
        return self._vocabulary

    def _draw_among(
        self, num_candidates: int, scores: torch.Tensor, keys: torch.Tensor, filters: Filters
    ) -> torch.Tensor:
        """Draw from the largest scores; rows that turn out to need more of them get more."""
        top, ids = scores.topk(min(num_candidates, scores.shape[-1]), dim=-1)  # descending
        top = top.double()
        keep, is_complete = filter_candidates(scores, top, filters)
        noisy = (top + gumbel(ordered_hash(keys, ids.int()))).masked_fill_(~keep, _NEG_INF)
        best, at = noisy.max(-1)
        drawn = ids.gather(1, at[:, None])[:, 0].masked_fill_(top[:, 0] == _NEG_INF, _FORBIDDEN)
        if bool(is_complete.all()):
            return drawn
        open_rows = (~is_complete).nonzero()[:, 0].tolist()
        everything = torch.tensor([i for i in open_rows if is_unfiltered(filters.params[i])], dtype=torch.int64)
        if len(everything):
            drawn[everything] = self._draw_from_all(
                scores[everything], keys[everything], best[everything], drawn[everything], bound=top[everything, -1]
            )
        wider = [i for i in open_rows if not is_unfiltered(filters.params[i])]
        if wider:
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


def _read_best(best: torch.Tensor) -> SampledTokens:
    found = best.tolist()
    return SampledTokens(
        token_ids=[token_id if token_id >= 0 else ~token_id for token_id in found],
        logprobs={},
        invalid_rows=[i for i, token_id in enumerate(found) if token_id < 0],
    )


def _argmax(scores: torch.Tensor) -> torch.Tensor:
    tokens = scores.argmax(-1)  # a NaN counts as the largest
    return torch.where(scores.gather(1, tokens[:, None])[:, 0].isfinite(), tokens, ~tokens)
