"""The measure of a leak by time: it sees one, and sees none where there is none."""

from __future__ import annotations

import random

import pytest

from tests.security.timing import area_under_roc


@pytest.mark.parametrize(
    ("foreign", "absent", "auc"),
    [([2.0, 3.0], [0.0, 1.0], 1.0), ([0.0, 1.0], [2.0, 3.0], 0.0), ([1.0, 1.0], [1.0, 1.0], 0.5), ([1, 3], [2], 0.5)],
)
def test_the_area_is_the_share_of_pairs_that_are_told_apart(
    foreign: list[float], absent: list[float], auc: float
) -> None:
    assert area_under_roc(foreign, absent) == auc


def test_a_hundredth_of_a_millisecond_shows_in_two_thousand_calls_and_chance_does_not() -> None:
    rng = random.Random(1)
    absent = [rng.gauss(1.3, 0.04) for _ in range(2000)]
    assert 0.45 < area_under_roc([rng.gauss(1.3, 0.04) for _ in range(2000)], absent) < 0.55
    assert area_under_roc([rng.gauss(1.31, 0.04) for _ in range(2000)], absent) > 0.55
