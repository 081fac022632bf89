"""Two runs beside each other: which differences are larger than what chance explains. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from statistics import fmean
from typing import Final

from torchrelay.cli.bench.records import Record
from torchrelay.cli.bench.samples import Level, Run, Sample
from torchrelay.cli.bench.slo import Slo
from torchrelay.cli.bench.statistics import Interval, Pool, Resample, bootstrap, resamples

_SEED: Final = "torchrelay bench compare"
_NUM_RESAMPLES: Final = 1000
_MOST_WORK: Final = 20_000_000  # values looked at for one figure; fewer resamples above it
_FEWEST_RESAMPLES: Final = 400
_FEWEST_REQUESTS: Final = 10
_NUM_WINDOWS: Final = 24

# Of each request, the times that a figure is made of.
_TIMES: Final[dict[str, Callable[[Sample], Sequence[float]]]] = {
    "ttft": lambda sample: (sample.first_token_s,),
    "itl": lambda sample: tuple(sample.token_gaps()),
    "tpot": lambda sample: () if sample.tpot_s is None else (sample.tpot_s,),
    "e2e": lambda sample: (sample.total_s,),
}
_FIGURES: Final = (("ttft", 50), ("ttft", 99), ("itl", 50), ("itl", 99), ("tpot", 50), ("e2e", 50), ("e2e", 99))


class Verdict(StrEnum):
    """What can be said of a difference."""

    BETTER = "better"
    WORSE = "worse"
    NOISE = "noise"  # chance explains it
    UNKNOWN = "too few"  # requests to tell


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of one level in both runs. Times are in ms.

    `change` and `interval` are relative to the first run (0.05 is 5 % more), and points of a share for figures that are
    shares.
    """

    level: Level
    figure: str
    before: float
    after: float
    change: float
    interval: Interval | None
    more_is_better: bool = False

    @property
    def verdict(self) -> Verdict:
        if self.interval is None:
            return Verdict.UNKNOWN
        if not self.interval.excludes_zero:
            return Verdict.NOISE
        return Verdict.BETTER if (self.change > 0) == self.more_is_better else Verdict.WORSE

    def is_regression(self, above: float) -> bool:
        """Whether it is worse by more than `above`, and chance does not explain that it is worse."""
        return self.verdict is Verdict.WORSE and abs(self.change) > above


def compare(before: Record, after: Record, confidence: float = 0.99) -> list[Difference]:
    """Return every figure of the levels that both runs have. Raises ValueError if they have none in common.

    The intervals are of what varies within the runs, from request to request. What a machine does between two runs they
    cannot know.
    """
    others = {run.level: run for run in after.runs}
    pairs = [(run, others[run.level]) for run in before.runs if run.level in others]
    if not pairs:
        levels = (", ".join(str(run.level) for run in record.runs) for record in (before, after))
        raise ValueError("the runs have no level in common: {} and {}".format(*levels))
    slo = before.slo if before.slo == after.slo else None
    return [difference for one, other in pairs for difference in _differences(one, other, slo, confidence)]


def _differences(before: Run, after: Run, slo: Slo | None, confidence: float) -> Iterator[Difference]:
    draws = partial(_draws, rng=random.Random(_SEED))
    pools = {
        name: tuple(Pool([times(sample) for sample in run.samples]) for run in (before, after))
        for name, times in _TIMES.items()
    }
    most = max(sum(map(len, pair)) for pair in pools.values())
    drawn = draws(len(before.samples), len(after.samples), max(_FEWEST_RESAMPLES, _MOST_WORK // max(1, most)))
    for name, percent in _FIGURES:
        one, other = pools[name]
        old, new = one.percentile(percent), other.percentile(percent)
        if old is None or new is None or not old:
            continue
        # Of fewer values the percentile is the largest, however they are drawn.
        enough = min(len(one), len(other)) * (100 - percent) >= 100
        interval = bootstrap(partial(_percentile_change, one, other, percent), drawn if enough else (), confidence)
        yield Difference(before.level, f"{name} p{percent} ms", old * 1000, new * 1000, new / old - 1, interval)
    old_rates, new_rates = tokens_per_s(before), tokens_per_s(after)
    if sum(old_rates):
        old, new = fmean(old_rates), fmean(new_rates)
        windows = draws(_NUM_WINDOWS, _NUM_WINDOWS) if drawn else ()
        interval = bootstrap(partial(_mean_change, old_rates, new_rates), windows, confidence)
        yield Difference(before.level, "output tokens/s", old, new, new / old - 1, interval, more_is_better=True)
    shares: list[tuple[str, bool, tuple[list[float], list[float]]]] = [
        ("failed requests %", False, (_failed(before), _failed(after)))
    ]
    if slo is not None:
        shares.append(("goodput %", True, (_good(before, slo), _good(after, slo))))
    for figure, more_is_better, (olds, news) in shares:
        if not olds or not news:
            continue
        old, new = fmean(olds), fmean(news)
        interval = bootstrap(partial(_point_change, olds, news), draws(len(olds), len(news)), confidence)
        yield Difference(before.level, figure, old * 100, new * 100, new - old, interval, more_is_better)


def _draws(
    num_before: int, num_after: int, num_resamples: int = _NUM_RESAMPLES, *, rng: random.Random
) -> Sequence[Resample]:
    """Return what to draw of two samples; nothing where one is too small for that to say anything."""
    if min(num_before, num_after) < _FEWEST_REQUESTS:
        return ()
    return resamples(num_before, num_after, min(_NUM_RESAMPLES, num_resamples), rng)


def tokens_per_s(run: Run) -> list[float]:
    """Return the rate of output tokens in equal stretches of a level's time."""
    counts = [0] * _NUM_WINDOWS
    for sample in run.samples:
        for at, tokens in sample.arrivals():
            counts[min(_NUM_WINDOWS - 1, int(at / run.elapsed_s * _NUM_WINDOWS))] += tokens
    return [count * _NUM_WINDOWS / run.elapsed_s for count in counts]


def _failed(run: Run) -> list[float]:
    return [0.0] * len(run.samples) + [1.0] * len(run.failures)


def _good(run: Run, slo: Slo) -> list[float]:
    return [float(slo.is_met_by(sample)) for sample in run.samples] + [0.0] * len(run.failures)


def _percentile_change(
    before: Pool, after: Pool, percent: float, drawn: Sequence[int], drawn_after: Sequence[int]
) -> float | None:
    old, new = before.percentile(percent, drawn), after.percentile(percent, drawn_after)
    return None if old is None or new is None or not old else new / old - 1


def _mean(values: Sequence[float], drawn: Sequence[int]) -> float:
    return sum(value * times for value, times in zip(values, drawn, strict=True)) / sum(drawn)


def _mean_change(
    before: Sequence[float], after: Sequence[float], drawn: Sequence[int], drawn_after: Sequence[int]
) -> float | None:
    old, new = _mean(before, drawn), _mean(after, drawn_after)
    return new / old - 1 if old else None


def _point_change(
    before: Sequence[float], after: Sequence[float], drawn: Sequence[int], drawn_after: Sequence[int]
) -> float:
    return _mean(after, drawn_after) - _mean(before, drawn)
