"""Processes that are told to stop: nothing new is taken, what runs may end, and the rest goes on elsewhere, first."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests import reference
from tests.builders_calls import Outcome, events_of, refused
from tests.builders_models import write_tiny_model
from tests.builders_system import Process, System, running_system, until
from tests.ports import free_port
from torchrelay.client import AsyncClient
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"
PROMPT = [3 + (7 * i) % 250 for i in range(12)]
LONG = 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=8192, eos_token_id=None)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    with running_system(tmp_path / "system") as system:
        yield system


def log_of(process: Process) -> list[dict[str, Any]]:
    return [json.loads(line) for line in process.log().splitlines() if line.startswith("{")]


def claimed_by(process: Process) -> list[str]:
    return [line["generation_id"] for line in log_of(process) if line["event"] == "job.claimed"]


async def has_logged(process: Process, event: str, times: int = 1) -> None:
    async def found() -> bool:
        return sum(line["event"] == event for line in log_of(process)) >= times

    await until(found, what=f"{event} in the log of {process.name}")


async def submit(client: AsyncClient, max_tokens: int) -> str:
    request = pb.SubmitGenerationRequest(
        model=MODEL,
        input=pb.GenerationInput(token_ids=pb.TokenIds(ids=PROMPT)),
        config=pb.GenerationConfig(max_tokens=max_tokens, temperature=0),
    )
    response = await client.generation.SubmitGeneration(request, metadata=client.metadata)
    return str(response.accepted.generation_id)


async def is_finished(client: AsyncClient, generation_id: str) -> bool:
    return (await client.get(generation_id)).state == pb.GENERATION_STATE_FINISHED


async def test_a_worker_that_drains_finishes_what_it_has_and_claims_nothing_more(system: System, folder: Path) -> None:
    system.add_gateway()
    first = system.add_worker(folder, TORCHRELAY_WORKER_DRAIN_S="60")
    await system.ready(MODEL)
    async with system.client() as client:
        running = Outcome(client.stream(PROMPT, model=MODEL, max_tokens=700, temperature=0))
        reading = asyncio.create_task(running.read())
        await until(lambda: _has_tokens(running), what="tokens")
        # More than one signal does no harm: a terminal sends SIGINT to all, an impatient operator SIGTERM again.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            first.signal(number)
            await has_logged(first, "worker.draining")
        late = await submit(client, 5)
        await asyncio.wait_for(reading, 60)
        assert await asyncio.to_thread(first.stop) == 0, first.log()
        assert claimed_by(first) == [running.generation_id]
        assert len(running.token_ids) == 700
        assert running.finished is not None
        assert running.finished.timings.num_takeovers == 0
        second = system.add_worker(folder)
        await until(lambda: is_finished(client, late), what="the end of what came late")
        await has_logged(second, "job.claimed")
        assert claimed_by(second) == [late]


async def test_what_a_worker_gives_back_is_served_before_what_never_ran(system: System, folder: Path) -> None:
    system.add_gateway()
    first = system.add_worker(folder, TORCHRELAY_WORKER_DRAIN_S="0", TORCHRELAY_ENGINE_MAX_NUM_SEQS="2")
    await system.ready(MODEL)
    async with system.client() as client:
        running = [await submit(client, LONG) for _ in range(2)]
        await has_logged(first, "job.claimed", 2)
        waiting = [await submit(client, 3) for _ in range(2)]
        assert await asyncio.to_thread(first.stop) == 0, first.log()
        assert claimed_by(first) == running
        released = [line["jobs"] for line in log_of(first) if line["event"] == "worker.releasing"]
        assert released == [2]
        # One at a time, so that the order shows. What was given back is ended by hand: it would take long.
        second = system.add_worker(folder, TORCHRELAY_ENGINE_MAX_NUM_SEQS="1")
        for number, generation_id in enumerate(running, start=1):
            await has_logged(second, "job.claimed", number)
            await client.cancel(generation_id)
        for generation_id in waiting:
            await until(lambda: is_finished(client, generation_id), what="the end of those that waited")  # noqa: B023
        await has_logged(second, "job.claimed", len(running + waiting))
        assert claimed_by(second) == running + waiting
        whole = await client.get(running[0])
        assert whole.state == pb.GENERATION_STATE_CANCELLED


async def test_a_gateway_that_drains_is_not_ready_first_and_ends_its_streams_resumable(
    system: System, folder: Path
) -> None:
    probes = f"127.0.0.1:{free_port()}"
    first = system.add_gateway(TORCHRELAY_GATEWAY_DRAIN_S="8", TORCHRELAY_GATEWAY_HEALTH_ADDRESS=probes)
    second = system.add_gateway()
    system.add_worker(folder, TORCHRELAY_ENGINE_TOKEN_BUDGET="256")
    await system.ready(MODEL)
    num_each = 24
    request = pb.StreamGenerateRequest(model=MODEL, input=pb.GenerationInput(token_ids=pb.TokenIds(ids=PROMPT)))
    request.config.temperature = 0
    request.disconnect_grace.FromSeconds(60)
    async with system.client(first) as client, system.client(second) as other:
        calls = []
        for number in range(2 * num_each):
            own = pb.StreamGenerateRequest()
            own.CopyFrom(request)
            own.config.max_tokens = LONG if number % 2 else 40
            calls.append(Outcome(events_of(client.generation.StreamGenerate(own, metadata=client.metadata))))
        short, long = calls[::2], calls[1::2]
        reading = [asyncio.create_task(end_of(call)) for call in calls]
        await until(lambda: _all_have_tokens(calls), 60, "tokens of all")
        first.signal(signal.SIGTERM)
        await until(lambda: is_not_ready(probes), what="NOT_SERVING")
        first.signal(signal.SIGINT)  # a second signal does no harm
        first.signal(signal.SIGTERM)
        assert all(call.finished is None for call in long), "readiness goes before the streams do"
        assert not any(task.done() for task in reading[1::2])
        ends = await asyncio.wait_for(asyncio.gather(*reading), 60)
        assert await asyncio.to_thread(first.process.wait, 30) == 0, first.log()  # type: ignore[union-attr]
        first.process = None
        assert ends[::2] == [None] * num_each
        assert ends[1::2] == [grpc.StatusCode.UNAVAILABLE] * num_each
        assert all(len(call.token_ids) == 40 for call in short)
        expected = reference.generate(reference.load_reference(folder), PROMPT, 300, [])
        for call in long[:3]:
            resumed = Outcome.resumed(other.resume(call.generation_id, call.sequence, call.chain_hash), call)
            await resumed.read(lambda outcome: len(outcome.token_ids) > len(call.token_ids) + 20)  # noqa: B023
            assert resumed.token_ids[: len(call.token_ids)] == call.token_ids
            assert resumed.token_ids[:300] == expected[: len(resumed.token_ids)]
        for call in long:
            await other.cancel(call.generation_id)


async def end_of(call: Outcome) -> grpc.StatusCode | None:
    """Read to the end; return the status if it is not OK."""
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        return error.code()
    return None


async def is_not_ready(address: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=5)
        return bool(response.status == health_pb2.HealthCheckResponse.NOT_SERVING)


async def _has_tokens(outcome: Outcome) -> bool:
    return len(outcome.token_ids) >= 5


async def _all_have_tokens(outcomes: list[Outcome]) -> bool:
    return all(outcome.token_ids for outcome in outcomes)


async def test_a_gateway_that_drains_refuses_new_calls_as_not_done(system: System, folder: Path) -> None:
    first = system.add_gateway(TORCHRELAY_GATEWAY_DRAIN_S="30")
    system.add_worker(folder)
    await system.ready(MODEL)
    async with system.client(first) as client:
        running = Outcome(client.stream(PROMPT, model=MODEL, max_tokens=700, temperature=0))
        reading = asyncio.create_task(running.read())
        await until(lambda: _has_tokens(running), what="tokens")
        first.signal(signal.SIGTERM)
        await has_logged(first, "gateway.draining")
        async with grpc.aio.insecure_channel(first.address) as channel:
            call = channel.unary_unary("/torchrelay.v1.ModelService/ListModels")
            with refused() as refusal:
                await call(b"", metadata=client.metadata, timeout=10)
        assert refusal.code is grpc.StatusCode.UNAVAILABLE
        await asyncio.wait_for(reading, 60)
        assert await asyncio.to_thread(first.process.wait, 30) == 0, first.log()  # type: ignore[union-attr]
        first.process = None
    assert len(running.token_ids) == 700
