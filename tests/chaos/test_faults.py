"""Faults at one exact moment, each on real processes; those at random moments are the nemesis's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from common import keys
from tests.chaos import shim
from tests.chaos.system import MODEL, TENANTS, ChaosSystem, Size
from tests.chaos.truth import Truth, compute, make_model
from torchrelay.client import AsyncClient, RelayError, RetryPolicy
from torchrelay.v1 import generation_pb2 as pb

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(shim.compiler() is None, reason="needs a C compiler"),
]
ABORTS, NO_MEMORY, NAN = 287, 286, 285  # ids that no text gives
NUM_TOKENS = 72
FUSES = ("die_on_claim", "die_behind_commit", "die_behind_enqueue")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ChaosSystem]:
    folder = tmp_path_factory.mktemp("faults")
    patches = [f"{name}:{folder / name}" for name in FUSES]
    patches += [f"slow_commit:{folder / 'slow_commit'}=5"]
    patches += [f"on_prompt:{ABORTS}=abort", f"on_prompt:{NO_MEMORY}=no-memory", f"on_prompt:{NAN}=nan"]
    model = make_model(folder / "model")
    env = {"TORCHRELAY_QUEUE_MAX_FRUITLESS_ATTEMPTS": "3", "TORCHRELAY_QUEUE_WORKER_LEASE_MS": "2000"}
    async with ChaosSystem(folder, model, Size(2, 2, 0.01), random.Random(1), patches=patches, env=env) as made:
        yield made


@pytest.fixture(scope="module")
def truth(system: ChaosSystem) -> Truth:
    return compute(system.folder / "model", 4)


@pytest_asyncio.fixture(loop_scope="module")
async def client(system: ChaosSystem) -> AsyncIterator[AsyncClient]:
    """A client of both gateways, once everything runs."""
    await system.wait_until_whole()
    address = "ipv4:" + ",".join(gateway.address for gateway in system.gateways)
    policy = RetryPolicy(give_up_after_s=60)
    async with AsyncClient(address, api_key=system.keys[TENANTS[0]], insecure=True, retry=policy) as made:
        yield made


def lay_fuse(system: ChaosSystem, name: str) -> Path:
    fuse = system.folder / name
    fuse.touch()
    return fuse


async def read(
    client: AsyncClient, prompt: Sequence[int], ids: list[str] | None = None, **options: Any
) -> tuple[list[int], pb.Finished]:
    """Read a generation to its end, and hold the stream to its law. Its id is added to `ids`."""
    token_ids: list[int] = []
    finished: pb.Finished | None = None
    stream = client.stream(prompt, model=MODEL, max_tokens=NUM_TOKENS, temperature=0, **options)
    async for event in stream:
        assert finished is None
        for delta in event.deltas.deltas:
            assert delta.first_token_index == len(token_ids)
            token_ids += delta.token_ids
        finished = event.finished if event.HasField("finished") else None
    assert finished is not None
    if ids is not None:
        ids.append(stream.generation_id)
    return token_ids, finished


async def test_worker_that_dies_between_claim_and_first_token(
    system: ChaosSystem, client: AsyncClient, truth: Truth
) -> None:
    """Row 3."""
    fuse = lay_fuse(system, "die_on_claim")
    token_ids, finished = await read(client, truth.prompts[0])
    assert not fuse.exists()
    assert token_ids == truth.output(0, NUM_TOKENS)
    assert finished.timings.num_takeovers == 1


async def test_worker_that_dies_behind_a_commit_before_it_reads_the_reply(
    system: ChaosSystem, client: AsyncClient, truth: Truth
) -> None:
    """Row 4: what was committed is not computed again, and not seen twice."""
    reading = asyncio.create_task(read(client, truth.prompts[1]))
    await asyncio.sleep(0.3)
    fuse = lay_fuse(system, "die_behind_commit")
    token_ids, finished = await reading
    assert not fuse.exists()
    assert token_ids == truth.output(1, NUM_TOKENS)
    assert finished.timings.num_takeovers == 1
    assert finished.usage.completion_tokens == NUM_TOKENS


async def test_gateway_that_dies_between_queueing_and_the_answer(
    system: ChaosSystem, client: AsyncClient, truth: Truth
) -> None:
    """Row 13: the caller's repetition with its key finds the same generation, which is metered once."""
    before = await num_generations(system)
    fuse = lay_fuse(system, "die_behind_enqueue")
    token_ids, _ = await read(client, truth.prompts[2], idempotency_key="row-13")
    assert not fuse.exists()
    assert token_ids == truth.output(2, NUM_TOKENS)
    assert await num_generations(system) == before + 1


async def num_generations(system: ChaosSystem) -> int:
    return len([name for name in await system.superuser.keys("*:j:*") if not name.endswith(b":log")])


async def test_request_that_kills_its_workers_is_given_up_and_its_neighbours_finish(
    system: ChaosSystem, client: AsyncClient, truth: Truth
) -> None:
    """Row 9."""
    starts = sum(worker.num_starts for worker in system.workers)
    neighbours = [asyncio.create_task(read(client, prompt)) for prompt in truth.prompts]
    await asyncio.sleep(0.2)
    with pytest.raises(RelayError) as caught:
        await read(client, [ABORTS, ABORTS, 6])
    assert caught.value.reason == "WORKER_FAILED"
    for index, neighbour in enumerate(neighbours):
        token_ids, _ = await neighbour
        assert token_ids == truth.output(index, NUM_TOKENS)
    await system.wait_until_whole()
    assert sum(worker.num_starts for worker in system.workers) - starts == 3


@pytest.mark.parametrize("marker", [NO_MEMORY, NAN], ids=["no memory", "NaN"])
async def test_request_whose_step_fails_ends_alone(
    system: ChaosSystem, client: AsyncClient, truth: Truth, marker: int
) -> None:
    """Rows 10 and 11: the error is that request's own; the batch and the worker go on."""
    starts = sum(worker.num_starts for worker in system.workers)
    neighbours = [asyncio.create_task(read(client, prompt)) for prompt in truth.prompts]
    await asyncio.sleep(0.1)
    with pytest.raises(RelayError) as caught:
        await read(client, [marker, marker, 6])
    assert caught.value.reason == "WORKER_FAILED"
    for index, neighbour in enumerate(neighbours):
        token_ids, finished = await neighbour
        assert token_ids == truth.output(index, NUM_TOKENS)
        assert finished.timings.num_takeovers == 0
    assert sum(worker.num_starts for worker in system.workers) == starts


async def test_lease_that_ends_while_the_last_commit_is_on_its_way(
    system: ChaosSystem, client: AsyncClient, truth: Truth
) -> None:
    """Row 42: the lease has ended and another worker has written the end when the first one sends its own."""
    fuse = lay_fuse(system, "slow_commit")
    ids: list[str] = []
    token_ids, finished = await read(client, truth.prompts[3], ids)
    assert not fuse.exists()
    assert token_ids == truth.output(3, NUM_TOKENS)
    assert finished.timings.num_takeovers == 1
    await asyncio.sleep(5)  # the first worker wakes, and is told that it has lost the job
    log = await system.superuser.xrange(keys.job_log(system.shard, ids[0]))
    kinds = [fields.get(b"k") for _, fields in log]
    assert kinds.count(b"T") == 2
    assert kinds.count(b"D") == 1
    assert kinds[-1] == b"D"
    assert finished.usage.completion_tokens == NUM_TOKENS
