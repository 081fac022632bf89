"""What serving costs: ratios and differences against the budgets, of what was measured only."""

from __future__ import annotations

from tests.benchmarks.bench_serve import cpu_by_part, verdict
from tests.benchmarks.report import Run, Summary


def make_summary(**figures: float) -> Summary:
    return Summary("name", "bf16", True, figures, frozenset())


def test_budgets_are_met_at_nine_tenths_and_five_milliseconds() -> None:
    alone = make_summary(W1=100.0, W2_ttft=80.0, W2_itl=20.0)
    met = verdict(alone, make_summary(W1=90.0, W2_ttft=85.0, W2_itl=21.0))
    missed = verdict(alone, make_summary(W1=89.0, W2_ttft=85.1, W2_itl=20.0))
    assert met == {"w1_ratio": 0.9, "w1_met": True, "w2_ttft_more_ms": 5.0, "w2_itl_more_ms": 1.0, "w2_met": True}
    assert (missed["w1_met"], missed["w2_met"]) == (False, False)


def test_what_was_not_measured_has_no_verdict() -> None:
    assert verdict(make_summary(W1=100.0), make_summary(W2_ttft=1.0)) == {}


def test_cpu_is_the_median_of_each_part() -> None:
    runs = [Run(i, {}, 0.0, {"gateway": cost, "redis": 1.0}) for i, cost in enumerate((5.0, 50.0, 6.0))]
    assert cpu_by_part(runs) == {"gateway": 6.0, "redis": 1.0}
    assert cpu_by_part([]) == {}
