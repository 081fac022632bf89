"""Whether the time of an answer tells a foreign generation from one that does not exist."""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import grpc.aio

from common import keys
from tests.builders_calls import Outcome, events_of
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system
from torchrelay.client import AsyncClient
from torchrelay.v1 import generation_pb2 as pb

_MODEL: Final = "tiny"
_WARM_UP: Final = 50
_NUM_FOREIGN: Final = 16


@dataclass(frozen=True, slots=True)
class Leak:
    """Times of one kind of call, in ms, and how well they tell foreign from absent."""

    call: str
    calls: int  # of each
    foreign_ms: float
    absent_ms: float
    auc: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def area_under_roc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Probability that a random positive is larger than a random negative, ties half (Mann-Whitney)."""
    ranked = sorted([(value, 1) for value in positives] + [(value, 0) for value in negatives])
    rank_sum, at = 0.0, 0
    while at < len(ranked):
        end = at
        while end < len(ranked) and ranked[end][0] == ranked[at][0]:
            end += 1
        rank = (at + 1 + end) / 2
        rank_sum += rank * sum(label for _, label in ranked[at:end])
        at = end
    return (rank_sum - len(positives) * (len(positives) + 1) / 2) / (len(positives) * len(negatives))


def _calls(client: AsyncClient, options: dict[str, Any]) -> dict[str, Callable[[str], Awaitable[Any]]]:
    service = client.generation

    async def resume(name: str) -> None:
        call = service.ResumeGeneration(pb.ResumeGenerationRequest(generation_id=name), **options)
        await Outcome(events_of(call)).read()

    async def get(name: str) -> None:
        await service.GetGeneration(pb.GetGenerationRequest(generation_id=name), **options)

    async def cancel(name: str) -> None:
        await service.CancelGeneration(pb.CancelGenerationRequest(generation_id=name), **options)

    async def delete(name: str) -> None:
        await service.DeleteGeneration(pb.DeleteGenerationRequest(generation_id=name), **options)

    return {"GetGeneration": get, "ResumeGeneration": resume, "CancelGeneration": cancel, "DeleteGeneration": delete}


async def _time(call: Callable[[str], Awaitable[Any]], name: str) -> float:
    began = time.perf_counter()
    try:
        await call(name)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return (time.perf_counter() - began) * 1000
    raise AssertionError("a stranger reached a generation")


async def _measure(system: System, num_calls: int) -> list[Leak]:
    rng = random.Random(2026)
    stranger = {"metadata": [("authorization", f"Bearer {system.create_key('stranger')}")]}
    async with system.client() as client:
        foreign = [
            (await Outcome(client.stream("hello", model=_MODEL, max_tokens=8)).read()).generation_id
            for _ in range(_NUM_FOREIGN)
        ]
        shard = keys.shard_of(foreign[0])
        found = []
        for kind, call in _calls(client, stranger).items():
            times: dict[bool, list[float]] = {True: [], False: []}
            for n in range(num_calls + _WARM_UP):
                order = [True, False]
                rng.shuffle(order)
                for is_foreign in order:
                    name = rng.choice(foreign) if is_foreign else keys.new_generation_id(shard)
                    elapsed = await _time(call, name)
                    if n >= _WARM_UP:
                        times[is_foreign].append(elapsed)
            medians = [statistics.median(times[is_foreign]) for is_foreign in (True, False)]
            found.append(Leak(kind, num_calls, *medians, area_under_roc(times[True], times[False])))
        return found


async def measure_leaks(num_calls: int) -> list[Leak]:
    """Time `num_calls` of each kind against foreign and absent ids, interleaved in random order."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        model = write_tiny_model(home / "model")
        system_home = home / "system"
        await asyncio.to_thread(system_home.mkdir)
        with running_system(system_home) as system:
            system.add_gateway()
            system.add_worker(model, _MODEL)
            await system.ready(_MODEL)
            return await _measure(system, num_calls)
