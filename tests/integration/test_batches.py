"""Batches over a real gateway, queue and worker: made, fed, read, cancelled, erased, and carried through kills."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system
from torchrelay.client import AsyncClient
from torchrelay.v1 import batch_pb2 as pb
from torchrelay.v1 import generation_pb2

MODEL = "tiny"
INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=512, eos_token_id=None)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[System]:
    """Two gateways with small bounds and short leases, and a worker."""
    bounds = {
        "TORCHRELAY_QUEUE_GATEWAY_LEASE_MS": "2000",
        "TORCHRELAY_GATEWAY_MAX_BATCH_ITEMS": "300",
        "TORCHRELAY_GATEWAY_MAX_BATCH_BYTES": "60000",
        "TORCHRELAY_GATEWAY_MAX_BATCHES_PER_TENANT": "20",
        "TORCHRELAY_GATEWAY_BATCH_WINDOW": "16",
        "TORCHRELAY_GATEWAY_PROGRESS_INTERVAL_S": "0.3",
    }
    with running_system(tmp_path_factory.mktemp("system"), **bounds) as system:
        system.add_gateway()
        system.add_gateway()
        system.add_worker(folder, MODEL)
        asyncio.run(system.ready(MODEL))
        yield system


@pytest.fixture
async def client(system: System, folder: Path) -> AsyncIterator[AsyncClient]:
    """A client of a tenant of its own, of both gateways."""
    await system.scale(folder, gateways=2)
    async with system.client(key=system.create_key(f"tenant-{id(object())}")) as client:
        yield client


def prompt(index: int) -> list[int]:
    return [3 + (17 * index + 29 * i) % 250 for i in range(4 + index % 13)]


def item(index: int, *, max_tokens: int = 4, custom_id: str = "", **fields: Any) -> pb.BatchItem:
    request = generation_pb2.GenerateRequest(
        model=fields.pop("model", MODEL),
        input=generation_pb2.GenerationInput(token_ids=generation_pb2.TokenIds(ids=prompt(index))),
        config=generation_pb2.GenerationConfig(max_tokens=max_tokens, temperature=0),
        **fields,
    )
    return pb.BatchItem(custom_id=custom_id, generate=request)


async def read(client: AsyncClient, batch_id: str, after_index: int = 0) -> list[pb.BatchResult]:
    return [result async for result in client.batch_results(batch_id, after_index)]


async def test_every_item_has_its_own_result_and_the_batch_says_so(client: AsyncClient) -> None:
    made = await client.create_batch([item(index, custom_id=f"line-{index}") for index in range(40)])
    assert made.counts.total == 40
    results = await read(client, made.batch_id)
    assert [result.index for result in results] == list(range(1, 41))
    assert sorted(result.item_index for result in results) == list(range(40))
    for result in results:
        assert result.custom_id == f"line-{result.item_index}"
        generation = result.generate.generation
        assert generation.usage.prompt_tokens == len(prompt(result.item_index))
        assert len(generation.outputs[0].token_ids) == 4
    batch = await client.get_batch(made.batch_id)
    assert batch.state == pb.BATCH_STATE_DONE
    assert batch.counts == pb.BatchCounts(total=40, succeeded=40)
    assert batch.priority == generation_pb2.PRIORITY_LOW
    assert (batch.expire_time.ToMilliseconds() - batch.end_time.ToMilliseconds()) == 86_400_000
