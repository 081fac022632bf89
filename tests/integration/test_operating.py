"""An operator's day on a real system: the fleet is watched, a worker is drained under load, gateways come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from typer.testing import CliRunner

from tests.builders_calls import Outcome, refused
from tests.builders_models import write_tiny_model
from tests.builders_system import Gateway, System, running_system, until
from tests.integration.test_draining import has_logged, log_of
from torchrelay.admin.v1beta1 import fleet_pb2, fleet_pb2_grpc
from torchrelay.cli.main import make_app
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import model_pb2

MODEL = "tiny"
PROMPT = [3 + (7 * i) % 250 for i in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=8192, eos_token_id=None)


@pytest.fixture
def system(tmp_path: Path, folder: Path) -> Iterator[System]:
    with running_system(tmp_path / "system") as system:
        system.add_gateway()
        system.add_worker(folder, TORCHRELAY_WORKER_DRAIN_S="60")
        asyncio.run(system.ready(MODEL))
        yield system


def has_tokens(*outcomes: Outcome) -> Any:
    async def found() -> bool:
        return all(len(outcome.token_ids) >= 5 for outcome in outcomes)

    return found


def run(gateway: Gateway, *args: str) -> str:
    """What the command prints."""
    result = CliRunner(env={"TORCHRELAY_ADMIN_ADDRESS": gateway.admin_address}).invoke(make_app(), args)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


async def test_a_worker_that_is_drained_under_load_breaks_no_stream(system: System, folder: Path) -> None:
    first = system.workers[0]
    second = system.add_worker(folder)
    await system.ready(MODEL, num_workers=2)
    async with system.client() as client, grpc.aio.insecure_channel(system.gateways[0].admin_address) as channel:
        stub: fleet_pb2_grpc.FleetServiceAsyncStub = fleet_pb2_grpc.FleetServiceStub(channel)
        running = [Outcome(client.stream(PROMPT, model=MODEL, max_tokens=250, temperature=0)) for _ in range(6)]
        reading = [asyncio.create_task(outcome.read()) for outcome in running]
        await until(has_tokens(*running), what="tokens of all")
        assert first.process is not None
        leaving = next(one for one in await system.fleet() if one.host.endswith(f":{first.process.pid}"))
        staying = next(one for one in await system.fleet() if one.worker_id != leaving.worker_id)
        found = await stub.ListGenerations(fleet_pb2.ListGenerationsRequest(page_size=1000))  # at once: they end soon
        held = {one.generation_id for one in found.generations if one.worker_id == leaving.worker_id}
        assert held, "both workers have some"

        request = fleet_pb2.DrainWorkerRequest(worker_id=leaving.worker_id)
        for _ in range(2):
            asked = (await stub.DrainWorker(request)).workers
            assert [(one.worker_id, one.drain_requested_by) for one in asked] == [(leaving.worker_id, "local")]
        await has_logged(first, "worker.draining")
        late = Outcome(client.stream(PROMPT, model=MODEL, max_tokens=5, temperature=0))
        await asyncio.wait_for(late.read(), 60)
        await asyncio.wait_for(asyncio.gather(*reading), 120)
        assert await asyncio.to_thread(first.process.wait, 30) == 0, first.log()
        first.process = None

        assert len({tuple(outcome.token_ids) for outcome in running}) == 1
        assert all(len(outcome.token_ids) == 250 for outcome in running)
        assert all(one.finished is not None and one.finished.timings.num_takeovers == 0 for one in running)
        assert [line["by"] for line in log_of(first) if line["event"] == "worker.drain_requested"] == ["local"]
        await has_logged(second, "job.claimed", len(running) - len(held) + 1)
        claimed = {line["generation_id"] for line in log_of(second) if line["event"] == "job.claimed"}
        assert late.generation_id in claimed
        assert not held & claimed
        assert [one.worker_id for one in await system.fleet()] == [staying.worker_id]
        with refused() as refusal:
            await stub.DrainWorker(request)
        assert refusal.summary[:2] == (grpc.StatusCode.NOT_FOUND, "WORKER_NOT_FOUND")
    assert second.is_running


async def test_the_fleet_is_watched_while_it_works_and_until_the_gateway_stops(system: System) -> None:
    gateway = system.gateways[0]
    async with system.client() as client, grpc.aio.insecure_channel(gateway.admin_address) as channel:
        stub: fleet_pb2_grpc.FleetServiceAsyncStub = fleet_pb2_grpc.FleetServiceStub(channel)
        request = fleet_pb2.WatchFleetRequest(include_generations=True)
        request.interval.FromMilliseconds(500)
        watching: Any = stub.WatchFleet(request)
        idle = (await watching.read()).snapshot
        assert [(one.model, one.num_jobs) for one in idle.workers] == [(MODEL, 0)]
        assert [(one.state, one.num_running) for one in idle.models] == [(model_pb2.MODEL_STATE_READY, 0)]
        assert not idle.generations

        running = Outcome(client.stream(PROMPT, model=MODEL, max_tokens=4000, temperature=0))
        reading = asyncio.create_task(running.read())
        busy = idle
        while not (busy.workers[0].generated_tokens > 20 and busy.generations):
            later = (await asyncio.wait_for(watching.read(), 30)).snapshot
            assert later.time.ToMilliseconds() > busy.time.ToMilliseconds()
            busy = later
        (info,) = busy.generations
        assert (info.generation_id, info.state) == (running.generation_id, pb.GENERATION_STATE_RUNNING)
        assert (info.tenant, info.worker_id) == ("tests", busy.workers[0].worker_id)
        assert (busy.gateway.num_streams, busy.num_running, busy.workers[0].num_jobs) == (1, 1, 1)
        assert 0 <= busy.time.ToMilliseconds() - busy.workers[0].report_time.ToMilliseconds() < 30_000

        picture = await asyncio.to_thread(run, gateway, "top", "--once")
        assert "1 running, 0 waiting, 1 streams here" in picture
        assert "- tok/s" not in picture
        (shown,) = [line for line in picture.splitlines() if line.startswith(busy.workers[0].worker_id[:8])]
        assert MODEL in shown
        (row,) = (await asyncio.to_thread(run, gateway, "queue")).splitlines()[1:]
        assert row.split() == [MODEL, "-", "-", "0", "-", "-"]

        reading.cancel()
        await client.cancel(running.generation_id)
        worker_id = busy.workers[0].worker_id
        told = await asyncio.to_thread(run, gateway, "drain", worker_id[:10], "--wait")
        assert told.splitlines() == [f"{worker_id} {MODEL} asked", f"{worker_id} {MODEL} gone"]
        assert system.workers[0].process is not None
        assert await asyncio.to_thread(system.workers[0].process.wait, 30) == 0
        system.workers[0].process = None
        gateway.signal(15)
        with refused() as refusal:
            while True:
                await asyncio.wait_for(watching.read(), 30)
        assert refusal.summary[:2] == (grpc.StatusCode.UNAVAILABLE, "GATEWAY_STOPPING")
