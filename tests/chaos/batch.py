"""`make batch-chaos`: one batch of many classifications, while gateway and worker are killed -9 once each.

The laws: each item has exactly one result, the right one; the results that a caller reads across the kills are those
that are read afterwards on another gateway, numbered without a gap; each item ran once and is counted once; nothing of
the items is left behind. The last line is one JSON object; exits with 1 where a law is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.builders_tasks import CORPUS, write_encoder
from tests.chaos.batch_mutants import BATCH_MUTANTS
from tests.chaos.processes import Party
from tests.chaos.system import MODEL, TENANTS, ChaosSystem, Size
from torchrelay.client import AsyncClient, RelayError, RetryPolicy
from torchrelay.v1 import batch_pb2 as pb
from torchrelay.v1 import classification_pb2 as cpb

_NUM_TRUTHS: Final = 40  # different texts; items take them in turn
_GIVE_UP_S: Final = 60.0  # of a caller without news
_TOLERANCE: Final = 1e-4  # between a text alone and in a batch with others, in fp32


@dataclass(slots=True)
class Run:
    """What was seen."""

    num_items: int
    violations: Counter[str] = field(default_factory=Counter)
    num_results: int = 0
    num_kills: Counter[str] = field(default_factory=Counter)
    num_resumes: int = 0
    num_ran: int = 0
    epochs: int = 0
    make_s: float = 0.0
    run_s: float = 0.0
    bytes_per_item: float = 0.0  # of the server's memory, right behind the making
    bytes_per_result: float = 0.0


def text_of(index: int) -> str:
    """The text of an item: different ones, in turn."""
    words = " ".join(CORPUS).split()
    number = index % _NUM_TRUTHS
    return " ".join(words[(number * 7 + i) % len(words)] for i in range(3 + number % 11))


def item(index: int) -> pb.BatchItem:
    request = cpb.ClassifyRequest(model=MODEL, inputs=[cpb.ClassificationInput(text=text_of(index))])
    return pb.BatchItem(custom_id=f"c{index}", classify=request)


async def truths(client: AsyncClient) -> list[cpb.Classification]:
    """Each text by a call of its own, before anything is killed."""
    found = []
    for index in range(_NUM_TRUTHS):
        response = await client.classification.Classify(item(index).classify, metadata=client.metadata)
        found.append(response.classifications[0])
    return found


def is_right(found: cpb.Classification, truth: cpb.Classification) -> bool:
    scores = {label.label: label.score for label in truth.labels}
    return scores.keys() == {label.label for label in found.labels} and all(
        abs(label.score - scores[label.label]) < _TOLERANCE for label in found.labels
    )


class Experiment:
    """One batch, read while its servers are killed."""

    def __init__(self, system: ChaosSystem, run: Run) -> None:
        self.system = system
        self.run = run
        self.num_read = 0
        self._is_over = False
        self._has_news = asyncio.Event()

    def client(self, gateways: Sequence[Party] | None = None) -> AsyncClient:
        address = "ipv4:" + ",".join(gateway.address for gateway in gateways or self.system.gateways)
        key = self.system.keys[TENANTS[0]]
        return AsyncClient(address, api_key=key, insecure=True, retry=RetryPolicy(give_up_after_s=_GIVE_UP_S))

    async def execute(self) -> None:
        run = self.run
        async with self.client() as client:
            truth = await truths(client)
            ran_before, memory = await self._num_ran(), await self._memory()
            began = time.monotonic()
            made = await client.create_batch([item(index) for index in range(run.num_items)])
            run.make_s = time.monotonic() - began
            run.bytes_per_item = max(0, await self._memory() - memory) / run.num_items
            killing = asyncio.create_task(self._kill(made.batch_id))
            try:
                seen = await self._read(client, made.batch_id)
            except (RelayError, TimeoutError) as error:
                run.violations[f"the caller gave up: {getattr(error, 'reason', '') or 'no result came any more'}"] += 1
                return
            finally:
                self._is_over = True
                self._has_news.set()
                await killing
            run.run_s = time.monotonic() - began
            self._check_results(seen, truth)
            batch = await client.get_batch(made.batch_id)
        await self.system.wait_until_whole()
        for gateway in self.system.gateways:
            async with self.client([gateway]) as other:
                again = [result async for result in other.batch_results(made.batch_id)]
                run.violations["read otherwise on another gateway"] += again != seen
        run.violations["counted otherwise"] += batch.counts != pb.BatchCounts(
            total=run.num_items, succeeded=run.num_items
        )
        run.num_ran = await self._num_ran() - ran_before
        run.violations["ran or counted more or less than once"] += run.num_ran != run.num_items
        run.epochs = int(await self._field(made.batch_id, "ep"))
        run.violations["the killed gateway's batch was not taken over"] += run.epochs < 2
        run.violations["something is left of the items"] += len(await self._left(made.batch_id))
        results = await self.system.superuser.memory_usage(f"{{t:{TENANTS[0]}}}:b:{made.batch_id}:results", samples=0)
        run.bytes_per_result = (results or 0) / run.num_items

    async def _read(self, client: AsyncClient, batch_id: str) -> list[pb.BatchResult]:
        """Read to the end; go away once on the way, and come back behind what was read."""
        seen: list[pb.BatchResult] = []
        pauses = [self.run.num_items // 3, self.run.num_items + 1]
        for pause in pauses:
            results = client.batch_results(batch_id, after_index=len(seen))
            async with asyncio.timeout(_GIVE_UP_S) as patience:
                async for result in results:
                    patience.reschedule(asyncio.get_running_loop().time() + _GIVE_UP_S)
                    seen.append(result)
                    self.num_read = len(seen)
                    self._has_news.set()
                    if len(seen) == pause:
                        break
            self.run.num_resumes += results.position.num_resumes
        return seen

    async def _kill(self, batch_id: str) -> None:
        """Kill the worker after a quarter of the results, and the gateway that feeds the batch after a half."""
        await self._until(self.run.num_items // 4)
        self.system.workers[0].kill()
        self.run.num_kills["worker"] += 1
        await self._until(self.run.num_items // 2)
        for gateway in self.system.gateways:
            if batch_id in gateway.log() and "batch.fed" in gateway.log():
                gateway.kill()
                self.run.num_kills["gateway"] += 1

    async def _until(self, num_results: int) -> None:
        while self.num_read < num_results and not self._is_over:
            self._has_news.clear()
            await self._has_news.wait()

    def _check_results(self, seen: Sequence[pb.BatchResult], truth: Sequence[cpb.Classification]) -> None:
        run = self.run
        run.num_results = len(seen)
        run.violations["numbers with gaps"] += [result.index for result in seen] != list(range(1, len(seen) + 1))
        times = Counter(result.item_index for result in seen)
        run.violations["items without a result"] += sum(not times[index] for index in range(run.num_items))
        run.violations["items with several results"] += sum(count > 1 for count in times.values())
        for result in seen:
            if result.custom_id != f"c{result.item_index}":
                run.violations["results of other items"] += 1
            if result.WhichOneof("result") != "classify":
                run.violations["items that failed"] += 1
                continue
            found = result.classify.classifications
            if len(found) != 1 or not is_right(found[0], truth[result.item_index % _NUM_TRUTHS]):
                run.violations["wrong results"] += 1

    async def _num_ran(self) -> int:
        """Generations of the tenant that have been counted as used."""
        total = 0
        for key in await self.system.superuser.keys("*:usage:*"):
            for name, count in (await self.system.superuser.hgetall(key)).items():
                if name.startswith(b"generations:") and name.endswith(b":" + TENANTS[0].encode()):
                    total += int(count)
        return total

    async def _memory(self) -> int:
        info: dict[str, Any] = await self.system.superuser.info("memory")
        return int(info["used_memory_dataset"])

    async def _field(self, batch_id: str, name: str) -> bytes:
        found: bytes = await self.system.superuser.hget(f"{{t:{TENANTS[0]}}}:b:{batch_id}", name)
        return found

    async def _left(self, batch_id: str) -> list[bytes]:
        found: list[bytes] = await self.system.superuser.keys(f"*{batch_id}:*")
        live: list[bytes] = await self.system.superuser.keys("*:q:*")
        return [key for key in found if not key.endswith(b":results")] + live


async def run_batch(num_items: int, folder: Path, patches: Sequence[str] = ()) -> Run:
    """Run one system and one batch, and judge."""
    run = Run(num_items)
    model = write_encoder(folder / "model", "bert", "labels")
    size = Size(gateways=2, workers=1, pace_s=0.0)
    worker_env = {"TORCHRELAY_WORKER_MAX_JOBS": "256"}
    async with ChaosSystem(folder, model, size, random.Random(1), patches=patches, worker_env=worker_env) as system:
        await Experiment(system, run).execute()
    return run


def main(arguments: Sequence[str]) -> int:
    """Run, print, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--mutant", default="", choices=["", *BATCH_MUTANTS], help="a guard to be taken out")
    given = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="torchrelay-batch-"))
    try:
        run = asyncio.run(run_batch(given.items, folder, (given.mutant,) if given.mutant else ()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    violations = {law: count for law, count in run.violations.items() if count}
    killed = all(run.num_kills[role] == 1 for role in ("worker", "gateway"))
    figures = {
        "target": "batch-chaos",
        "mutant": given.mutant,
        "items": run.num_items,
        "results": run.num_results,
        "ran": run.num_ran,
        "kills": dict(run.num_kills),
        "feeders": run.epochs,
        "resumes": run.num_resumes,
        "violations": violations,
        "make_s": round(run.make_s, 2),
        "run_s": round(run.run_s, 2),
        "items_per_s": round(run.num_items / run.run_s, 1) if run.run_s else None,
        "server_bytes_per_item": round(run.bytes_per_item),
        "server_bytes_per_result": round(run.bytes_per_result),
    }
    sys.stdout.write(json.dumps(figures) + "\n")
    return 1 if violations or not killed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
