"""`make fairness`: tenants get their shares of one real worker, and a flood by one of them does not hold up another.

Real processes on this machine: a server for the queue (synced before each answer), a gateway, a worker with a tiny
model and few places, so that they are always taken. Two laws:

    shares   three tenants with weights 1:1:3 that all have requests waiting get 20, 20 and 60 % of the completion
             tokens, within 5 percentage points
    flood    while 5,000 requests of one tenant wait, a request that another sends now and then waits from its
             acceptance to its first claim at most 1.5 times the median gap between two releases of a place (the 95th
             percentile of its waits)

Prints a table and, as its last line, one JSON object. Exits with 1 if a law is broken. `--mutant` takes the fairness
out of both programs (arrival order): both laws must then be broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from common import keys
from common.generation import JobBody, SamplingParams
from common.job_queue import JobQueue
from common.jobs import JobState, NewJob
from common.redis import connect
from common.registry import ModelRegistry
from common.settings import QueueSettings, RedisSettings
from tests.benchmarks import arrival_order
from tests.benchmarks.budgets import percentile
from tests.builders_models import write_tiny_model
from tests.builders_system import System
from torchrelay.client import AsyncClient
from torchrelay.v1 import generation_pb2 as pb

MODEL: Final = "tiny"
NUM_PLACES: Final = 2  # with more, two come to be released together by and by, and the pace is uneven
FLOOD_SIZE: Final = 5000
NUM_OCCASIONAL: Final = 60
MAX_WAIT_GAPS: Final = 1.5
MAX_DEVIATION: Final = 0.05
_FLOOD_TOKENS: Final = 128  # of each request
_WINDOW_TOKENS: Final = 10_000
_PROMPT: Final = tuple(range(3, 19))
_SETTINGS: Final = {
    "TORCHRELAY_ENGINE_MAX_NUM_SEQS": str(NUM_PLACES),
    "TORCHRELAY_ENGINE_SPECULATION": "false",  # so that places are released at an even pace
    "TORCHRELAY_QUEUE_MAX_QUEUED_PER_TENANT": "10000",
    "TORCHRELAY_QUEUE_MAX_LIVE_PER_TENANT": "10000",
}


@dataclass(frozen=True)
class Tenant:
    name: str
    weight: float = 1.0


TENANTS: Final = (Tenant("a"), Tenant("b"), Tenant("c", 3.0))


class Deployment:
    """A running system, and the queue behind it."""

    def __init__(self, system: System, queue: JobQueue, shard: str) -> None:
        self.system = system
        self.queue = queue
        self.shard = shard

    async def submit(self, tenant: Tenant, max_tokens: int) -> str:
        """Queue a request of a tenant with its weight; return the generation's id."""
        room = len(_PROMPT) + 16
        sampling = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=max_tokens)
        job = NewJob(
            tenant=tenant.name,
            weight=tenant.weight,
            body=JobBody(prompt_token_ids=_PROMPT, sampling=sampling),
            attended=False,
            kv_tokens=room,
            peak_kv_tokens=room + max_tokens,
        )
        return (await self.queue.enqueue(self.shard, job)).generation_id

    async def tokens_of(self, ids: Sequence[str]) -> int:
        """Completion tokens so far, those of running generations included."""
        records = [await self.queue.get(generation_id, None) for generation_id in ids]
        return sum(record.usage.completion_tokens for record in records)


@contextmanager
def running(folder: Path, *, is_mutant: bool = False) -> Iterator[System]:
    """A system with one gateway and one worker."""
    write_tiny_model(folder / "model", max_position_embeddings=2048, eos_token_id=None)
    with System(folder, _SETTINGS) as system:
        processes = [system.add_gateway(start=False), system.add_worker(folder / "model", MODEL, start=False)]
        for process in processes:
            if is_mutant:
                process.env["ROLE"], process.module = process.module, arrival_order.__name__
            process.start()
        yield system


@asynccontextmanager
async def deployed(system: System) -> AsyncIterator[Deployment]:
    """Wait until the system is ready."""
    await system.ready(MODEL)
    redis = connect(RedisSettings(url=system.server.url))
    try:
        (card,) = await ModelRegistry(redis).list()
        settings = QueueSettings(max_queued_per_tenant=10_000, max_live_per_tenant=10_000)
        yield Deployment(system, JobQueue(redis, keys.random_id(), settings), card.shard)
    finally:
        await redis.aclose()


# -- shares ------------------------------------------------------------------------------------------------------------


async def measure_shares(at: Deployment, window_tokens: int, seed: int = 1) -> dict[str, Any]:
    """Count the completion tokens of each tenant in a window in which all have requests waiting."""
    rng = random.Random(seed)
    ids: dict[str, list[str]] = {tenant.name: [] for tenant in TENANTS}
    wish = {tenant.name: tenant.weight / sum(other.weight for other in TENANTS) for tenant in TENANTS}
    mean_tokens = 40
    # Four times what is needed, as some is done before the last is queued. What arrives first is one tenant's alone: in
    # order of arrival it would get everything.
    for tenant in TENANTS:
        for _ in range(int(4 * wish[tenant.name] * window_tokens / mean_tokens) + 2 * NUM_PLACES):
            ids[tenant.name].append(await at.submit(tenant, rng.randint(mean_tokens // 2, 3 * mean_tokens // 2)))
    before = {name: await at.tokens_of(own) for name, own in ids.items()}
    total, all_wait = 0, True
    while total < window_tokens and all_wait:
        await asyncio.sleep(0.5)
        after = {name: await at.tokens_of(own) for name, own in ids.items()}
        total = sum(after.values()) - sum(before.values())
        last = [(await at.queue.get(own[-1], None)).state for own in ids.values()]
        all_wait = all(state is JobState.QUEUED for state in last)
    for own in ids.values():
        for generation_id in own:
            await at.queue.cancel(generation_id, None)
    tokens = {name: after[name] - before[name] for name in ids}
    shares = {name: count / max(1, sum(tokens.values())) for name, count in tokens.items()}
    deviation = max(abs(shares[name] - wish[name]) for name in ids)
    return {
        "weights": {tenant.name: tenant.weight for tenant in TENANTS},
        "completion_tokens": tokens,
        "shares": {name: round(share, 4) for name, share in shares.items()},
        "largest_deviation": round(deviation, 4),
        "all_had_requests_waiting": all_wait,
        "met": all_wait and deviation <= MAX_DEVIATION,
    }


# -- flood -------------------------------------------------------------------------------------------------------------


async def _flood(client: AsyncClient, lengths: Sequence[int]) -> list[str]:
    """Submit requests of these lengths in this order, the first ones one after another."""

    async def submit(max_tokens: int) -> str:
        request = pb.SubmitGenerationRequest(
            model=MODEL,
            input=pb.GenerationInput(token_ids=pb.TokenIds(ids=_PROMPT)),
            config=pb.GenerationConfig(max_tokens=max_tokens, temperature=1.0, seed=1),
        )
        response = await client.generation.SubmitGeneration(request, metadata=client.metadata)
        return str(response.accepted.generation_id)

    ids = [await submit(length) for length in lengths[: 2 * NUM_PLACES]]
    for at in range(2 * NUM_PLACES, len(lengths), 16):
        ids += await asyncio.gather(*map(submit, lengths[at : at + 16]))
    return ids


async def measure_flood(at: Deployment, flood_size: int, num_occasional: int, seed: int = 1) -> dict[str, Any]:
    """Send one request now and then beside a flood; compare how long it waited with the gaps between releases."""
    rng = random.Random(seed)
    system = at.system
    # The first ones are shorter by steps, so that from then on one place after another is released.
    lengths = [_FLOOD_TOKENS * (place + 1) // NUM_PLACES for place in range(NUM_PLACES)]
    lengths += [_FLOOD_TOKENS] * (flood_size - NUM_PLACES)
    async with (
        system.client(key=system.create_key("flood")) as flooding,
        system.client(key=system.create_key("occasional")) as occasional,
    ):
        flood = await _flood(flooding, lengths)
        waits_ms: list[float] = []
        expected_ms: list[float] = []
        own: list[str] = []
        while len(waits_ms) < num_occasional:
            stream = occasional.stream(_PROMPT, model=MODEL, max_tokens=_FLOOD_TOKENS, temperature=1.0, seed=2)
            async for event in stream:
                if event.HasField("accepted"):
                    own.append(event.accepted.generation_id)
                    expected_ms.append(event.accepted.expected_wait.ToMilliseconds())
                elif event.HasField("finished"):
                    waits_ms.append(event.finished.timings.queue_time.ToMilliseconds())
            await asyncio.sleep(rng.uniform(0.0, 0.5))
        records = [await at.queue.get(generation_id, None) for generation_id in flood + own]
    num_waiting = sum(record.state is JobState.QUEUED for record in records)
    first = min(record.created_ms for record in records[flood_size:])
    ends = sorted(record.ended_ms for record in records if record.ended_ms >= first)
    gaps_ms = [later - earlier for earlier, later in pairwise(ends)]
    median_gap_ms, p95_ms = statistics.median(gaps_ms), percentile(waits_ms, 95)
    return {
        "num_flood": flood_size,
        "num_flood_waiting_at_the_end": num_waiting,
        "num_occasional": len(waits_ms),
        "num_releases": len(ends),
        "median_gap_ms": median_gap_ms,
        "p95_gap_ms": percentile(gaps_ms, 95),
        "median_wait_ms": statistics.median(waits_ms),
        "p95_wait_ms": p95_ms,
        "max_wait_ms": max(waits_ms),
        "median_expected_wait_ms": statistics.median(expected_ms),
        "p95_wait_gaps": round(p95_ms / max(1, median_gap_ms), 3),
        "met": num_waiting > 0 and p95_ms <= MAX_WAIT_GAPS * median_gap_ms,
    }


def print_tables(shares: dict[str, Any], flood: dict[str, Any]) -> None:
    """Print what was found, for people."""
    lines = ["| tenant | weight | completion tokens | share |", "|---|---|---|---|"]
    for name, weight in shares["weights"].items():
        lines.append(f"| {name} | {weight:g} | {shares['completion_tokens'][name]} | {shares['shares'][name]:.1%} |")
    lines += ["", "| of a flood and an occasional request | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in flood.items()]
    sys.stdout.write("\n".join(lines) + "\n")


async def measure(system: System, *, is_quick: bool, is_mutant: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    # In order of arrival the flood's end would have to be waited for.
    flood_size, num_occasional = (100, 3) if is_mutant else (FLOOD_SIZE, NUM_OCCASIONAL)
    async with deployed(system) as at:
        shares = await measure_shares(at, _WINDOW_TOKENS // 4 if is_quick or is_mutant else _WINDOW_TOKENS)
        return shares, await measure_flood(at, flood_size, num_occasional)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a shorter window")
    parser.add_argument("--mutant", action="store_true", help="programs without fairness: both laws must be broken")
    args = parser.parse_args()
    if args.mutant:
        arrival_order.patch()  # what this process queues itself
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), is_mutant=args.mutant) as system:
        shares, flood = asyncio.run(measure(system, is_quick=args.quick, is_mutant=args.mutant))
    print_tables(shares, flood)
    met = bool(shares["met"] and flood["met"])
    report = {
        "target": "fairness",
        "mutant": args.mutant,
        "shares": shares,
        "flood": flood,
        "seconds": round(time.monotonic() - began, 1),
        "met": met,
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
