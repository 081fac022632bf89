"""The best of several outputs: held back until all have ended, then chosen, put in order and reported at once. Pure.

A score is the mean log-probability of an output's tokens, those before temperature and filters. Nothing of it is in the
log before the end, so that a takeover begins anew; tokens depend on the seed alone, so it comes to the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from common.deltas import merge_deltas
from common.generation import OutputDelta, SamplingParams


class Ranking:
    """The outputs of one generation."""

    def __init__(self, sampling: SamplingParams) -> None:
        self._num_best = sampling.num_best
        self._with_logprobs = sampling.logprobs
        self._deltas: list[OutputDelta] = []

    def take(self, deltas: Iterable[OutputDelta]) -> None:
        """Keep what a step produced."""
        self._deltas += deltas

    def best(self) -> list[OutputDelta]:
        """Return the best outputs, the best first, each as one delta with its score; of equal ones the first."""
        scored = sorted(merge_deltas(self._deltas), key=lambda delta: (-_score(delta), delta.output_index))
        return [
            msgspec.structs.replace(
                delta,
                output_index=index,
                logprobs=delta.logprobs if self._with_logprobs else (),
                score=_score(delta) if delta.token_ids else None,
            )
            for index, delta in enumerate(scored[: self._num_best])
        ]


def _score(delta: OutputDelta) -> float:
    """One without tokens, which was ended from outside, comes last."""
    return sum(delta.logprobs) / len(delta.logprobs) if delta.logprobs else float("-inf")
