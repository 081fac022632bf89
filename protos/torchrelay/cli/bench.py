"""`torchrelay bench`: a closed loop of callers over gRPC."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from torchrelay.cli import connection as at
from torchrelay.cli import output
from torchrelay.cli.generate import choose_model
from torchrelay.client import AsyncClient, RelayError

_WORDS = (
    "river", "stone", "morning", "letter", "garden", "winter", "engine", "bridge", "music", "paper", "silver", "window",
    "market", "ocean", "forest", "teacher", "signal", "harbor", "copper", "summer", "planet", "kitchen", "journey",
    "mountain", "record", "island",
)  # fmt: skip
_PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Sample:
    """Times of one request, in seconds from its start."""

    first_token_s: float
    total_s: float
    gaps_s: list[float]
    num_tokens: int


@dataclass(slots=True)
class Run:
    """What one level of concurrency measured."""

    concurrency: int
    elapsed_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        tokens = sum(sample.num_tokens for sample in self.samples)
        gaps = [gap for sample in self.samples for gap in sample.gaps_s]
        return {
            "concurrency": self.concurrency,
            "num_requests": len(self.samples),
            "num_errors": sum(self.errors.values()),
            "errors": self.errors,
            "output_tokens": tokens,
            "output_tokens_per_s": round(tokens / self.elapsed_s, 2) if self.elapsed_s else 0.0,
            "requests_per_s": round(len(self.samples) / self.elapsed_s, 3) if self.elapsed_s else 0.0,
            "ttft_ms": percentiles([sample.first_token_s for sample in self.samples]),
            "itl_ms": percentiles(gaps),
            "e2e_ms": percentiles([sample.total_s for sample in self.samples]),
        }


def percentiles(values: list[float]) -> dict[str, float]:
    """Return mean and percentiles in milliseconds, by nearest rank; empty without values."""
    if not values:
        return {}
    ordered = sorted(values)
    result = {"mean": sum(ordered) / len(ordered)}
    for percent in _PERCENTILES:
        rank = max(1, -(-len(ordered) * percent // 100))
        result[f"p{percent}"] = ordered[rank - 1]
    return {name: round(value * 1000, 2) for name, value in result.items()}


def make_prompt(num_words: int, rng: random.Random) -> str:
    """Return random words, so that no two requests share a prefix."""
    return " ".join(rng.choice(_WORDS) for _ in range(num_words))


async def run_level(
    client: AsyncClient, model: str, concurrency: int, num_requests: int, prompt_words: int, max_tokens: int, bar: Any
) -> Run:
    """Keep `concurrency` requests in flight until `num_requests` have ended."""
    run = Run(concurrency)
    rng = random.Random(concurrency)
    prompts = [make_prompt(prompt_words, rng) for _ in range(num_requests)]

    async def caller() -> None:
        while prompts:
            try:
                run.samples.append(await _one(client, model, prompts.pop(), max_tokens))
            except RelayError as error:
                name = error.reason or error.code.name
                run.errors[name] = run.errors.get(name, 0) + 1
            bar()

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(caller())
    run.elapsed_s = time.perf_counter() - started
    return run


async def _one(client: AsyncClient, model: str, prompt: str, max_tokens: int) -> Sample:
    started = last = time.perf_counter()
    first: float | None = None
    gaps: list[float] = []
    num_tokens = 0
    async for event in client.stream(prompt, model=model, max_tokens=max_tokens, temperature=0):
        if not event.HasField("deltas"):
            continue
        now = time.perf_counter()
        if first is None:
            first = now - started
        else:
            gaps.append(now - last)
        last = now
        num_tokens += sum(len(delta.token_ids) for delta in event.deltas.deltas)
    total = time.perf_counter() - started
    return Sample(first if first is not None else total, total, gaps, num_tokens)


@at.connected
def bench(
    concurrency: Annotated[
        str, typer.Option("--concurrency", "-c", help="Callers at a time; a list runs each.")
    ] = "1,4,16",
    requests: Annotated[int, typer.Option("--requests", "-r", min=1, help="Requests per caller.")] = 4,
    prompt_words: Annotated[int, typer.Option("--prompt-words", min=1, help="Words of each prompt.")] = 64,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of each answer.")] = 64,
    model: Annotated[str, typer.Option("--model", "-m", help="Model name.")] = "",
    as_json: at.JsonOption = False,
    *,
    connection: at.Connection,
) -> None:
    """Measure TTFT, ITL, end-to-end latency and throughput in a closed loop."""
    try:
        levels = [int(level) for level in concurrency.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1:
        raise typer.BadParameter("takes positive numbers, such as 1,4,16", param_hint="--concurrency")
    with output.explained_errors(connection.address):
        with connection.client() as client:
            name = choose_model(client, model)
        reports = asyncio.run(_run(connection, name, levels, requests, prompt_words, max_tokens))
    if as_json:
        for report in reports:
            output.print_json({"model": name} | report)
    else:
        columns = ("CALLERS", "REQUESTS", "ERRORS", "TOK/S", "TTFT p50/p99 ms", "ITL p50/p99 ms", "E2E p50/p99 ms")
        output.print_table(columns, [_row(report) for report in reports])
    if any(report["num_errors"] for report in reports):
        raise typer.Exit(1)


async def _run(
    connection: at.Connection, model: str, levels: list[int], requests: int, prompt_words: int, max_tokens: int
) -> list[dict[str, Any]]:
    reports = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    async with connection.aio_client() as client:
        with Progress(*columns, console=output.stderr, transient=True) as progress:
            for level in levels:
                total = level * requests
                task = progress.add_task(f"{level} callers", total=total)
                run = await run_level(
                    client, model, level, total, prompt_words, max_tokens, lambda task=task: progress.advance(task)
                )
                reports.append(run.report())
    return reports


def _row(report: dict[str, Any]) -> tuple[object, ...]:
    def pair(name: str) -> str:
        values = report[name]
        return f"{values['p50']:.0f} / {values['p99']:.0f}" if values else "-"

    return (
        report["concurrency"],
        report["num_requests"],
        report["num_errors"],
        report["output_tokens_per_s"],
        pair("ttft_ms"),
        pair("itl_ms"),
        pair("e2e_ms"),
    )
