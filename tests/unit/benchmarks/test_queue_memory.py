"""Figures of the queue's memory: slopes from totals, and a run that is small enough for a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.embedded import EmbeddedServer
from tests.benchmarks import queue_memory
from tests.benchmarks.queue_memory import Row, Slope, Workload, measure, median_of, slopes_of, table


def make_row(num_tokens: int, retained: float, *, tokens_per_event: int = 1) -> Row:
    return Row(num_tokens, tokens_per_event, False, False, 1.0, 2.0, 3.0, retained, retained / num_tokens)


def test_a_slope_is_free_of_what_each_log_costs_once() -> None:
    rows = [make_row(100, 9000), make_row(1000, 45_000), make_row(100, 6000, tokens_per_event=4)]
    rows.append(make_row(1000, 15_000, tokens_per_event=4))
    assert slopes_of(rows) == [Slope(1, False, False, 40.0, 40.0), Slope(4, False, False, 40.0, 10.0)]
    assert len(table(rows, slopes_of(rows)).splitlines()) == 5


async def test_memory_grows_with_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_memory, "NUM_JOBS", 20)
    with EmbeddedServer(tmp_path) as server:
        await measure(server, Workload(10, 1, False, False))
        short, plain, rich = [
            median_of([await measure(server, Workload(*workload)) for _ in range(3)])
            for workload in ((40, 1, False, False), (400, 1, False, False), (400, 1, True, True))
        ]
    for row in (short, plain, rich):
        assert 1000 < row.queued < row.retained
    assert short.retained < plain.retained < rich.retained
