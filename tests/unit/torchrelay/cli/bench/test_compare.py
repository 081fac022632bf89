from __future__ import annotations

import random

import pytest

from tests.unit.torchrelay.cli.bench.builders import make_record, make_run
from torchrelay.cli.bench.compare import Verdict, compare, tokens_per_s
from torchrelay.cli.bench.records import Record
from torchrelay.cli.bench.samples import Level
from torchrelay.cli.bench.slo import parse_slo

FIGURES = {
    "ttft p50 ms", "ttft p99 ms", "itl p50 ms", "itl p99 ms", "tpot p50 ms", "e2e p50 ms", "e2e p99 ms",
    "output tokens/s", "failed requests %",
}  # fmt: skip


def test_a_slower_run_is_worse_in_every_time_and_in_throughput() -> None:
    found = compare(make_record(random.Random(1)), make_record(random.Random(2), slower=1.5))
    assert {(difference.level, difference.figure) for difference in found} == {
        (level, figure) for level in (Level(1), Level(4)) for figure in FIGURES
    }
    for difference in found:
        if difference.figure == "failed requests %":
            assert difference.verdict is Verdict.NOISE
        elif "p99" not in difference.figure:
            assert difference.verdict is Verdict.WORSE
            assert difference.interval is not None
            assert difference.interval.low <= difference.change <= difference.interval.high
            assert difference.is_regression(0.2)
            assert not difference.is_regression(0.6)


def test_a_faster_run_is_better() -> None:
    found = compare(make_record(random.Random(1), [Level(1)]), make_record(random.Random(2), [Level(1)], slower=0.5))
    verdicts = {difference.figure: difference.verdict for difference in found}
    assert verdicts["ttft p50 ms"] is verdicts["output tokens/s"] is Verdict.BETTER
    assert not any(difference.is_regression(0) for difference in found)


def test_noise_is_not_called_a_regression() -> None:
    pairs = [
        (make_record(random.Random(n), [Level(1)]), make_record(random.Random(100 + n), [Level(1)])) for n in range(3)
    ]
    found = [difference for before, after in pairs for difference in compare(before, after)]
    assert any(abs(difference.change) > 0.02 for difference in found)  # there is noise
    assert sum(difference.is_regression(0) for difference in found) <= 1  # 27 figures at 99 %


def test_a_run_and_itself_differ_in_nothing() -> None:
    record = make_record(random.Random(1), [Level(1)])
    assert {(difference.change, difference.verdict) for difference in compare(record, record)} == {(0.0, Verdict.NOISE)}


def test_too_few_requests_tell_nothing() -> None:
    before, after = (make_record(random.Random(n), [Level(1)], num_requests=9, slower=n) for n in (1, 2))
    assert {difference.verdict for difference in compare(before, after)} == {Verdict.UNKNOWN}
    before, after = (make_record(random.Random(n), [Level(1)], num_requests=50, slower=n) for n in (1, 2))
    verdicts = {difference.figure: difference.verdict for difference in compare(before, after)}
    assert verdicts["ttft p99 ms"] is Verdict.UNKNOWN  # the largest of 50, whatever is drawn
    assert verdicts["itl p99 ms"] is verdicts["ttft p50 ms"] is Verdict.WORSE


def test_shares_differ_in_points() -> None:
    slo = parse_slo("ttft=100ms")
    before = make_record(random.Random(1), [Level(1)], slo=slo)
    after = make_record(random.Random(2), [Level(1)], slo=slo, num_failures=60, slower=2)
    found = {difference.figure: difference for difference in compare(before, after)}
    failed, good = found["failed requests %"], found["goodput %"]
    assert (failed.before, failed.after, failed.verdict) == (0.0, pytest.approx(100 / 3), Verdict.WORSE)
    assert failed.change == pytest.approx(1 / 3)
    assert good.verdict is Verdict.WORSE
    assert "goodput %" not in {each.figure for each in compare(before, make_record(random.Random(1), [Level(1)]))}


def test_only_levels_of_both_are_compared() -> None:
    before = make_record(random.Random(1), [Level(1), Level(2)], num_requests=10)
    after = make_record(random.Random(1), [Level(2), Level(3)], num_requests=10)
    assert {difference.level for difference in compare(before, after)} == {Level(2)}
    other = make_record(random.Random(1), [Level(2, is_open=True)], num_requests=10)
    with pytest.raises(ValueError, match="no level in common: 1, 2 and 2/s"):
        compare(before, other)


def test_runs_in_which_all_failed_are_compared_by_that_alone() -> None:
    before = make_record(random.Random(1), [Level(1)], num_requests=12)
    failed = make_run(Level(1), random.Random(1), 0, num_failures=12)
    failed.elapsed_s = 1.0
    (difference,) = (
        each for each in compare(before, Record(before.about, [failed])) if each.figure != "output tokens/s"
    )
    assert (difference.figure, difference.after, difference.verdict) == ("failed requests %", 100.0, Verdict.WORSE)


def test_throughput_adds_up() -> None:
    run = make_run(Level(1), random.Random(1))
    rates = tokens_per_s(run)
    assert sum(rates) / len(rates) * run.elapsed_s == pytest.approx(sum(sample.num_tokens for sample in run.samples))
