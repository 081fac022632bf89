"""What serving costs: ratios and differences against the budgets, of what was measured only."""

from __future__ import annotations

from tests.benchmarks.bench_serve import cpu_by_part, more, more_to_first_token, verdict
from tests.benchmarks.report import Run, Summary


def make_summary(**figures: float) -> Summary:
    return Summary("name", "bf16", True, figures, frozenset())


def make_runs(*ttft_ms: float, first: int = 0) -> list[Run]:
    return [Run(first + i, {"ttft_ms": ttft, "itl_ms": ttft / 4}, 0.0) for i, ttft in enumerate(ttft_ms)]


def test_budgets_are_met_at_nine_tenths_and_five_milliseconds() -> None:
    alone, runs = make_summary(W1=100.0), make_runs(80.0)
    met = verdict(alone, make_summary(W1=90.0), runs, make_runs(84.0), ([80.0], [85.0]))
    missed = verdict(alone, make_summary(W1=89.0), runs, make_runs(84.0), ([80.0], [85.1]))
    assert met == {
        "w1_ratio": 0.9,
        "w1_met": True,
        "w2_itl_more_ms": 1.0,
        "w2_ttft_more_ms": 5.0,
        "w2_ttft_standard_error_ms": 0.0,
        "w2_ttft_more_ms_by_start": [5.0],
        "w2_met": True,
    }
    assert (missed["w1_met"], missed["w2_met"]) == (False, False)


def test_first_tokens_are_compared_with_the_call_beside_them() -> None:
    # The machine slows down meanwhile, and one call is far off.
    drift = [float(number) for number in range(100)]
    served = [at + 4.0 + number % 3 for number, at in enumerate(drift)]
    difference, error = more_to_first_token(drift, [*served[:50], 400.0, *served[51:]])
    assert difference == 5.0
    assert 0.0 < error < 0.5


def test_each_start_has_a_difference_of_its_own_and_a_call_without_one_beside_it_has_none() -> None:
    # Cut short, when the first call of the second start had been made alone.
    cost = verdict(make_summary(), make_summary(), [], [], ([80.0] * 201, [84.0] * 100 + [86.0] * 100))
    assert cost["w2_ttft_more_ms_by_start"] == [4.0, 6.0]


def test_a_difference_is_the_median_of_those_of_pairs() -> None:
    # The machine slows down meanwhile, and one run of each is far off.
    assert more("ttft_ms", make_runs(80, 100, 300, 140), make_runs(83, 104, 121, 144)) == 3.5
    assert more("ttft_ms", make_runs(80, 100), make_runs(103, 99, first=1)) == 3


def test_what_was_not_measured_has_no_verdict() -> None:
    assert verdict(make_summary(W1=100.0), make_summary(), make_runs(1.0), make_runs(2.0, first=1)) == {}
    assert verdict(make_summary(), make_summary(), [], [], ([80.0], [])) == {}


def test_cpu_is_the_median_of_each_part() -> None:
    runs = [Run(i, {}, 0.0, {"gateway": cost, "redis": 1.0}) for i, cost in enumerate((5.0, 50.0, 6.0))]
    assert cpu_by_part(runs) == {"gateway": 6.0, "redis": 1.0}
    assert cpu_by_part([]) == {}
