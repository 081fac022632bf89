"""What a sequence's past forbids or discourages: tokens seen, and n-grams begun before. Pure, O(1) per token.

Kept only for sequences that ask for a repetition penalty or for no_repeat_ngram_size; all others pay nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from common.generation import SamplingParams


class TokenHistory:
    """Follows the token ids of one sequence, prompt included, as transformers' logits processors read them."""

    __slots__ = ("_followers", "_is_seen", "_ngram_size", "_num_tokens", "_tail", "_track_seen", "seen_ids")

    def __init__(self, sampling: SamplingParams) -> None:
        self._track_seen = sampling.repetition_penalty != 1.0
        self._ngram_size = sampling.no_repeat_ngram_size
        self.seen_ids: array[int] = array("i")  # each once, in order of first appearance
        self._is_seen: set[int] = set()
        self._tail: tuple[int, ...] = ()  # the last ngram_size - 1 ids
        self._followers: dict[tuple[int, ...], list[int]] = {}  # of every (ngram_size - 1)-gram
        self._num_tokens = 0

    @staticmethod
    def is_needed(sampling: SamplingParams) -> bool:
        return sampling.repetition_penalty != 1.0 or sampling.no_repeat_ngram_size > 0

    @property
    def num_tokens(self) -> int:
        """Ids taken in so far."""
        return self._num_tokens

    def extend(self, token_ids: Iterable[int]) -> None:
        """Take in the next ids."""
        for token_id in token_ids:
            self._num_tokens += 1
            if self._track_seen and token_id not in self._is_seen:
                self._is_seen.add(token_id)
                self.seen_ids.append(token_id)
            if self._ngram_size > 0:
                if len(self._tail) == self._ngram_size - 1:
                    self._followers.setdefault(self._tail, []).append(token_id)
                if self._ngram_size > 1:
                    self._tail = (*self._tail, token_id)[-(self._ngram_size - 1) :]

    def banned_ids(self) -> list[int]:
        """The ids that would complete an n-gram which the sequence holds already."""
        return self._followers.get(self._tail, []) if self._ngram_size > 0 else []
