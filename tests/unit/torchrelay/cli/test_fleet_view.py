"""What operators see: tables that fit their terminal, and rates from what heartbeats count."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from torchrelay.admin.v1beta1 import fleet_pb2 as pb
from torchrelay.cli.fleet_rates import Rates
from torchrelay.cli.fleet_view import Frame, queue_rows, short_s
from torchrelay.v1 import generation_pb2, model_pb2

NOW_MS = 1_800_000_000_000
HIGH, NORMAL, LOW = generation_pb2.PRIORITY_HIGH, generation_pb2.PRIORITY_NORMAL, generation_pb2.PRIORITY_LOW


def make_worker(name: str = "abcdefghij", *, age_ms: int = 400, tokens: int = 0, **fields: Any) -> pb.Worker:
    worker = pb.Worker(
        worker_id=name.ljust(26, "x"),
        model="smollm2-135m-instruct",
        device="cpu AMD EPYC",
        num_running=12,
        num_waiting=3,
        num_blocks=400,
        num_free_blocks=100,
        generated_tokens=tokens,
        **fields,
    )
    worker.last_step_time.FromMicroseconds(31_500)
    worker.report_time.FromMilliseconds(NOW_MS - age_ms)
    return worker


def make_model(name: str = "smollm2-135m-instruct", waiting: int = 41) -> pb.FleetModel:
    model = pb.FleetModel(
        model=name, model_revision="0123456789abcdef", state=model_pb2.MODEL_STATE_READY, num_workers=2, num_running=24,
        num_dead_letters=5,
    )  # fmt: skip
    for priority, count in ((HIGH, 0), (NORMAL, waiting), (LOW, 7)):
        one = model.classes.add(priority=priority, num_waiting=count)
        if count:
            one.oldest_wait.FromMilliseconds(83_000 if priority == NORMAL else 9_500)
            one.expected_wait.FromMilliseconds(12_000)
    for tenant, priority, count, wait_ms in (("acme", NORMAL, waiting, 83_000), ("batchers", LOW, 7, 9_500)):
        part = model.tenants.add(tenant=tenant, priority=priority, num_waiting=count)
        part.oldest_wait.FromMilliseconds(wait_ms)
    return model


def make_snapshot(*workers: pb.Worker, at_ms: int = NOW_MS, generations: int = 3) -> pb.FleetSnapshot:
    snapshot = pb.FleetSnapshot(
        gateway=pb.FleetGateway(gateway_id="g" * 26, version="0.1.0", num_streams=24),
        workers=workers or [make_worker()],
        models=[make_model()],
        num_running=24,
    )
    snapshot.time.FromMilliseconds(at_ms)
    for index in range(generations):
        info = snapshot.generations.add(
            generation_id=f"smollm2-135m-instruct-0123456789abcdef.{chr(97 + index) * 26}",
            model="smollm2-135m-instruct",
            tenant="acme",
            worker_id="abcdefghij".ljust(26, "x"),
        )
        info.create_time.FromMilliseconds(NOW_MS - 60_000 * (index + 1))
        info.usage.completion_tokens = 100 * index
    return snapshot


def text_of(frame: Frame, width: int, height: int = 50) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(frame.render(width, height))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in lines)
    return lines


def row_of(lines: list[str], start: str) -> list[str]:
    return next(line.split() for line in lines if line.startswith(start))


def cells(lines: list[str], start: str) -> dict[str, str]:
    """The last words of the row's cells, by the heading above them: numbers stand flush right below theirs."""
    at = next(index for index, line in enumerate(lines) if line.startswith(start))
    head = next(line for line in reversed(lines[:at]) if line.split() and line.split()[0].isupper())
    found, begin = {}, 0
    for title in head.split():
        end = head.index(title, begin) + len(title)
        found[title] = lines[at][begin:end].split()[-1]
        begin = end
    return found


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_picture_fits_the_terminal_and_shows_what_matters(width: int) -> None:
    lines = text_of(Frame(make_snapshot()), width)
    assert "24 running, 48 waiting" in lines[0]
    row = cells(lines, "abcdefgh")
    assert (row["RUN"], row["WAIT"], row["KV"]) == ("12", "3", "75%")
    queue = next(line for line in lines if " ready " in line)
    assert queue.split()[-1] == "5"
    assert ("REVISION" in " ".join(lines)) == (width >= 110)
    assert any(line.startswith("acme") for line in lines)


def test_at_80_columns_no_number_is_cut() -> None:
    stats = {"busy_ratio": 0.973, "memory_used_bytes": 61_000_000_000, "memory_total_bytes": 80_000_000_000}
    worker = make_worker(**stats)
    worker.time_to_first_token_p50.FromMilliseconds(123)
    worker.time_to_first_token_p95.FromMilliseconds(1234)
    rates = Rates()
    rates.add(make_snapshot(make_worker(tokens=0, age_ms=4400)))
    worker.generated_tokens = 49_380
    snapshot = make_snapshot(worker)
    rates.add(snapshot)
    narrow, wide = (text_of(Frame(snapshot, rates), width) for width in (80, 160))
    numbers = ["12", "3", "75%", "32", "ms", "12,345", "123", "ms"]
    assert row_of(narrow, "abcdefgh")[2:] == [*numbers, "97%", "400", "ms"]
    assert "61.0 GB of 80.0 GB" in "\n".join(wide)
    assert row_of(wide, "abcdefgh")[5:14] == [*numbers, "1.2"]
    assert "12,345 tok/s" in narrow[0]


def test_what_is_not_known_is_a_dash() -> None:
    worker = pb.Worker(worker_id="abcdefghij", model="m")
    row = cells(text_of(Frame(make_snapshot(worker)), 80), "abcdefgh")
    assert [row[name] for name in ("KV", "TOK/S", "TTFT", "BUSY", "AGE")] == ["-"] * 5


def test_a_worker_that_is_to_leave_says_who_asked() -> None:
    asked = make_worker("aaaaaaaaaa", drain_requested_by="key-1")
    leaving = make_worker("bbbbbbbbbb", drain_requested_by="key-1", draining=True)
    by_signal = make_worker("cccccccccc", draining=True)
    lines = text_of(Frame(make_snapshot(asked, leaving, by_signal)), 160)
    ends = [next(line for line in lines if line.startswith(start)) for start in ("aaaa", "bbbb", "cccc")]
    assert ends[0].endswith("drain asked (key-1)")
    assert ends[1].endswith("draining (key-1)")
    assert ends[2].endswith(" draining")


@pytest.mark.parametrize("height", [24, 60])
def test_a_large_fleet_fits_the_lines_of_the_terminal_and_says_what_is_left_out(height: int) -> None:
    snapshot = make_snapshot(*(make_worker(f"worker{index:02}") for index in range(40)), generations=100)
    snapshot.models.extend(make_model(f"model-{index}") for index in range(20))
    lines = text_of(Frame(snapshot, note="the gateway does not answer; trying again"), 80, height)
    assert len(lines) <= height
    assert lines[1] == "the gateway does not answer; trying again"
    assert sum("more" in line for line in lines) == 4
    assert any(line.startswith("aaaaaaaa") for line in lines), "the longest running generation is there"


def test_an_empty_fleet_is_a_picture_too() -> None:
    snapshot = pb.FleetSnapshot()
    snapshot.time.FromMilliseconds(NOW_MS)
    lines = text_of(Frame(snapshot), 80)
    assert lines.count("none") == 2
    assert "- tok/s" in lines[0]


def test_names_are_shown_as_they_are() -> None:
    snapshot = make_snapshot()
    snapshot.models[0].tenants[0].tenant = "[red]acme[/]"
    assert any(line.startswith("[red]acme[/]") for line in text_of(Frame(snapshot), 120))


# -- rates


def report(tokens: int, at_ms: int, *, seen_ms: int | None = None) -> pb.FleetSnapshot:
    worker = make_worker("w", tokens=tokens, prompt_tokens=tokens // 2)
    worker.report_time.FromMilliseconds(at_ms)
    return make_snapshot(worker, at_ms=at_ms if seen_ms is None else seen_ms)


WORKER = "w".ljust(26, "x")


def test_a_rate_is_what_was_counted_between_reports_not_between_snapshots() -> None:
    rates = Rates()
    rates.add(report(100, 10_000))
    assert rates.generated_per_s(WORKER) is None
    assert not rates.is_known(report(100, 10_000))
    for seen_ms in (10_500, 11_000, 11_500):
        rates.add(report(100, 10_000, seen_ms=seen_ms))
    assert rates.generated_per_s(WORKER) is None
    rates.add(report(300, 12_000, seen_ms=12_100))
    assert rates.generated_per_s(WORKER) == 100.0
    assert rates.is_known(report(300, 12_000))


def test_a_rate_forgets_what_is_long_ago_and_whoever_left() -> None:
    rates = Rates()
    for second in range(0, 60, 2):
        rates.add(report(0 if second < 30 else 50 * (second - 30), second * 1000))
    assert rates.generated_per_s(WORKER) == 50.0
    rates.add(make_snapshot(make_worker("other")))
    assert rates.generated_per_s(WORKER) is None


def test_an_older_worker_that_does_not_tell_when_is_timed_by_the_snapshots() -> None:
    rates = Rates()
    for second, tokens in ((1, 0), (2, 0), (3, 60)):
        snapshot = report(tokens, 0, seen_ms=second * 1000)
        snapshot.workers[0].ClearField("report_time")
        rates.add(snapshot)
    assert rates.generated_per_s(WORKER) == 30.0


# -- the queue


def test_the_queue_is_a_line_for_each_class_and_each_tenant() -> None:
    snapshot = make_snapshot()
    snapshot.models[0].has_more_tenants = True
    snapshot.models.add(model="idle")
    assert queue_rows(snapshot) == [
        ("smollm2-135m-instruct", "normal", "all", "41", "1 min", "12 s"),
        ("smollm2-135m-instruct", "normal", "acme", "41", "1 min", ""),
        ("smollm2-135m-instruct", "normal", "... and more", "", "", ""),
        ("smollm2-135m-instruct", "low", "all", "7", "9.5 s", "12 s"),
        ("smollm2-135m-instruct", "low", "batchers", "7", "9.5 s", ""),
        ("smollm2-135m-instruct", "low", "... and more", "", "", ""),
        ("idle", "-", "-", "0", "-", "-"),
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 ms"), (0.0004, "0.4 ms"), (0.0852, "85 ms"), (1.24, "1.2 s"), (59, "59 s"), (61, "1 min"),
        (7300, "2 h"), (200_000, "2 d"),
    ],
)  # fmt: skip
def test_durations_are_short(seconds: float, shown: str) -> None:
    assert short_s(seconds) == shown
