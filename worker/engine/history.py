"""What a sequence's past does to its next token's scores: tokens seen and counted, n-grams begun, phrases nearly said.

Pure, O(1) per token; what is handed out for a step are views and small lists. Kept only for sequences whose scores are
edited at all (`edits.py`); all others pay nothing. Its state is a function of the token ids alone, so a takeover and a
preemption need no more than these.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from common.generation import SamplingParams

IdArray: TypeAlias = npt.NDArray[np.signedinteger[Any]]
_NO_IDS: Final = np.empty(0, dtype=np.int64)


class NGramFollowers:
    """What followed each (size - 1)-gram of the ids taken in.

    As arrays, which are handed out as they are: of a size of 1 all ids are followers, and a list made anew of them at
    each step would cost more than all else that is done to its scores.
    """

    __slots__ = ("_followers", "_own", "_size", "_tail")

    def __init__(self, size: int) -> None:
        self._size = size
        self._tail: tuple[int, ...] = ()  # the last size - 1 ids
        self._followers: dict[tuple[int, ...], array[int]] = {}
        self._own: set[tuple[int, ...]] | None = None  # whose arrays no copy shares; None: all

    def push(self, token_id: int, *, learn: bool = True) -> None:
        """Take in the next id; without `learn` the n-gram that it completes is not noted."""
        if learn and len(self._tail) == self._size - 1:
            self._note(token_id)
        if self._size > 1:
            self._tail = (*self._tail, token_id)[-(self._size - 1) :]

    def begin_anew(self) -> None:
        """What comes next does not follow what was taken in."""
        self._tail = ()

    def _note(self, token_id: int) -> None:
        ids = self._followers.get(self._tail)
        if ids is None or (self._own is not None and self._tail not in self._own):
            ids = self._followers[self._tail] = array("i", ids or ())
            if self._own is not None:
                self._own.add(self._tail)
        ids.append(token_id)

    def copy(self) -> NGramFollowers:
        """Return another one that has taken in the same. An array is copied when either takes in more of it."""
        other = NGramFollowers(self._size)
        other._tail = self._tail
        other._followers = self._followers.copy()
        self._own, other._own = set(), set()
        return other

    def next_ids(self) -> IdArray:
        """The ids that would complete an n-gram which was noted; to be read before the next one is pushed."""
        ids = self._followers.get(self._tail)
        return _NO_IDS if ids is None else np.frombuffer(ids, dtype=np.int32)


class Phrases:
    """Sequences of two or more ids, found when all but their last id end what was taken in."""

    __slots__ = ("_by_last",)

    def __init__(self, phrases: Iterable[tuple[tuple[int, ...], float]]) -> None:
        """`phrases` are ids with a value."""
        # By the last id of the prefix: (prefix, next id, value).
        self._by_last: dict[int, list[tuple[array[int], int, float]]] = {}
        for ids, value in phrases:
            self._by_last.setdefault(ids[-2], []).append((array("i", ids[:-1]), ids[-1], value))

    def next_ids(self, token_ids: array[int]) -> list[tuple[int, float]]:
        """The id that would complete a phrase behind `token_ids`, with its value, for each that is that far."""
        if not self._by_last or not token_ids:
            return []
        candidates = self._by_last.get(token_ids[-1], ())
        return [(last, value) for prefix, last, value in candidates if token_ids[-len(prefix) :] == prefix]


class TokenHistory:
    """Follows the token ids of one sequence, prompt included, as transformers' logits processors read them."""

    __slots__ = (
        "_bad_phrases",
        "_bias_ids",
        "_bias_values",
        "_biased_phrases",
        "_count_index",
        "_has_phrases",
        "_is_seen",
        "_learns_prompt",
        "_ngrams",
        "_num_prompt_tokens",
        "_num_tokens",
        "_prompt_ngrams",
        "_token_ids",
        "_track_counts",
        "_track_seen",
        "always_banned",
        "counted_ids",
        "counts",
        "prompt_ids",
        "sampling",
        "seen_ids",
    )

    def __init__(
        self, sampling: SamplingParams, prompt_token_ids: Sequence[int], source_token_ids: Sequence[int] | None = None
    ) -> None:
        """With a source, that is what the parameters for the encoder's tokens mean, and not the prompt."""
        self.sampling: Final = sampling
        encoded = prompt_token_ids if source_token_ids is None else source_token_ids
        self._num_prompt_tokens = len(prompt_token_ids)
        self._num_tokens = 0
        self._track_seen = sampling.repetition_penalty != 1.0
        self.seen_ids: array[int] = array("i")  # each once, in order of first appearance
        self._is_seen: set[int] = set()
        self._track_counts = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self.counted_ids: array[int] = array("i")  # of the output, each once
        self.counts: array[int] = array("i")  # how often each occurs there
        self._count_index: dict[int, int] = {}  # where an id stands in these two
        self._ngrams = NGramFollowers(sampling.no_repeat_ngram_size) if sampling.no_repeat_ngram_size else None
        size = sampling.encoder_no_repeat_ngram_size
        self._prompt_ngrams = NGramFollowers(size) if size else None
        self.prompt_ids = _NO_IDS  # each once
        if sampling.encoder_repetition_penalty != 1.0:
            self.prompt_ids = np.unique(np.asarray(encoded, dtype=np.int64))
        single = [(ids[0], value) for ids, value in sampling.sequence_bias if len(ids) == 1]
        self._bias_ids = np.array([token_id for token_id, _ in single], dtype=np.int64)
        self._bias_values = np.array([value for _, value in single], dtype=np.float32)
        self._biased_phrases = Phrases((ids, value) for ids, value in sampling.sequence_bias if len(ids) > 1)
        self._bad_phrases = Phrases((ids, 0.0) for ids in sampling.bad_words_ids if len(ids) > 1)
        self._has_phrases = any(len(ids) > 1 for ids, _ in sampling.sequence_bias) or any(
            len(ids) > 1 for ids in sampling.bad_words_ids
        )
        self._token_ids: array[int] = array("i")  # kept for phrases only
        bad = [ids[0] for ids in sampling.bad_words_ids if len(ids) == 1 and ids[0] not in sampling.stop_token_ids]
        # What is banned at every place: bad words of one token (but those that end an output), and suppressed tokens.
        self.always_banned: Final = np.array([*bad, *sampling.suppress_tokens], dtype=np.int64)
        if self._prompt_ngrams is not None and source_token_ids is not None:
            for token_id in source_token_ids:
                self._prompt_ngrams.push(token_id)
            self._prompt_ngrams.begin_anew()
        self._learns_prompt = source_token_ids is None
        self._take(prompt_token_ids, is_prompt=True)

    @staticmethod
    def is_needed(sampling: SamplingParams) -> bool:
        """Whether anything but the temperature and the filters changes a score."""
        return (
            sampling.repetition_penalty != 1.0
            or sampling.no_repeat_ngram_size > 0
            or sampling.min_tokens > 0
            or sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
            or sampling.encoder_repetition_penalty != 1.0
            or sampling.encoder_no_repeat_ngram_size > 0
            or bool(sampling.bad_words_ids)
            or bool(sampling.sequence_bias)
            or bool(sampling.suppress_tokens)
            or bool(sampling.begin_suppress_tokens)
            or sampling.exponential_decay_length_penalty is not None
            or sampling.forced_bos_token_id is not None
            or sampling.forced_eos_token_id is not None
        )

    def copy(self) -> TokenHistory:
        """Return another one that has taken in the same; what comes then is each one's own."""
        other = copy.copy(self)
        other.seen_ids, other._is_seen = self.seen_ids[:], set(self._is_seen)
        other.counted_ids, other.counts = self.counted_ids[:], self.counts[:]
        other._count_index = dict(self._count_index)
        other._ngrams = self._ngrams and self._ngrams.copy()
        other._prompt_ngrams = self._prompt_ngrams and self._prompt_ngrams.copy()
        other._token_ids = self._token_ids[:]
        return other

    @property
    def num_tokens(self) -> int:
        """Ids taken in so far."""
        return self._num_tokens

    @property
    def num_free_output_tokens(self) -> int:
        """Without the one that is forced to be the first."""
        return self.num_output_tokens - (self.sampling.forced_bos_token_id is not None and self._num_prompt_tokens == 1)

    @property
    def num_output_tokens(self) -> int:
        return self._num_tokens - self._num_prompt_tokens

    def extend(self, token_ids: Iterable[int]) -> None:
        """Take in the next ids of the output."""
        self._take(token_ids, is_prompt=False)

    def _take(self, token_ids: Iterable[int], *, is_prompt: bool) -> None:
        for token_id in token_ids:
            self._num_tokens += 1
            if self._track_seen and token_id not in self._is_seen:
                self._is_seen.add(token_id)
                self.seen_ids.append(token_id)
            if self._track_counts and not is_prompt:
                self._count(token_id)
            if self._ngrams is not None:
                self._ngrams.push(token_id)
            if self._prompt_ngrams is not None:
                self._prompt_ngrams.push(token_id, learn=is_prompt and self._learns_prompt)
            if self._has_phrases:
                self._token_ids.append(token_id)

    def _count(self, token_id: int) -> None:
        index = self._count_index.setdefault(token_id, len(self.counts))
        if index == len(self.counts):
            self.counted_ids.append(token_id)
            self.counts.append(0)
        self.counts[index] += 1

    def biases(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """What to add to which ids, each id once: single ids' biases, and those of phrases that are nearly said."""
        said = self._biased_phrases.next_ids(self._token_ids)
        if not said:
            return self._bias_ids, self._bias_values
        # Summed in float32 and before they meet the score, as in transformers.
        sums = dict(zip(self._bias_ids.tolist(), self._bias_values, strict=True))
        for token_id, value in said:
            sums[token_id] = sums.get(token_id, np.float32(0)) + np.float32(value)
        return np.array(list(sums), dtype=np.int64), np.array(list(sums.values()), dtype=np.float32)

    def banned_ids(self) -> list[IdArray]:
        """The ids that would complete an n-gram which the sequence or its prompt holds already, or a bad word.

        In parts, to be read before the next ids are taken in; an id may stand in several.
        """
        bad = [token_id for token_id, _ in self._bad_phrases.next_ids(self._token_ids)]
        found = [ngrams.next_ids() for ngrams in (self._ngrams, self._prompt_ngrams) if ngrams is not None]
        return [np.array(bad, dtype=np.int64), *found] if bad else found
