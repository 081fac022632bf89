"""Parts for tests of batches: items, what came of them, and a look into the store."""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from typer.testing import CliRunner, Result

from common.keys import random_id
from common.redis import connect, execute
from common.settings import RedisSettings
from tests.builders_system import Gateway, System
from torchrelay.cli.main import make_app
from torchrelay.client import AsyncClient
from torchrelay.v1 import batch_pb2 as pb
from torchrelay.v1 import generation_pb2

MODEL = "tiny"


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


def summary(result: pb.BatchResult) -> tuple[grpc.StatusCode, str]:
    """Code and reason of an item's error."""
    assert result.WhichOneof("result") == "error", result
    code = next(code for code in grpc.StatusCode if code.value[0] == result.error.code)
    info = error_details_pb2.ErrorInfo()
    assert result.error.details[0].Unpack(info)
    return code, info.reason


async def create_raw(client: AsyncClient, *parts: pb.CreateBatchRequest) -> pb.CreateBatchResponse:
    return await client.batch.CreateBatch(iter(parts), metadata=client.metadata)


def header(**fields: Any) -> pb.CreateBatchRequest:
    return pb.CreateBatchRequest(header=pb.BatchHeader(**fields))


def part(one: pb.BatchItem) -> pb.CreateBatchRequest:
    return pb.CreateBatchRequest(item=one)


async def begun(client: AsyncClient, batch_id: str, num_results: int = 1) -> list[pb.BatchResult]:
    """Wait until a batch has so many results, and go away."""
    found: list[pb.BatchResult] = []
    async with contextlib.aclosing(aiter(client.batch_results(batch_id))) as results:  # type: ignore[type-var]
        async for result in results:
            found.append(result)
            if len(found) >= num_results:
                break
    return found


async def superuser_call(system: System, *command: str) -> Any:
    redis = connect(RedisSettings(url=system.server.url))
    try:
        return await execute(redis, *command)
    finally:
        await redis.aclose()


async def num_generations(system: System, tenant: str) -> int:
    """How many generations of a tenant have been counted as used."""
    total = 0
    for key in await superuser_call(system, "KEYS", "*:usage:*"):
        for name, count in (await superuser_call(system, "HGETALL", key.decode())).items():
            kind, _, owner = name.decode().partition(":")
            total += int(count) if kind == "generations" and owner.endswith(f":{tenant}") else 0
    return total


async def live_tenants(system: System) -> set[str]:
    """Tenants with generations that wait or run."""
    found: set[str] = set()
    for key in await superuser_call(system, "KEYS", "*:live"):
        found |= {name.decode() for name in await superuser_call(system, "HGETALL", key.decode())}
    return found


def tenant_client(system: System, **grants: Any) -> tuple[str, AsyncClient]:
    tenant = f"tenant-{random_id()}"
    return tenant, system.client(key=system.create_key(tenant, **grants))


def feeds(gateway: Gateway, batch_id: str) -> bool:
    return any("batch.fed" in line and batch_id in line for line in gateway.log().splitlines())


def command(system: System, *arguments: str, status: int = 0) -> Result:
    address = ["--address", system.gateways[0].address, "--api-key", system.key, "--insecure"]
    done = CliRunner().invoke(make_app(), ["batch", *arguments, *address])
    assert done.exit_code == status, done.output
    return done


async def stored_items(system: System) -> list[bytes]:
    redis = connect(RedisSettings(url=system.server.url))
    try:
        found: list[bytes] = await execute(redis, "KEYS", "*:items")
        return found
    finally:
        await redis.aclose()
