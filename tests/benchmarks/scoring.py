"""How our engine predicts a given text, through its own steps: teacher forcing in place of its sampler's choice.

Every window is one request whose prompt is the window's first half. At each step the logits are read off, and the
text's own next token is put where the sampler's would have gone: the engine decodes the text as if it had written it,
all windows together, through the same kernels that serve.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tests.benchmarks.contestants.base import Output, Score
from tests.benchmarks.workload import Request

if TYPE_CHECKING:
    from tests.benchmarks.contestants.engine import InProcessEngine
    from worker.engine.sampler import PendingTokens, SampledTokens


class _Forced:
    """What a step waits for in place of the sampler's own tokens."""

    def __init__(self, pending: PendingTokens, token_ids: list[int]) -> None:
        self._pending = pending
        self._token_ids = token_ids
        self.token_ids = torch.tensor(token_ids)
        self.redrawn_rows: list[int] = []

    def result(self) -> SampledTokens:
        return dataclasses.replace(self._pending.result(), token_ids=self._token_ids)


def score_windows(contestant: InProcessEngine, windows: Sequence[list[int]]) -> list[Score]:
    """Return the predictions for the second half of each window. The engine must not speculate: a guess has no text."""
    sampler = contestant.engine._sampler
    begin, scores, running = sampler.begin, {}, {}
    texts: dict[str, list[int]] = {}
    for window in windows:
        half = len(window) // 2 + 1
        request_id = contestant.add(Request(window[:half], len(window) - half))
        texts[request_id] = window[half:]
        scores[request_id] = Score([], [])
        running[request_id] = Output()

    def forced(logits: torch.Tensor, sequences: Sequence[Any], masks: Any = None) -> _Forced:
        nexts = []
        for sequence in sequences:
            score = scores[sequence.request_id]
            nexts.append(texts[sequence.request_id][len(score.best)])
        rows = logits.double()
        logprobs = rows.log_softmax(1).gather(1, torch.tensor(nexts)[:, None])[:, 0].tolist()
        for sequence, logprob, best in zip(sequences, logprobs, rows.argmax(1).tolist(), strict=True):
            scores[sequence.request_id].logprobs.append(logprob)
            scores[sequence.request_id].best.append(best)
        return _Forced(begin(logits, sequences, masks), nexts)

    sampler.begin = forced  # type: ignore[method-assign, assignment]
    try:
        while running:
            contestant.step(running)
    finally:
        del sampler.begin
    return [scores[request_id] for request_id in texts]
