"""Speculative decoding: which sequences draft how many tokens in a step, and which of these stand. Pure.

A step may carry, beside a sequence's last token, guesses of the next ones (`lookup.py`); it costs little more than a
step without, where weights are read once for all rows. The sampler then chooses the token of *every* row as it would
have without drafts, with that position's own noise and parameters:

    rows      last   d1   d2   d3
    chosen    t1     t2   t3   t4        d1 = t1, d2 = t2, d3 != t3: t1 t2 t3 are the output, t4 is void

A draft stands only if it equals the token chosen in its place, so the output is the same with speculation on, off and
after a takeover; only the number of steps differs. (Speculative sampling, arXiv:2302.01318, accepts at random instead
and keeps the distribution only.) The keys and values of a draft that does not stand are overwritten by later steps.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Rows
from heapq import heapify, heappop, heapreplace
from typing import Final

from worker.engine.cost import CostModel
from worker.engine.lookup import PromptLookup
from worker.engine.sequence import Sequence
from worker.engine.settings import EngineSettings

_LEAST_GAIN: Final = 1.1  # what is expected must beat its cost by this much: both are estimates


class Speculator:
    """Lets sequences draft where the tokens to be expected are worth the rows that they cost."""

    def __init__(self, settings: EngineSettings, cost: CostModel, max_model_len: int) -> None:
        self._settings = settings
        self._cost = cost
        self._max_model_len = max_model_len

    def draft(self, decodes: Rows[Sequence], num_rows: int, max_drafts: int) -> dict[int, array[int]]:
        """Return drafts by index into `decodes`.

        `decodes` are the sequences that compute their last token in a step of `num_rows` rows; `max_drafts` is how many
        more there may be. Sequences with a history or a matcher draft nothing: what is done to scores changes with each
        token. Nor do beams, which are chosen anew with each token, nor sequences whose last token is not known yet, nor
        those with which forks begin: they share the block that drafts would be written to, without having these tokens.
        """
        if not self._may_pay(len(decodes), num_rows, max_drafts):
            return {}
        chances = [self._chances(sequence) for sequence in decodes]
        nums = allot_drafts(chances, num_rows, max_drafts, self._cost)
        drafts = {}
        for index, num_drafts in enumerate(nums):
            lookup = decodes[index].lookup
            if num_drafts and lookup is not None:
                drafts[index] = lookup.draft(num_drafts)
        return drafts

    def would_draft(self, decodes: Rows[Sequence]) -> bool:
        """Whether they would, in a step of their own, as far as their tokens tell that are known."""
        return bool(self.draft(decodes, len(decodes), self._settings.max_num_seqs))

    def _may_pay(self, num_decodes: int, num_rows: int, max_drafts: int) -> bool:
        """Whether one draft that is certain to be right would: else nobody needs to look."""
        return max_drafts > 0 and allot_drafts([[1.0]] + [[]] * (num_decodes - 1), num_rows, 1, self._cost)[0] > 0

    def _chances(self, sequence: Sequence) -> list[float]:
        max_tokens = min(sequence.sampling.max_tokens, self._max_model_len - sequence.num_prompt_tokens)
        num_left = max_tokens - sequence.num_output_tokens
        if num_left < 2 or sequence.history is not None or sequence.matcher is not None:
            return []
        if sequence.group is not None or sequence.forks or sequence.num_pending:
            return []
        if sequence.lookup is None:
            sequence.lookup = PromptLookup(
                sequence.token_ids,
                sequence.num_prompt_tokens,
                self._settings.min_draft_ngram,
                self._settings.max_draft_ngram,
            )
        sequence.lookup.catch_up()
        return sequence.lookup.chances(min(self._settings.max_draft_tokens, num_left - 1))


def allot_drafts(chances: Rows[Rows[float]], num_rows: int, max_drafts: int, cost: CostModel) -> list[int]:
    """How many drafts each decoding sequence gets, so that the step yields the most tokens in its time.

    `chances[i][k]` is the probability that the first k + 1 drafts of sequence i stand. The likeliest draft is taken
    first, and on while a row's chance over its cost beats the step's tokens over their cost. Of the cost of a step that
    prefills too, the decodes answer for what they would take alone.
    """
    nums = [0] * len(chances)
    tokens = float(len(chances))
    spent_ms = cost.step_ms(len(chances))
    queue = [(-of_sequence[0], i) for i, of_sequence in enumerate(chances) if of_sequence]
    heapify(queue)
    while queue and max_drafts > 0:
        chance, i = -queue[0][0], queue[0][1]
        row_ms = cost.step_ms(num_rows + 1) - cost.step_ms(num_rows)
        if chance * spent_ms <= _LEAST_GAIN * tokens * row_ms:
            break
        nums[i] += 1
        num_rows, max_drafts = num_rows + 1, max_drafts - 1
        tokens, spent_ms = tokens + chance, spent_ms + row_ms
        if nums[i] < len(chances[i]):
            heapreplace(queue, (-chances[i][nums[i]], i))
        else:
            heappop(queue)
    without = len(chances) * (spent_ms + cost.draft_overhead_ms)
    return nums if tokens * cost.step_ms(len(chances)) > without else [0] * len(chances)


def num_accepted(drafts: array[int], chosen: Rows[int]) -> int:
    """How many drafts stand: those before the first that differs from the token chosen in its place.

    `chosen[k]` is the token chosen where `drafts[k]` was guessed; there may be more of either.
    """
    count = 0
    for draft, token_id in zip(drafts, chosen, strict=False):
        if draft != token_id:
            break
        count += 1
    return count
