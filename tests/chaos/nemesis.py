"""Chooses what is done to the system and when, from a seed: each kind as often as any other, some at the same time."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence

import structlog

from common import keys
from tests.chaos.faults import FAULTS, Strike
from tests.chaos.history import Fault, History
from tests.chaos.processes import Party
from tests.chaos.system import ChaosSystem

log = structlog.get_logger()

_READ_S = 1.0


class Nemesis:
    """Acts at random times, `interval_s` apart on average, until stopped; then waits for what it began to heal."""

    def __init__(
        self,
        system: ChaosSystem,
        history: History,
        rng: random.Random,
        interval_s: float,
        kinds: Sequence[str] = tuple(FAULTS),
    ) -> None:
        self._system = system
        self._history = history
        self._rng = rng
        self._interval_s = interval_s
        self._kinds = list(kinds)
        self._round: list[str] = []
        self._running: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Act until `stop`; raises what a fault raises."""
        while not self._stopping.is_set():
            task = asyncio.create_task(self._act(self._next_kind()))
            self._running.add(task)
            pause = self._rng.uniform(0.5, 1.5) * self._interval_s
            try:
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            except TimeoutError:
                pass
            for done in [task for task in self._running if task.done()]:
                self._running.discard(done)
                done.result()
        for task in self._running:
            await task

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopping.set()

    def _next_kind(self) -> str:
        """Every kind once before any comes again."""
        if not self._round:
            self._round = self._rng.sample(self._kinds, len(self._kinds))
        return self._round.pop()

    async def _act(self, kind: str) -> None:
        record = Fault(kind, "", time.monotonic())

        async def hit(name: str, party: Party | None) -> None:
            record.target = name
            record.num_in_flight = await self._mark(kind, party)
            self._history.faults.append(record)
            log.info("chaos.fault", kind=kind, target=name, in_flight=record.num_in_flight)

        await FAULTS[kind](Strike(self._system, random.Random(self._rng.random()), hit))
        record.ended = time.monotonic()

    async def _mark(self, kind: str, party: Party | None) -> int:
        """Note with every generation in flight on a party that it is hit; return how many there are."""
        flying = self._history.in_flight()
        if party is not None:
            ids = await self._ids_at(party)
            flying = [generation for generation in flying if generation.generation_id in ids]
        count = 0
        for generation in flying:
            generation.faults.append(kind)
            count += 1
        return count

    async def _ids_at(self, party: Party) -> set[str]:
        """Return what is in flight on a party, as the server has it; nothing if it does not answer at once."""
        own = incarnation(party)
        if own is None:
            return set()
        shard, redis = self._system.shard, self._system.superuser
        try:
            async with asyncio.timeout(_READ_S):
                if party.module == "worker":
                    found = await redis.hkeys(keys.worker_jobs(shard, own))
                else:
                    found = await redis.smembers(keys.gateway_jobs(shard, own))
        except Exception:  # noqa: BLE001 - another fault has its way with the server: it is not counted
            return set()
        return {name.decode() for name in found}


def incarnation(party: Party) -> str | None:
    """Return the id that a party has given itself in its present life, from its log."""
    event, name = ("worker.ready", "worker_id") if party.module == "worker" else ("gateway.started", "gateway_id")
    for line in party.log().splitlines():
        if event in line:
            found: str = json.loads(line)[name]
            return found
    return None
