"""Runs as if they had been measured."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torchrelay.cli.bench.records import Record
from torchrelay.cli.bench.samples import Failure, Level, Run, Sample
from torchrelay.cli.bench.slo import Slo


def make_sample(
    first_token_s: float = 0.1,
    messages: Sequence[tuple[float, int]] = ((0.01, 1), (0.01, 1)),
    *,
    first_tokens: int = 1,
    intended_s: float = 0.0,
    lag_s: float = 0.0,
) -> Sample:
    total_s = first_token_s + sum(gap for gap, _ in messages)
    return Sample(intended_s, lag_s, first_token_s, total_s, first_tokens, list(messages), 3, 1, 0.002)


def make_run(
    level: Level, rng: random.Random, num_requests: int = 120, *, slower: float = 1.0, num_failures: int = 0
) -> Run:
    """A level whose times are drawn from one law, all of them `slower` times as long."""
    run = Run(level)
    at = 0.0
    for _ in range(num_requests):
        gaps = [(slower * rng.lognormvariate(-4.6, 0.2), 1) for _ in range(7)]
        run.samples.append(make_sample(slower * rng.lognormvariate(-2.3, 0.3), gaps, intended_s=at))
        at += run.samples[-1].total_s
    run.failures = [Failure(at, 0.0, 0.01, "QUEUE_FULL") for _ in range(num_failures)]
    run.elapsed_s, run.cpu_s, run.loop_lags_s = at, at / 100, [0.0001, 0.0002]
    return run


def make_record(
    rng: random.Random,
    levels: Sequence[Level] = (Level(1), Level(4)),
    *,
    slower: float = 1.0,
    num_requests: int = 120,
    num_failures: int = 0,
    slo: Slo | None = None,
) -> Record:
    about = {"time": "2026-11-26T12:00:00+00:00", "command": ["torchrelay", "bench"], "model": {"name": "tiny"}}
    runs = [make_run(level, rng, num_requests, slower=slower, num_failures=num_failures) for level in levels]
    return Record(about, runs, slo)
