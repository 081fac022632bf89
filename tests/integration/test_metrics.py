"""Metrics of a whole system, as Prometheus would read them: every generation counted once, whatever is killed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest

from tests.builders_calls import ended
from tests.builders_metrics import fetch, scrape, total
from tests.builders_models import write_tiny_model
from tests.builders_system import Gateway, Process, System, running_system, until
from tests.ports import free_port
from torchrelay.client import AsyncClient
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"


@dataclass
class Watched:
    """A system whose every process is scraped."""

    system: System
    folder: Path

    def add_gateway(self, **env: str) -> Gateway:
        return self.system.add_gateway(TORCHRELAY_GATEWAY_METRICS_ADDRESS=f"127.0.0.1:{free_port()}", **env)

    def add_worker(self) -> Process:
        return self.system.add_worker(self.folder, TORCHRELAY_WORKER_METRICS_ADDRESS=f"127.0.0.1:{free_port()}")


def address_of(process: Process) -> str:
    return next(value for name, value in process.env.items() if name.endswith("_METRICS_ADDRESS"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=2048, eos_token_id=None)


@pytest.fixture
def watched(tmp_path: Path, folder: Path) -> Iterator[Watched]:
    with running_system(tmp_path) as system:
        yield Watched(system, folder)


async def read(system: System, prompt: list[int], num_tokens: int, *, kill: bool = False) -> str:
    """Read a stream to its end; on the way kill whoever computes it. Return its id."""
    num_read = 0
    async with system.client() as client:
        stream = client.stream(prompt, model=MODEL, max_tokens=num_tokens)
        async for event in stream:
            num_read += sum(len(delta.token_ids) for delta in event.deltas.deltas)
            if kill and num_read >= 20:
                (await system.worker_of(stream.generation_id)).kill()
                kill = False
        assert num_read == num_tokens
        return stream.generation_id


async def submit(client: AsyncClient, model: str) -> str:
    request = pb.SubmitGenerationRequest(
        model=model,
        input=pb.GenerationInput(token_ids=pb.TokenIds(ids=[3, 4, 5])),
        config=pb.GenerationConfig(max_tokens=4),
    )
    response = await client.generation.SubmitGeneration(request, metadata=client.metadata)
    return response.accepted.generation_id


async def test_a_generation_is_counted_once_across_a_takeover(watched: Watched) -> None:
    system = watched.system
    gateway, workers = watched.add_gateway(), [watched.add_worker(), watched.add_worker()]
    await system.ready(MODEL, num_workers=2)
    await asyncio.gather(*(read(system, [3 + index, 4, 5], 200, kill=index == 0) for index in range(3)))
    alive = [address_of(worker) for worker in workers if worker.is_running]
    assert len(alive) == 1
    found = await scrape(*alive)
    # What the killed one counted went with it: its first tokens. No end was counted there, and all were here.
    assert total(found, "torchrelay_request_success_total", model_name=MODEL, finished_reason="length") == 3
    assert total(found, "torchrelay_claims_total", model_name=MODEL, kind="takeover") >= 1
    assert total(found, "torchrelay_e2e_request_latency_seconds_count", model_name=MODEL) == 3

    async def is_requeued() -> bool:
        counted = await scrape(address_of(gateway), *alive)
        return total(counted, "torchrelay_upkeep_jobs_total", model_name=MODEL, outcome="requeued") >= 1

    await until(is_requeued, what="the requeued generation among what upkeep counts")
    of_gateway = await scrape(address_of(gateway))
    assert total(of_gateway, "torchrelay_gateway_time_to_first_token_seconds_count", model_name=MODEL) == 3
    assert total(of_gateway, "torchrelay_streams_opened_total", model_name=MODEL, kind="new") == 3
    handled = {"grpc_method": "StreamGenerate", "grpc_code": "OK"}
    assert total(of_gateway, "grpc_server_handled_total", **handled) == 3
    assert total(of_gateway, "torchrelay_redis_up") == 1

    async def one_worker() -> bool:
        return total(await scrape(address_of(gateway)), "torchrelay_workers", model_name=MODEL) == 1

    await until(one_worker, what="one live worker among the gauges")


async def test_what_waits_is_told_with_its_age_and_refusals_with_their_reasons(watched: Watched) -> None:
    system = watched.system
    gateway, worker = watched.add_gateway(), watched.add_worker()
    await system.ready(MODEL)
    worker.kill()
    async with system.client() as client:
        with pytest.raises(grpc.aio.AioRpcError, match="no such model"):
            await submit(client, "none")
        generation_id = await submit(client, MODEL)

        async def waits() -> bool:
            found = await scrape(address_of(gateway))
            return (
                total(found, "torchrelay_queue_jobs", model_name=MODEL, priority="normal") == 1
                and total(found, "torchrelay_queue_oldest_age_seconds", model_name=MODEL) > 0.5
                and total(found, "torchrelay_queue_expected_wait_seconds", model_name=MODEL) > 0
            )

        await until(waits, what="a waiting generation among the gauges")
        found = await scrape(address_of(gateway))
        refused = {"grpc_method": "SubmitGeneration", "grpc_code": "NOT_FOUND", "reason": "MODEL_NOT_FOUND"}
        assert total(found, "torchrelay_call_errors_total", **refused) == 1
        watched.add_worker()
        await ended(client, generation_id)


async def test_probes_follow_a_processs_life(watched: Watched) -> None:
    system = watched.system
    gateway, worker = watched.add_gateway(), watched.add_worker()
    await system.ready(MODEL)
    for process in (gateway, worker):
        assert await fetch(address_of(process), "/healthz") == (200, "ok\n")
        assert await fetch(address_of(process), "/readyz") == (200, "ok\n")
    # Streams that go on keep both draining for a while, also on a fast machine.
    reading = asyncio.gather(*(read(system, [3 + index, 4, 5], 1900) for index in range(16)))

    async def has_begun() -> bool:
        return total(await scrape(address_of(worker)), "torchrelay_num_requests_running") > 8

    await until(has_begun, what="running generations")
    for process in (gateway, worker):
        process.signal(signal.SIGTERM)

        async def is_draining(process: Process = process) -> bool:
            return await fetch(address_of(process), "/readyz") == (503, "draining\n")

        await until(is_draining, what="unreadiness of what drains")
        assert (await fetch(address_of(process), "/healthz"))[0] == 200
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def test_a_gateway_without_its_server_is_alive_and_says_so(watched: Watched) -> None:
    system = watched.system
    gateway = watched.add_gateway(TORCHRELAY_REDIS_RETRY_DEADLINE_MS="1000")
    await system.ready()

    async def is_up() -> bool:
        return total(await scrape(address_of(gateway)), "torchrelay_redis_up") == 1

    await until(is_up, what="a server that answers")
    system.server.kill()

    async def is_down() -> bool:
        return total(await scrape(address_of(gateway)), "torchrelay_redis_up") == 0

    await until(is_down, timeout_s=60, what="a server that is lost")
    assert (await fetch(address_of(gateway), "/healthz"))[0] == 200
    assert (await fetch(address_of(gateway), "/readyz"))[0] == 200  # what runs goes on once the server is back
    system.server.start()
    await until(is_up, timeout_s=60, what="a server that answers again")


async def test_an_address_that_is_taken_ends_the_start(watched: Watched) -> None:
    gateway = watched.add_gateway()
    await watched.system.ready()
    second = watched.system.add_gateway(TORCHRELAY_GATEWAY_METRICS_ADDRESS=address_of(gateway))

    async def has_ended() -> bool:
        return not second.is_running

    await until(has_ended, what="the end of a gateway whose address is taken")
    assert f"cannot listen on {address_of(gateway)}" in second.log()
