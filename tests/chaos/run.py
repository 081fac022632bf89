"""`make chaos SEED=1 DURATION=60`: a system under load, a nemesis, a checker. The last line is one JSON object.

Exits with 1 when a law was broken; the history then stays in the folder that is named.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import redis as redis_sync

from common import keys
from common.settings import QueueSettings
from tests.chaos.callers import Callers
from tests.chaos.checker import Evidence, Report, check
from tests.chaos.faults import FAULTS, HOUR_S
from tests.chaos.history import History
from tests.chaos.nemesis import Nemesis
from tests.chaos.system import QUEUE_ENV, ChaosSystem, Size
from tests.chaos.truth import LENGTHS, Truth, compute, make_model
from tests.integration.common.invariants import take_snapshot
from torchrelay.client import AsyncClient


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do to what."""

    seed: int = 1
    duration_s: float = 60.0
    interval_s: float = 5.0  # between two faults
    num_callers: int = 24
    num_prompts: int = 24
    size: Size = field(default_factory=Size)
    kinds: tuple[str, ...] = tuple(FAULTS)
    patches: tuple[str, ...] = ()
    give_up_s: float = 120.0  # of a caller without news
    settle_s: float = 60.0  # for what goes on without a caller
    is_durable: bool = True
    env: Mapping[str, str] = field(default_factory=dict)  # further settings of gateways and workers


@dataclass(slots=True)
class Result:
    """What came of it."""

    report: Report
    history: History
    seconds: float


async def run(
    plan: Plan,
    folder: Path,
    cache: Path | None = None,
    watch: Callable[[ChaosSystem], Coroutine[None, None, None]] | None = None,
) -> Result:
    """Run one system under one nemesis, and judge. `watch` runs beside them, until it is cancelled."""
    rng = random.Random(plan.seed)
    model = make_model(folder / "model")
    truth = compute(model, plan.num_prompts, cache)
    history = History()
    began = time.monotonic()
    async with ChaosSystem(
        folder,
        model,
        plan.size,
        random.Random(rng.random()),
        patches=plan.patches,
        env=dict(plan.env),
        is_durable=plan.is_durable,
    ) as system:
        texts = await undisturbed(system, truth)
        callers = Callers(system, truth, history, random.Random(rng.random()), plan.num_callers, plan.give_up_s)
        nemesis = Nemesis(system, history, random.Random(rng.random()), plan.interval_s, plan.kinds)
        watching = asyncio.create_task(_nothing() if watch is None else watch(system))
        calling = asyncio.create_task(callers.run())
        acting = asyncio.create_task(nemesis.run())
        try:
            done, _ = await asyncio.wait(
                {calling, acting}, timeout=plan.duration_s, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()  # neither ends by itself but by a fault of its own
            nemesis.stop()
            await acting
            callers.stop()
            try:
                await system.wait_until_whole(plan.settle_s)
            except AssertionError as error:
                history.complaints.append(f"serves again: {error}")
            with contextlib.suppress(TimeoutError):  # who still waits then is a violation
                await asyncio.wait_for(calling, plan.give_up_s + plan.settle_s)
            await settle(system, plan.settle_s)
        finally:
            for task in (calling, acting, watching):
                task.cancel()
            *_, watched = await asyncio.gather(calling, acting, watching, return_exceptions=True)
        if isinstance(watched, Exception):
            raise watched
        snapshot = await asyncio.to_thread(_snapshot, system)
    is_whole = "TORCHRELAY_QUEUE_RETENTION_MS" not in plan.env
    report = check(Evidence(history, snapshot, truth, _settings(plan), texts, is_whole))
    return Result(report, history, time.monotonic() - began)


async def _nothing() -> None:
    """Watch nothing."""


def _settings(plan: Plan) -> QueueSettings:
    """Return the bounds that hold; a server's clock that is moved moves what it keeps by as much."""
    named = {**QUEUE_ENV, **plan.env}.items()
    values = {name.removeprefix("TORCHRELAY_QUEUE_").lower(): value for name, value in named}
    settings = QueueSettings.model_validate(values)
    moved_ms = HOUR_S * 1000 if "step-clock-of-server" in plan.kinds else 0
    return settings.model_copy(update={"retention_ms": settings.retention_ms + moved_ms})


async def undisturbed(system: ChaosSystem, truth: Truth) -> dict[tuple[int, int], str]:
    """Ask for everything that callers will ask for before anything is harmed. Raises AssertionError if it is wrong."""
    gateway = system.gateways[0]
    async with AsyncClient(gateway.address, api_key=next(iter(system.keys.values())), insecure=True) as client:

        async def ask(prompt: int, max_tokens: int) -> tuple[tuple[int, int], str]:
            stream = client.stream(truth.prompts[prompt], model="tiny", max_tokens=max_tokens, temperature=0)
            token_ids: list[int] = []
            text = ""
            async for event in stream:
                for delta in event.deltas.deltas:
                    token_ids += delta.token_ids
                    text += delta.text
            assert token_ids == truth.output(prompt, max_tokens), f"prompt {prompt} is answered wrongly without a fault"
            return (prompt, max_tokens), text

        pairs = [(prompt, length) for prompt in range(len(truth.prompts)) for length in LENGTHS]
        return dict(await asyncio.gather(*(ask(*pair) for pair in pairs)))


async def settle(system: ChaosSystem, timeout_s: float) -> None:
    """Wait until nothing is in flight: what callers have left ends by itself when its grace has passed."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if not await system.superuser.zcard(keys.deadlines(system.shard)):
            return
        await asyncio.sleep(0.2)


def _snapshot(system: ChaosSystem):  # type: ignore[no-untyped-def]
    with redis_sync.Redis(unix_socket_path=str(system.server.socket_path)) as client:
        return take_snapshot(client, system.shard)


def figures(plan: Plan, result: Result) -> dict[str, object]:
    """Return the counts of a run."""
    faults = Counter(fault.kind for fault in result.history.faults)
    return {
        "target": "chaos",
        "seed": plan.seed,
        "seconds": round(result.seconds),
        "faults": len(result.history.faults),
        "kinds": len(faults),
        "least_of_a_kind": min((faults[kind] for kind in plan.kinds), default=0),
        **result.report.counts,
        "violations": result.report.num_violations,
    }


def table(result: Result) -> str:
    """Return the faults of a run by kind, in Markdown."""
    rows = ["| fault | times | in flight on what it hit |", "|---|---|---|"]
    by_kind: dict[str, list[int]] = {}
    for fault in result.history.faults:
        by_kind.setdefault(fault.kind, []).append(fault.num_in_flight)
    rows += [f"| {kind} | {len(found)} | {sum(found)} |" for kind, found in sorted(by_kind.items())]
    return "\n".join(rows)


def parse(arguments: Sequence[str]) -> Plan:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of faults")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between two faults, on average")
    parser.add_argument("--callers", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--kinds", default="", help="comma-separated; default: all")
    parser.add_argument("--patches", default="")
    given = parser.parse_args(arguments)
    kinds = tuple(_words(given.kinds)) or tuple(FAULTS)
    unknown = set(kinds) - set(FAULTS)
    if unknown:
        parser.error(f"no such faults: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    return Plan(
        seed=given.seed,
        duration_s=given.duration,
        interval_s=given.interval,
        num_callers=given.callers,
        num_prompts=given.prompts,
        size=Size(workers=given.workers),
        kinds=kinds,
        patches=tuple(_words(given.patches)),
    )


def _words(text: str) -> Iterable[str]:
    return (word for word in text.split(",") if word)


def main(arguments: Sequence[str]) -> int:
    """Run, print what came of it, return the exit status."""
    plan = parse(arguments)
    folder = Path(tempfile.mkdtemp(prefix="torchrelay-chaos-"))
    cache = Path("build") / f"chaos-truth-{plan.num_prompts}.json"
    cache.parent.mkdir(exist_ok=True)
    result = asyncio.run(run(plan, folder, cache))
    sys.stdout.write(f"{table(result)}\n\n{result.report}\n")
    if result.report.num_violations:
        result.history.write(folder / "history.jsonl")
        sys.stdout.write(f"history and logs: {folder}\n")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.write(json.dumps(figures(plan, result)) + "\n")
    return 1 if result.report.num_violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
