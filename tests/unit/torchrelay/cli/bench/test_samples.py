from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.torchrelay.cli.bench.builders import make_run, make_sample
from torchrelay.cli.bench.samples import Failure, Level, Run, best_level
from torchrelay.cli.bench.slo import Slo, parse_duration, parse_slo

MESSAGES = st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5)), max_size=8)


def test_tokens_of_one_message_share_its_time() -> None:
    sample = make_sample(0.5, [(0.4, 4), (0.1, 1)], first_tokens=2)
    assert list(sample.token_gaps()) == [0.1, 0.1, 0.1, 0.1, 0.1]
    assert sample.num_tokens == 7
    assert sample.tpot_s == pytest.approx(0.5 / 6)
    assert [tokens for _, tokens in sample.arrivals()] == [2, 4, 1]
    run = Run(Level(1), elapsed_s=1, samples=[sample])
    report = run.report()
    assert report["itl_ms"]["p99"] == 100
    assert report["message_gap_ms"]["p99"] == 400  # what the caller saw
    assert report["tokens_per_message"] == 2.33


@given(MESSAGES, st.integers(1, 4))
def test_gaps_of_tokens_add_up_to_the_time_behind_the_first(messages: list[tuple[float, int]], first: int) -> None:
    sample = make_sample(0.5, messages, first_tokens=first)
    gaps = list(sample.token_gaps())
    assert len(gaps) == sample.num_tokens - first
    assert sum(gaps) == pytest.approx(sample.total_s - sample.first_token_s, abs=1e-9)


def test_one_token_has_no_time_between_tokens() -> None:
    sample = make_sample(messages=[])
    assert sample.tpot_s is None
    assert Run(Level(1), 1.0, [sample]).report()["itl_ms"] == {}
    assert parse_slo("itl=1ms,tpot=1ms").is_met_by(sample)


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("1.5s", 1.5), ("2min", 120), ("50us", 5e-5), (" .5s", 0.5), ("3 s", 3)]
)
def test_times_have_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "0s", "-1s", "1h", "s", "1e3s", "nan s"])
def test_times_without_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 500ms"):
        parse_duration(text)


def test_objectives_are_read() -> None:
    slo = parse_slo("ttft=500ms, itl=50ms,e2e=10s")
    assert slo.as_ms() == {"ttft": 500, "itl": 50, "e2e": 10_000}
    assert Slo.from_ms(slo.as_ms()) == slo
    assert str(slo) == "ttft 500 ms, itl 50 ms, e2e 10 s"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing"),
        ("ttft", "ttft=TIME"),
        ("p99=1s", "p99"),
        ("ttft=1s,ttft=2s", "twice"),
        ("e2e=5", "such as 500ms"),
    ],
)
def test_objectives_without_sense_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_slo(text)


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        ("ttft=100ms", True),
        ("ttft=99ms", False),
        ("itl=30ms", True),
        ("itl=29ms", False),
        ("tpot=20ms", True),
        ("tpot=19ms", False),
        ("e2e=140ms", True),
        ("e2e=139ms", False),
        ("ttft=1s,itl=29ms", False),
    ],
)
def test_a_request_has_to_keep_to_every_bound(slo: str, met: bool) -> None:
    sample = make_sample(0.1, [(0.03, 1), (0.01, 1)])
    sample.total_s = 0.14
    assert parse_slo(slo).is_met_by(sample) is met


def test_requests_that_failed_are_not_good() -> None:
    run = Run(Level(2), elapsed_s=2.0, samples=[make_sample(0.1), make_sample(0.3)])
    slo = parse_slo("ttft=200ms")
    assert run.goodput(slo) == {"fraction": 0.5, "requests_per_s": 0.5}
    run.failures = [Failure(0, 0, 1, "QUEUE_FULL")] * 2
    assert run.goodput(slo) == {"fraction": 0.25, "requests_per_s": 0.5}
    assert Run(Level(1)).goodput(slo) == {"fraction": 0.0, "requests_per_s": 0.0}
    report = run.report(slo)
    assert report["errors"] == {"QUEUE_FULL": 2}
    assert (report["slo"], report["goodput"]["fraction"]) == ({"ttft": 200}, 0.25)


@given(st.lists(st.floats(0.001, 5), min_size=1, max_size=30), st.floats(0.001, 5), st.floats(0.001, 5))
def test_goodput_grows_with_the_bound(times: list[float], bound: float, other: float) -> None:
    run = Run(Level(1), 1.0, [make_sample(time) for time in times])
    low, high = (run.goodput(Slo({"ttft": each}))["fraction"] for each in sorted((bound, other)))
    assert 0 <= low <= high <= 1
    assert run.goodput(Slo({"ttft": max(times)}))["fraction"] == 1


def test_the_best_level_is_the_highest_that_met_the_objectives() -> None:
    slo = parse_slo("ttft=200ms")
    runs = [Run(Level(rate, is_open=True), 1.0, [make_sample(ttft)]) for rate, ttft in ((1, 0.1), (4, 0.3), (2, 0.1))]
    assert best_level(runs, slo, 0.99) == Level(2, is_open=True)
    assert best_level(runs, parse_slo("ttft=1ms"), 0.99) is None
    assert best_level(runs, parse_slo("ttft=1ms"), 0.0) == Level(4, is_open=True)
    assert best_level([], slo, 0.5) is None


def test_a_generator_that_is_the_bottleneck_is_told() -> None:
    run = make_run(Level(5, is_open=True), random.Random(1))
    assert not run.is_generator_bound()
    for sample in run.samples[:3]:
        sample.lag_s = 0.2
    assert run.is_generator_bound()
    busy = make_run(Level(5), random.Random(1))
    busy.cpu_s = 0.9 * busy.elapsed_s
    assert busy.is_generator_bound()
    late = make_run(Level(5), random.Random(1))
    late.loop_lags_s = [0.5]
    assert late.is_generator_bound()
    late.loop_lags_s = []
    assert not late.is_generator_bound()


def test_levels_name_themselves() -> None:
    assert (str(Level(4)), str(Level(0.5, is_open=True))) == ("4", "0.5/s")
    assert Level(4).keys() == {"mode": "closed", "concurrency": 4, "rate": None}
    assert Level(0.5, is_open=True).keys() == {"mode": "open", "concurrency": None, "rate": 0.5}
