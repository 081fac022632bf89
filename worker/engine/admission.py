"""In which order waiting sequences are tried for admission: by turns, but a cached prefix first, within a bound. Pure.

A sequence whose prefix is in the cache is cheap now and dear once that prefix has been evicted, so it may go before
those of its priority whose turn comes first (see `fairness.py`). Each sequence lets at most `max_overtakings` pass in
its life that were behind it, however many keep coming: then none behind it is tried before it. So what it waits for is
bounded as without the cache, plus the work of that many others; and priorities are never crossed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from worker.engine.sequence import Sequence


@dataclass(slots=True)
class _Candidate:
    sequence: Sequence
    num_cached_blocks: int
    num_overtaken: int


def admission_order(
    waiting: Iterable[Sequence], num_cached_blocks: Mapping[Sequence, int], max_overtakings: int
) -> list[Sequence]:
    """Return `waiting`, which is in the order of turns, in the order in which to try admission.

    Of each priority the one with the most cached blocks comes first, then the first in order; but nobody passes one
    that has been overtaken `max_overtakings` times already, were those before admitted as well.
    """
    order: list[Sequence] = []
    for _, group in groupby(waiting, key=lambda sequence: sequence.priority):
        left = [_Candidate(s, num_cached_blocks.get(s, 0), s.num_overtaken) for s in group]
        while left and any(c.num_cached_blocks != left[0].num_cached_blocks for c in left):
            first_full = next((i for i, c in enumerate(left) if c.num_overtaken >= max_overtakings), len(left) - 1)
            best = max(range(first_full + 1), key=lambda i: (left[i].num_cached_blocks, -i))
            for overtaken in left[:best]:
                overtaken.num_overtaken += 1
            order.append(left.pop(best).sequence)
        order += [candidate.sequence for candidate in left]
    return order
