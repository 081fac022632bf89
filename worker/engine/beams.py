"""Beam search: which continuations go on, which are done, and when no better ones are to be expected. Pure.

The algorithm is transformers' (`generation/utils.py`, `_beam_search`), for one prompt:

    candidates   the best K continuations of all beams by the sum of log-probabilities, K = max(2, 1 + ends) * beams
    go on        the best of them that do not end, as many as there are beams
    finished     of the best `beams` candidates those that end, by sum / tokens ** length_penalty; as many are kept

Where transformers fills missing beams with copies of others at -1e9, here are fewer; and what is not allowed (-inf) is
no candidate. Numbers are float32, as there: a comparison comes out alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from common.generation import EarlyStopping, SamplingParams


@dataclass(frozen=True, slots=True)
class Candidate:
    """A beam with one more token."""

    score: float  # the sum of log-probabilities
    beam: int  # its place among the beams
    token_id: int


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A sequence that may be an output."""

    score: float  # by length
    token_ids: tuple[int, ...]  # what ended it included


def num_candidates(sampling: SamplingParams) -> int:
    """So many that enough go on however many of them end with an id."""
    return max(2, 1 + len(sampling.stop_token_ids)) * sampling.num_beams


def best_candidates(found: Iterable[Candidate], sampling: SamplingParams) -> list[Candidate]:
    """Return the candidates of a step, the best first; of equal ones that of the first beam, then of the least id."""
    possible = [candidate for candidate in found if candidate.score > float("-inf")]
    possible.sort(key=lambda candidate: (-candidate.score, candidate.beam, candidate.token_id))
    return possible[: num_candidates(sampling)]


class BeamSearch:
    """The search behind one prompt. It begins with one beam, the prompt, of score 0."""

    def __init__(self, sampling: SamplingParams) -> None:
        """`max_tokens` is what the model's context allows."""
        self._sampling = sampling
        self._finished: list[Hypothesis] = []  # the best first
        self.scores = [0.0]  # of the beams
        self.num_tokens = 0  # of each beam
        self.is_done = False

    @property
    def finished(self) -> Sequence[Hypothesis]:
        """The sequences that have ended so far, the best first; never more than there are beams."""
        return self._finished

    def advance(
        self, candidates: Sequence[Candidate], ended: Sequence[bool], outputs: Sequence[Sequence[int]]
    ) -> list[Candidate]:
        """Take a step, and return the candidates that are the beams from now on, the best first.

        `candidates` are those of `best_candidates`; `ended` says which of them are complete, by whatever ends an
        output; `outputs` are the beams' tokens so far. Without beams the search is done.
        """
        assert not self.is_done, "the search is over"
        num_beams = self._sampling.num_beams
        self.num_tokens += 1
        done = [
            Hypothesis(self._by_length(candidate.score), (*outputs[candidate.beam], candidate.token_id))
            for candidate, has_ended in zip(candidates[:num_beams], ended, strict=False)
            if has_ended
        ]
        self._finished = self._best([*self._finished, *done])
        going = [candidate for candidate, has_ended in zip(candidates, ended, strict=True) if not has_ended]
        going = going[:num_beams]
        self.scores = [candidate.score for candidate in going]
        self.is_done = not going or self._has_enough()
        return going

    def cut(self, outputs: Sequence[Sequence[int]]) -> list[Hypothesis]:
        """Return the best sequences where the search is ended from outside: beams count as if they were complete.

        `outputs` are the beams' tokens, () if these are lost.
        """
        if not self.num_tokens:
            return []
        running = zip(self.scores, outputs, strict=bool(outputs))
        return self._best(
            [*self._finished, *(Hypothesis(self._by_length(score), tuple(ids)) for score, ids in running)]
        )

    def _best(self, hypotheses: Iterable[Hypothesis]) -> list[Hypothesis]:
        return sorted(hypotheses, key=attrgetter("score"), reverse=True)[: self._sampling.num_beams]

    def _by_length(self, score: float, num_tokens: int | None = None) -> float:
        length = self.num_tokens if num_tokens is None else num_tokens
        return float(np.float32(score) / np.float32(length**self._sampling.length_penalty))

    def _has_enough(self) -> bool:
        """Whether no beam is expected to beat the worst of as many finished sequences as there are beams."""
        sampling = self._sampling
        if len(self._finished) < sampling.num_beams:
            return False
        if sampling.early_stopping is EarlyStopping.WHEN_FULL:
            return True
        length = self.num_tokens
        if sampling.early_stopping is EarlyStopping.NEVER and sampling.length_penalty > 0:
            length = sampling.max_tokens
        return self._by_length(self.scores[0], length) <= self._finished[-1].score
