"""Levels of logs are changed while gateway and worker run, and a generation's way can be followed in them by its id."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from common.embedded import EmbeddedServer
from common.errors import InvalidRequest
from common.redis import connect, execute
from common.settings import RedisSettings
from common.telemetry.log_levels import MAX_LEVELS, LogLevels
from tests.builders_models import write_tiny_model
from tests.builders_system import Process, System, gateway_and_worker, until
from torchrelay.admin.v1beta1 import log_pb2, log_pb2_grpc
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=2048, eos_token_id=None)
    with gateway_and_worker(tmp_path_factory.mktemp("system"), folder, MODEL) as system:
        yield system


def lines(process: Process) -> list[dict[str, Any]]:
    found = []
    for line in process.log().splitlines():
        if line.startswith("{"):
            found.append(json.loads(line))
    return found


def events(process: Process, **fields: object) -> list[str]:
    return [line["event"] for line in lines(process) if fields.items() <= line.items()]


async def test_a_generations_way_is_in_the_logs_by_its_id(system: System) -> None:
    async with system.client() as client:
        generation = await client.generate([3, 4, 5], model=MODEL, max_tokens=5)
    gateway, worker = system.gateways[0], system.workers[0]

    async def is_told() -> bool:
        return "job.ended" in events(worker, generation_id=generation.generation_id)

    await until(is_told, what="the end in the log")
    assert events(gateway, generation_id=generation.generation_id) == ["generation.accepted"]
    assert events(worker, generation_id=generation.generation_id) == ["job.claimed", "job.ended"]
    (ended,) = [line for line in lines(worker) if line["event"] == "job.ended"]
    assert (ended["state"], ended["tokens"]) == ("DONE", 5)


async def test_what_upkeep_ends_is_told_with_its_id(system: System) -> None:
    request = pb.SubmitGenerationRequest(
        model=MODEL,
        input=pb.GenerationInput(token_ids=pb.TokenIds(ids=[3, 4, 5])),
        config=pb.GenerationConfig(max_tokens=2000),
    )
    gateway, worker = system.gateways[0], system.workers[0]
    async with system.client() as client:
        submitted = await client.generation.SubmitGeneration(request, metadata=client.metadata)
    generation_id = submitted.accepted.generation_id

    async def is_claimed() -> bool:
        return "job.claimed" in events(worker, generation_id=generation_id)

    await until(is_claimed, what="the claim")
    worker.kill()

    async def is_requeued() -> bool:
        return events(gateway, generation_id=generation_id) == ["generation.accepted", "job.requeued"]

    await until(is_requeued, what="the requeued generation in the gateway's log")
    worker.start()

    async def is_taken_over() -> bool:
        return bool(events(worker, event="job.claimed", generation_id=generation_id, claim=2))

    await until(is_taken_over, what="the second claim")


async def test_levels_change_in_every_process_and_end_by_themselves(system: System) -> None:
    gateway, worker = system.gateways[0], system.workers[0]
    async with grpc.aio.insecure_channel(gateway.admin_address) as channel:
        stub: log_pb2_grpc.LogServiceAsyncStub = log_pb2_grpc.LogServiceStub(channel)
        assert not (await stub.ListLogLevels(log_pb2.ListLogLevelsRequest())).levels
        for module, severity in (
            ("gateway.upkeep", log_pb2.LOG_SEVERITY_DEBUG),
            ("worker", log_pb2.LOG_SEVERITY_DEBUG),
        ):
            request = log_pb2.SetLogLevelRequest(module=module, severity=severity)
            request.ttl.FromSeconds(60)
            made = (await stub.SetLogLevel(request)).level
            assert (made.module, made.severity) == (module, severity)

        async def gateway_follows() -> bool:
            return "upkeep.done" in events(gateway, level="debug")

        await until(gateway_follows, what="debug lines of the gateway")
        for process in (gateway, worker):

            async def has_set(process: Process = process) -> bool:
                return len(events(process, event="log_level.set")) == 2

            await until(has_set, what="both levels in each process")
        async with system.client() as client:
            await client.generate([3, 4, 5], model=MODEL, max_tokens=5)

        async def worker_follows() -> bool:
            return "commit.stored" in events(worker, level="debug")

        await until(worker_follows, what="debug lines of the worker")
        await stub.DeleteLogLevel(log_pb2.DeleteLogLevelRequest(module="worker"))
        request = log_pb2.SetLogLevelRequest(module="gateway.upkeep", severity=log_pb2.LOG_SEVERITY_DEBUG)
        request.ttl.FromSeconds(1)
        await stub.SetLogLevel(request)
        for process in (gateway, worker):

            async def has_ended(process: Process = process) -> bool:
                return len(events(process, event="log_level.ended")) == 2

            await until(has_ended, what="the end of both levels")
        assert not (await stub.ListLogLevels(log_pb2.ListLogLevelsRequest())).levels


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (log_pb2.SetLogLevelRequest(module="worker"), "severity"),
        (log_pb2.SetLogLevelRequest(module="no module", severity=log_pb2.LOG_SEVERITY_DEBUG), "module"),
        (log_pb2.SetLogLevelRequest(module="worker", severity=99), "severity"),  # type: ignore[arg-type]
        (log_pb2.SetLogLevelRequest(module="worker", severity=1, ttl={"nanos": 5}), "ttl"),  # type: ignore[arg-type]
    ],
)
async def test_bad_requests_name_their_field(system: System, request_: log_pb2.SetLogLevelRequest, field: str) -> None:
    async with grpc.aio.insecure_channel(system.gateways[0].admin_address) as channel:
        stub: log_pb2_grpc.LogServiceAsyncStub = log_pb2_grpc.LogServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SetLogLevel(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in str(caught.value.trailing_metadata())


async def test_what_is_stored_is_bounded_and_what_a_later_version_wrote_is_passed_over(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server:
        redis = connect(RedisSettings(url=server.url))
        now = [1000.0]
        levels = LogLevels(redis, wall_clock_ms=lambda: now[0])
        await execute(redis, "HSET", "{models}:log-levels", "later", "TRACE 99999", "odd", "x")
        for index in range(MAX_LEVELS):
            await levels.set(f"m{index}", "DEBUG", 500)
        assert len(await levels.current()) == MAX_LEVELS
        with pytest.raises(InvalidRequest):
            await levels.set("one.more", "DEBUG", 500)
        await levels.set("m0", "ERROR", 5000)
        now[0] += 600
        assert [level.module for level in await levels.current()] == ["m0"]
        await levels.set("one.more", "DEBUG", 500)
        assert await execute(redis, "HLEN", "{models}:log-levels") <= 4  # those that ended are gone
        await redis.aclose()
