"""Figures from runs: the quietest count, ratios say how many times better ours is, tables show what is missing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks.report import (
    Drift,
    Run,
    Summary,
    drift,
    figures_of,
    fractions,
    quietest,
    ratio,
    ratio_table,
    ratios,
    table,
)


def make_run(variant: int, others_cpu: float = 0.0, **figures: float) -> Run:
    return Run(variant, figures, others_cpu)


def make_summary(name: str, precision: str = "bf16", **options: Any) -> Summary:
    options.setdefault("is_ours", name == "torchrelay")
    options.setdefault("disturbed", frozenset())
    return Summary(name, precision, **options)


def test_quietest_runs_count_in_the_order_they_ran() -> None:
    runs = [make_run(0, 0.3), make_run(1, 0.01), make_run(2, 0.2), make_run(3, 0.0)]
    assert [run.variant for run in quietest(runs, 2)] == [1, 3]
    assert [run.variant for run in quietest(runs, 9)] == [0, 1, 2, 3]


def test_figures_are_medians_and_name_what_was_disturbed() -> None:
    runs = {
        "W1": [make_run(i, out_tok_s=speed, itl_p50_ms=1.0) for i, speed in enumerate((10.0, 30.0, 20.0))],
        "W2": [make_run(0, 0.2, ttft_ms=5.0, itl_ms=2.0), make_run(1, 0.0, ttft_ms=7.0, itl_ms=4.0)],
    }
    figures, disturbed = figures_of(runs, {"W1": 3, "W2": 2, "W3": 3, "W4": 3})
    assert figures == {"W1": 20.0, "W2_ttft": 6.0, "W2_itl": 3.0}
    assert disturbed == {"W2_ttft", "W2_itl"}


@pytest.mark.parametrize("key", ["W1", "W3", "W4"])
def test_ratio_of_rates_is_above_one_where_ours_is_higher(key: str) -> None:
    assert ratio(key, 300.0, 200.0) == 1.5


@pytest.mark.parametrize("key", ["W2_ttft", "W2_itl", "RSS"])
def test_ratio_of_times_and_memory_is_above_one_where_ours_is_lower(key: str) -> None:
    assert ratio(key, 200.0, 300.0) == 1.5


def test_ratios_stay_within_a_precision_and_leave_out_what_was_not_measured() -> None:
    ours = make_summary("torchrelay", figures={"W1": 300.0, "W2_itl": 10.0, "RSS": 800})
    fast = make_summary("fast", figures={"W1": 200.0, "RSS": 1600})
    other = make_summary("other", "int8", figures={"W1": 1.0})
    assert ratios([ours, fast, other]) == {"W1": {"bf16": {"fast": 1.5}}, "RSS": {"bf16": {"fast": 2.0}}}


def test_drift_counts_tokens_before_the_first_difference() -> None:
    assert drift([[1, 2, 3, 4], [1, 9, 3, 4]], [[1, 2, 3, 4], [1, 2, 3, 4]]) == Drift(1, 2, 0.625)
    assert drift([[1, 2]], [[1, 2, 3, 4]]) == Drift(0, 1, 0.5)


def test_fractions_of_the_limit_for_rates_and_times() -> None:
    summary = make_summary("torchrelay", figures={"W1": 300.0, "W2_itl": 20.0, "RSS": 800})
    assert fractions([summary], {"bf16": {"W1": 600.0, "W2_itl": 10.0}}) == {
        "torchrelay": {"bf16": {"W1": 0.5, "W2_itl": 0.5}}
    }


def test_table_shows_limits_gaps_stars_and_parts() -> None:
    summary = make_summary(
        "torchrelay",
        figures={"W1": 301.4, "RSS": 812},
        disturbed=frozenset({"W1"}),
        partial={"W1": 16},
        ready_s=2.5,
        first_token_s=2.75,
        drift=Drift(5, 8, 0.75),
    )
    lines = table([summary], {"bf16": dict.fromkeys(("W1", "W2_ttft", "W2_itl", "W3", "W4"), 99.9)}).splitlines()
    assert lines[2].startswith("| *limit* | *bf16* | *100* |")
    assert lines[3] == ("| torchrelay | bf16 | 301* (16 requests) | - | - | - | - | 812 | 2.5 | 2.8 | 5/8 (0.75) |")
    assert lines[-1].startswith("\\* others used 5%")


def test_ratio_table_has_a_row_for_each_peer_and_for_the_best_of_them() -> None:
    found = {"W1": {"bf16": {"vllm": 1.234, "slow": 9.0}}, "RSS": {"bf16": {"vllm": 2.0}, "int8": {"openvino": 0.5}}}
    assert ratio_table(found).splitlines()[2:] == [
        "| vllm | bf16 | 1.23 | 2.00 |",
        "| slow | bf16 | 9.00 | - |",
        "| **the best of them** | bf16 | **1.23** | **2.00** |",
        "| openvino | int8 | - | 0.50 |",
        "| **the best of them** | int8 | - | **0.50** |",
    ]
