"""Turns of contestants: round by round, stopped in between, and one that fails does not end the rest."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import turns
from tests.benchmarks.report import Run
from tests.benchmarks.turns import ContestantFailed, Entry, Measurement
from tests.benchmarks.workload import NUM_VARIANTS, Request, Workload
from tests.unit.benchmarks.toy_contestant import CRASHES_AT


@pytest.fixture
def make_measurement(tmp_path: Path) -> Callable[..., Measurement]:
    def make(w2_tokens: int = 4, **options: int) -> Measurement:
        one = [[Request([1, 2, 3], 4)]] * NUM_VARIANTS
        runs = {"W1": one, "W2": [[Request([1, 2, 3], w2_tokens)]] * NUM_VARIANTS, "W3": one, "W4": one}
        path = tmp_path / "workload.json"
        path.write_text(Workload(runs, [Request([1], 2)], [], "").dump())
        return Measurement(path, tmp_path, threads=1, **options)

    return make


def make_entry(name: str, model: str = "toy", **rounds: int) -> Entry:
    module = "tests.unit.benchmarks.toy_contestant"
    return Entry(name=name, precision="bf16", module=module, model=model, rounds=rounds)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was run, in order."""
    lines: list[str] = []
    monkeypatch.setattr(turns, "note", lambda text: lines.append(":".join(text.split(":")[:2])))
    monkeypatch.setattr(turns, "is_quiet", lambda run: True)  # whatever else this machine does
    return lines


def test_each_runs_a_variant_before_any_runs_the_next(
    make_measurement: Callable[..., Measurement], order: list[str]
) -> None:
    with make_measurement(rounds=2) as measurement:
        measurement.start(make_entry("a"))
        measurement.start(make_entry("b", W3=1))
        order.clear()
        measurement.run(["W2", "W3"])
    assert not measurement.results.failures
    first = ["a bf16: W2 0", "b bf16: W2 0", "a bf16: W3 0", "b bf16: W3 0"]
    assert order == [*first, "a bf16: W2 1", "b bf16: W2 1", "a bf16: W3 1"]


def test_disturbed_runs_are_repeated_while_there_are_spare_ones(
    make_measurement: Callable[..., Measurement], monkeypatch: pytest.MonkeyPatch, order: list[str]
) -> None:
    monkeypatch.setattr(turns, "is_quiet", lambda run: run.variant == 1)
    with make_measurement(rounds=2, spare=1) as measurement:
        measurement.start(make_entry("a"))
        measurement.run(["W4"])
    runs: list[Run] = measurement.results.runs["a bf16"]["W4"]
    assert [run.variant for run in runs] == [0, 1, 2]


def test_alternating_turns_go_back_and_forth(
    make_measurement: Callable[..., Measurement], monkeypatch: pytest.MonkeyPatch, order: list[str]
) -> None:
    asked: list[Mapping[str, Any]] = []
    ask = turns.Seat.ask
    monkeypatch.setattr(turns.Seat, "ask", lambda seat, what, limit: (asked.append(what), ask(seat, what, limit))[1])
    with make_measurement() as measurement:
        measurement.start(make_entry("a"))
        measurement.start(make_entry("b"))
        order.clear()
        measurement.alternate("W2", NUM_VARIANTS + 1)
        measurement.first_tokens(3)
    assert order[:4] == ["a bf16: W2 0", "b bf16: W2 0", "b bf16: W2 1", "a bf16: W2 1"]
    assert [run.variant for run in measurement.results.runs["b bf16"]["W2"]] == list(range(NUM_VARIANTS + 1))
    assert [len(found) for found in measurement.results.first_tokens_ms.values()] == [3, 3]
    texts = [(what.get("variant", what.get("first_token")), what["first_token_id"]) for what in asked]
    assert len(set(texts)) == NUM_VARIANTS + 1 + 3, "each of a text that no other turn has"


def test_starting_anew_replaces_the_process_and_keeps_what_was_measured(
    make_measurement: Callable[..., Measurement], monkeypatch: pytest.MonkeyPatch, order: list[str]
) -> None:
    pids: list[int] = []
    start = turns.subprocess.Popen
    monkeypatch.setattr(
        turns.subprocess, "Popen", lambda *args, **more: (made := start(*args, **more), pids.append(made.pid))[0]
    )
    with make_measurement() as measurement:
        measurement.start(make_entry("a"))
        measurement.start(make_entry("b"))
        measurement.first_tokens(2)
        measurement.start_anew()
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids[:2]), "the earlier ones have ended"
        measurement.first_tokens(1)
    assert len(pids) == 4
    assert [len(found) for found in measurement.results.first_tokens_ms.values()] == [3, 3]
    assert not measurement.results.failures


def test_one_that_ends_is_reported_with_its_log_and_the_rest_go_on(
    make_measurement: Callable[..., Measurement], order: list[str]
) -> None:
    with make_measurement(w2_tokens=CRASHES_AT, rounds=1) as measurement:
        measurement.start(make_entry("a"))
        measurement.start(make_entry("b", W2=0))
        measurement.run(["W2", "W4"])
    assert list(measurement.results.failures) == ["a bf16"]
    assert "exit status 3" in measurement.results.failures["a bf16"]
    assert "out of luck" in measurement.results.failures["a bf16"]
    assert list(measurement.results.runs) == ["b bf16"]


def test_one_that_cannot_load_is_reported_and_takes_no_part(
    make_measurement: Callable[..., Measurement], order: list[str]
) -> None:
    with make_measurement(rounds=1) as measurement:
        measurement.start(make_entry("a", model="missing"))
        measurement.run(["W1"])
    assert "there is no such model" in measurement.results.failures["a bf16"]
    assert measurement.results.runs == {}


def test_what_was_measured_before_a_signal_to_end_is_kept(
    make_measurement: Callable[..., Measurement], monkeypatch: pytest.MonkeyPatch, order: list[str]
) -> None:
    with make_measurement(rounds=2) as measurement, measurement.until_cut():
        measurement.start(make_entry("a"))

        def note(text: str) -> None:
            if "W1 0" in text:  # said after the first run
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(turns, "note", note)
        measurement.run(["W1"])
    assert len(measurement.results.runs["a bf16"]["W1"]) == 1
    assert list(measurement.results.failures) == ["all"]


def test_an_order_given_once_is_answered_or_raises(
    make_measurement: Callable[..., Measurement], order: list[str]
) -> None:
    with make_measurement(w2_tokens=CRASHES_AT) as measurement:
        answer = measurement.once(make_entry("a"), {"workload": "W1", "variant": 0, "max_running": 1})
        assert answer["token_ids"] == [[1, 1, 1, 1]]
        assert "does not tell" in measurement.once(make_entry("a"), {"score": 1})["unable"]
        with pytest.raises(ContestantFailed, match="a bf16 has ended"):
            measurement.once(make_entry("a"), {"workload": "W2", "variant": 0})
