"""Percentiles, and how far chance may have moved a difference. Pure: numbers in, numbers out."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

PERCENTILES = (50, 90, 95, 99)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of sorted values by nearest rank: the least of them that has `percent` % at or below it."""
    return ordered[max(1, _rank(len(ordered), percent)) - 1]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return mean and percentiles of seconds in milliseconds; empty without values."""
    if not values:
        return {}
    ordered = sorted(values)
    result = {"mean": sum(ordered) / len(ordered)}
    result |= {f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES}
    return {name: round(value * 1000, 2) for name, value in result.items()}


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


class Pool:
    """Values that belong to requests, of which each may have any number: they are drawn by the request, not singly.

    Gaps between tokens of one request are alike; drawn singly they would look like more evidence than they are.
    """

    def __init__(self, values: Sequence[Sequence[float]]) -> None:
        pairs = sorted((value, owner) for owner, group in enumerate(values) for value in group)
        self._values = [value for value, _ in pairs]
        self._owners = [owner for _, owner in pairs]

    def __len__(self) -> int:
        return len(self._values)

    def percentile(self, percent: float, weights: Sequence[int] | None = None) -> float | None:
        """Return the percentile where request i was drawn `weights[i]` times (once, if None); None without values."""
        if weights is None:
            return percentile(self._values, percent) if self._values else None
        totals = list(accumulate(map(weights.__getitem__, self._owners)))
        if not totals or not totals[-1]:
            return None
        return self._values[bisect_left(totals, max(1, _rank(totals[-1], percent)))]


def draw(count: int, rng: random.Random) -> list[int]:
    """Return how often each of `count` things is drawn in `count` draws with replacement."""
    counts = Counter(rng.choices(range(count), k=count)) if count else Counter[int]()
    return [counts[index] for index in range(count)]


Resample = tuple[Sequence[int], Sequence[int]]


def resamples(num_before: int, num_after: int, num_resamples: int, rng: random.Random) -> list[Resample]:
    """Draw both of two samples again and again: how often each member of either was drawn."""
    return [(draw(num_before, rng), draw(num_after, rng)) for _ in range(num_resamples)]


def bootstrap(
    difference: Callable[[Sequence[int], Sequence[int]], float | None], drawn: Sequence[Resample], confidence: float
) -> Interval | None:
    """Return the percentile interval (Efron, 1979) of a difference between two samples.

    `difference` gets how often each member was drawn, and returns None where that leaves nothing to compare. None if
    too few draws could be compared for the interval to have ends.
    """
    found = sorted(value for pair in drawn if (value := difference(*pair)) is not None)
    outside = (1 - confidence) / 2 * 100
    if len(found) < max(20, 100 / outside - 1e-6):
        return None
    return Interval(percentile(found, outside), percentile(found, 100 - outside))


def _rank(count: int, percent: float) -> int:
    return -int(-count * percent // 100)
