"""Lanes: threads that take whole texts through the whole model, side by side, instead of sharing every product.

A product that threads share ends with its last thread: each layer waits several times for whichever thread had the
longer part, or lost its core for a moment to another process. Lanes wait for each other once a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final, TypeVar

import torch

_MIN_TOKENS: Final = 256  # of a lane: below, its products are too small to be worth it
_BALANCED_TOKENS: Final = 512  # of a piece, where there are more pieces than lanes


T = TypeVar("T", bound=Sized)  # a text
R = TypeVar("R")


class Lanes:
    """Divides the threads that torch computes with. For one batch at a time."""

    def __init__(self, num_threads: int, min_tokens: int = _MIN_TOKENS) -> None:
        self._num_threads = num_threads
        self._min_tokens = min_tokens
        self._pool = ThreadPoolExecutor(num_threads, "lane") if num_threads > 1 else None

    def run(self, compute: Callable[[Sequence[T]], list[R]], texts: Sequence[T]) -> list[R]:
        """Return what `compute` gives for the texts, in their order; raise what it raises, once no lane computes."""
        num_tokens = sum(map(len, texts))
        num_lanes = min(self._num_threads, num_tokens // self._min_tokens, len(texts))
        if self._pool is None or num_lanes < 2:
            _use_threads(self._num_threads)
            return compute(texts)
        threads = self._num_threads // num_lanes
        # More than lanes only where each is one thread: fewer lanes mean that there are no more tokens or texts.
        num_pieces = min(2 * num_lanes, max(num_lanes, num_tokens // _BALANCED_TOKENS))

        def lane(piece: Sequence[T]) -> list[R]:
            _use_threads(threads)
            return compute(piece)

        running = [self._pool.submit(lane, piece) for piece in pieces(texts, num_pieces)]
        wait(running)
        return [output for one in running for output in one.result()]


def pieces(texts: Sequence[T], count: int) -> list[Sequence[T]]:
    """Cut texts into at most `count` runs of about as many tokens each; none is empty."""
    total, done = sum(map(len, texts)), 0
    cuts = [0]
    for index, text in enumerate(texts):
        # A text belongs where its middle lies.
        if (done + len(text) / 2) * count >= total * len(cuts) and index > cuts[-1]:
            cuts.append(index)
        done += len(text)
    return [texts[start:end] for start, end in zip(cuts, [*cuts[1:], len(texts)], strict=True)]


def _use_threads(count: int) -> None:
    """Let the calling thread's operators use so many threads: torch keeps the number for each thread that calls it."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
