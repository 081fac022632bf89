from __future__ import annotations

import random
from statistics import fmean

from hypothesis import given
from hypothesis import strategies as st

from torchrelay.cli.bench.statistics import Interval, Pool, bootstrap, draw, percentile, percentiles, resamples

NUMBERS = st.floats(0, 1e6)


def test_percentiles_are_nearest_ranks_in_milliseconds() -> None:
    assert percentiles([]) == {}
    assert percentiles([0.003]) == {"mean": 3.0, "p50": 3.0, "p90": 3.0, "p95": 3.0, "p99": 3.0}
    hundred = [number / 1000 for number in range(100, 0, -1)]
    assert percentiles(hundred) == {"mean": 50.5, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([0.001, 0.002, 0.003]) == {"mean": 2.0, "p50": 2.0, "p90": 3.0, "p95": 3.0, "p99": 3.0}


@given(st.lists(NUMBERS, min_size=1), st.integers(1, 100))
def test_a_percentile_is_the_least_value_with_enough_at_or_below_it(values: list[float], percent: int) -> None:
    ordered = sorted(values)
    found = percentile(ordered, percent)
    assert sum(value <= found for value in values) * 100 >= percent * len(values)
    assert sum(value < found for value in values) * 100 < percent * len(values)


@given(
    st.lists(st.tuples(st.lists(NUMBERS, max_size=4), st.integers(0, 3)), min_size=1, max_size=12),
    st.sampled_from([1, 50, 95, 99]),
)
def test_a_weighted_percentile_is_that_of_values_written_out(
    groups: list[tuple[list[float], int]], percent: int
) -> None:
    pool = Pool([values for values, _ in groups])
    written_out = sorted(value for values, times in groups for value in values * times)
    expected = percentile(written_out, percent) if written_out else None
    assert pool.percentile(percent, [times for _, times in groups]) == expected
    assert pool.percentile(percent) == pool.percentile(percent, [1] * len(groups))


@given(st.integers(0, 50), st.integers())
def test_as_many_are_drawn_as_there_are(count: int, seed: int) -> None:
    drawn = draw(count, random.Random(seed))
    assert (len(drawn), sum(drawn)) == (count, count)


def _interval(before: list[float], after: list[float], seed: int, confidence: float = 0.9) -> Interval | None:
    def difference(drawn: object, drawn_after: object) -> float:
        means = []
        for values, times in ((before, drawn), (after, drawn_after)):
            means.append(sum(value * n for value, n in zip(values, times, strict=True)) / len(values))  # type: ignore[call-overload]
        return means[1] - means[0]

    rng = random.Random(seed)
    return bootstrap(difference, resamples(len(before), len(after), 200, rng), confidence)


def test_intervals_hold_the_true_difference_about_as_often_as_they_say() -> None:
    held, excluded = 0, 0
    for seed in range(60):
        rng = random.Random(seed)
        before = [rng.gauss(10, 2) for _ in range(30)]
        after = [rng.gauss(11, 2) for _ in range(30)]
        again = [rng.gauss(10, 2) for _ in range(30)]
        interval, null = _interval(before, after, seed), _interval(before, again, seed)
        assert interval is not None
        assert null is not None
        held += interval.low <= 1 <= interval.high
        excluded += null.excludes_zero
    # Of 60 at 90 %: a binomial's 0.1 % tails, and a little for the percentile method, which is narrow for few values.
    assert 44 <= held <= 59
    assert excluded <= 16


def test_a_clear_difference_is_seen_and_its_size_is_in_the_interval() -> None:
    rng = random.Random(3)
    before = [rng.gauss(10, 1) for _ in range(100)]
    after = [rng.gauss(20, 1) for _ in range(100)]
    interval = _interval(before, after, 1, confidence=0.99)
    assert interval is not None
    assert interval.excludes_zero
    assert interval.low <= fmean(after) - fmean(before) <= interval.high


def test_no_interval_is_made_of_draws_that_could_not_be_compared() -> None:
    drawn = resamples(5, 5, 100, random.Random(1))
    assert bootstrap(lambda *_: None, drawn, 0.9) is None
    assert bootstrap(lambda *_: 1.0, drawn, 0.99) is None  # half a percent of 100 is none
    assert bootstrap(lambda *_: 1.0, drawn, 0.9) == Interval(1.0, 1.0)
    assert bootstrap(lambda *_: 1.0, [], 0.9) is None
