"""From options to a plan of levels, and the plan carried out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Final, TypeVar

import typer

from torchrelay.cli.bench.load import Caller, Connections
from torchrelay.cli.bench.samples import Level, Run
from torchrelay.cli.bench.slo import Slo, parse_duration, parse_slo
from torchrelay.cli.bench.workload import RandomWords, Workload, parse_lengths, poisson_arrivals, read_prompts

_T = TypeVar("_T")
_R = TypeVar("_R")

_CONCURRENCY: Final = "1,4,16"
_REQUESTS_PER_CALLER: Final = 4
_DURATION_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Which levels of load, for how long, and with which requests."""

    levels: Sequence[Level]
    workload: Workload
    num_requests: int | None  # of each caller, or all of a rate's; None: until `duration_s`
    duration_s: float | None
    num_warmup: int
    ignore_eos: bool
    seed: int
    slo: Slo | None
    target: float

    def total(self, level: Level) -> int | None:
        """Return how many requests a level has; None if that is not known before."""
        if level.is_open:
            return len(self.arrivals(level))
        return None if self.num_requests is None else self.num_requests * int(level.value)

    def arrivals(self, level: Level) -> list[float]:
        """Return when the requests of an open level arrive, in seconds from its beginning."""
        times = poisson_arrivals(level.value, f"{self.seed}/{level}")
        if self.num_requests is not None:
            return list(islice(times, self.num_requests))
        assert self.duration_s is not None
        end = self.duration_s
        return list(takewhile(lambda time: time < end, times))


def make_plan(
    *,
    concurrency: str | None,
    rate: str,
    requests: int | None,
    duration: str,
    prompts: Path | None,
    prompt_words: str | None,
    shared_prefix_words: int,
    max_tokens: int,
    ignore_eos: bool,
    warmup: int,
    seed: int,
    slo: str,
    target: float,
) -> Plan:
    """Return what a command's options ask for. Raises typer.BadParameter."""
    if concurrency is not None and rate:
        raise typer.BadParameter(
            "not together with --concurrency: arrivals do not wait for callers", param_hint="--rate"
        )
    if requests is not None and duration:
        raise typer.BadParameter("not together with --requests: either says when a level ends", param_hint="--duration")
    if prompts is not None and (prompt_words is not None or shared_prefix_words):
        other = "--prompt-words" if prompt_words is not None else "--shared-prefix-words"
        raise typer.BadParameter("not together with --prompts: the file says what is asked", param_hint=other)
    levels = _rates(rate) if rate else _callers(_CONCURRENCY if concurrency is None else concurrency)
    duration_s = _explained("--duration", parse_duration, duration) if duration else None
    if requests is None and duration_s is None:
        requests, duration_s = (None, _DURATION_S) if rate else (_REQUESTS_PER_CALLER, None)
    workload: Workload
    if prompts is not None:
        workload = _explained("--prompts", lambda path: read_prompts(path, max_tokens), prompts)
    else:
        lengths = _explained("--prompt-words", parse_lengths, prompt_words or "64")
        workload = RandomWords(lengths, max_tokens, shared_prefix_words)
    objectives = _explained("--slo", parse_slo, slo) if slo else None
    return Plan(levels, workload, requests, duration_s, warmup, ignore_eos, seed, objectives, target)


async def run_plan(
    connections: Connections, model: str, plan: Plan, begin: Callable[[str, int | None], Callable[[], None]]
) -> list[Run]:
    """Carry out a plan.

    `begin` is told of each level and its number of requests, and returns what to call at the end of each request.
    """
    if plan.num_warmup:
        warmup = islice(plan.workload.requests(f"{plan.seed}/warm-up"), plan.num_warmup)
        caller = Caller(connections, model, plan.ignore_eos, begin("warm-up", plan.num_warmup))
        callers = 1 if plan.levels[0].is_open else int(plan.levels[0].value)
        await caller.closed(callers, warmup)
    runs = []
    for level in plan.levels:
        what = f"{level} requests/s" if level.is_open else f"{level} callers"
        total = plan.total(level)
        caller = Caller(connections, model, plan.ignore_eos, begin(what, total), os.urandom(16))
        requests = plan.workload.requests(f"{plan.seed}/{level}")
        if level.is_open:
            runs.append(await caller.open(level.value, plan.arrivals(level), requests))
        else:
            runs.append(await caller.closed(int(level.value), islice(requests, total), plan.duration_s))
    return runs


def _callers(text: str) -> list[Level]:
    try:
        levels = [int(level) for level in text.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1:
        raise typer.BadParameter("takes positive numbers, such as 1,4,16", param_hint="--concurrency")
    return [Level(level) for level in levels]


def _rates(text: str) -> list[Level]:
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate <= 1e5 for rate in rates):
        raise typer.BadParameter("takes requests a second above 0, such as 0.5,1,2", param_hint="--rate")
    return [Level(rate, is_open=True) for rate in rates]


def _explained(option: str, read: Callable[[_T], _R], value: _T) -> _R:
    try:
        return read(value)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
