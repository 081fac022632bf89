"""Guesses a sequence's next tokens from its own past: what followed when its latest tokens stood there before. Pure.

    ... the [quick brown fox] jumps over ...  a [quick brown fox] ?
                             ^ drafts: jumps over ...

Prompt lookup, as in LLMA (arXiv:2304.04487): no second model, and much to find wherever an output repeats its prompt or
itself, as summaries, edits, code and tables do.
"""

from __future__ import annotations

from array import array
from typing import Final

_ID_BITS: Final = 24  # larger ids would only make guesses worse
_LEARNING_RATE: Final = 0.15  # the last dozen tokens count
_FIRST_RATE: Final = 0.15  # of a match of one token; each token more is worth as much again
_HIGHEST_FIRST_RATE: Final = 0.5


class PromptLookup:
    """Follows one sequence's token ids and knows, for each n-gram in them, where it stood last.

    A token costs a few dictionary operations and, for each length of n-gram, about 100 bytes: a hundredth of what its
    keys and values take.

    How often the guesses for one token were right so far, by length of the match, is learnt from every output token,
    whether it had been drafted or not: that costs no row, and text that becomes repetitive late is noticed.
    """

    __slots__ = (
        "_followers",
        "_keys",
        "_masks",
        "_min_ngram",
        "_num_prompt_tokens",
        "_num_seen",
        "_rates",
        "_token_ids",
    )

    def __init__(self, token_ids: array[int], num_prompt_tokens: int, min_ngram: int, max_ngram: int) -> None:
        """`token_ids` is the sequence's own array, which grows: see `catch_up`."""
        self._token_ids = token_ids
        self._num_prompt_tokens = num_prompt_tokens
        self._min_ngram = min_ngram
        lengths = range(min_ngram, max_ngram + 1)
        # All by length of n-gram: index of the token behind its latest place; the latest n tokens packed into an int.
        self._followers: list[dict[int, int]] = [{} for _ in lengths]
        self._masks = [(1 << _ID_BITS * n) - 1 for n in lengths]
        self._keys = [0 for _ in lengths]
        self._rates = [min(_FIRST_RATE * n, _HIGHEST_FIRST_RATE) for n in lengths]
        self._num_seen = 0

    def catch_up(self) -> None:
        """Take in the tokens that the sequence got since the last call."""
        ids, keys, masks, min_ngram = self._token_ids, self._keys, self._masks, self._min_ngram
        for index in range(self._num_seen, len(ids)):
            token_id = ids[index]
            if index >= self._num_prompt_tokens:
                self._learn(token_id)
            for i, followers in enumerate(self._followers):
                if index >= min_ngram + i:
                    followers[keys[i]] = index
                keys[i] = (keys[i] << _ID_BITS | token_id) & masks[i]
            self._num_seen = index + 1

    def _learn(self, token_id: int) -> None:
        match = self._match()
        if match is not None:
            i, follower = match
            self._rates[i] += _LEARNING_RATE * ((self._token_ids[follower] == token_id) - self._rates[i])

    def _match(self) -> tuple[int, int] | None:
        """The longest n-gram that ends the tokens seen and stood before: its place among the lengths, its follower."""
        for i in range(len(self._keys) - 1, -1, -1):
            if self._num_seen >= self._min_ngram + i:
                follower = self._followers[i].get(self._keys[i])
                if follower is not None:
                    return i, follower
        return None

    def chances(self, max_drafts: int) -> list[float]:
        """For each number of drafts from 1: the probability that all of them are right. Empty without a guess.

        Each right draft makes the match longer, hence the next one likelier.
        """
        match = self._match()
        if match is None:
            return []
        i, chance, chances = match[0], 1.0, []
        for _ in range(max_drafts):
            chance *= self._rates[i]
            chances.append(chance)
            i = min(i + 1, len(self._rates) - 1)
        return chances

    def draft(self, num_drafts: int) -> array[int]:
        """The guessed next tokens. Where they reach the sequence's end they go on with the guess itself: in a text of
        period two, with two tokens known, all are guessed.
        """
        drafts = array("i")
        match = self._match()
        if match is not None:
            ids, follower, num_known = self._token_ids, match[1], len(self._token_ids)
            for index in range(follower, follower + num_drafts):
                drafts.append(ids[index] if index < num_known else drafts[index - num_known])
        return drafts
