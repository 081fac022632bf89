"""Faults around a process: a blocked event loop, a storm of callers, no descriptors left, a log that nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tests import reference
from tests.builders_calls import Outcome, idle_fleet, refused
from tests.builders_models import write_tiny_model
from tests.builders_system import Process, System, running_system, until
from torchrelay.client import AsyncClient, RelayError, RetryPolicy
from torchrelay.client.errors import from_rpc_error
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"
MAX_TOKENS = 500
PROMPT = [3 + (7 * i) % 250 for i in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=2048, eos_token_id=None)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    return reference.generate(reference.load_reference(folder), PROMPT, MAX_TOKENS, [])


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    with running_system(tmp_path / "system") as system:
        yield system


def stream(client: AsyncClient) -> Outcome:
    return Outcome(client.stream(PROMPT, model=MODEL, max_tokens=MAX_TOKENS, temperature=0))


async def begun(outcome: Outcome) -> None:
    async def has_tokens() -> bool:
        return len(outcome.token_ids) >= 5

    await until(has_tokens, what="tokens")


async def test_a_gateway_whose_event_loop_is_blocked_catches_up(
    system: System, folder: Path, expected: list[int]
) -> None:
    """Longer than its lease, so that another gateway lets go of its streams; it takes them up again."""
    first = system.add_gateway(start=False)
    first.module = "tests.gateway_that_blocks"
    first.start()
    system.add_gateway()
    system.add_worker(folder)
    await system.ready(MODEL)
    async with system.client(first) as client:
        call = stream(client)
        reading = asyncio.create_task(call.read())
        await begun(call)
        first.signal(signal.SIGUSR1)
        await asyncio.wait_for(reading, 60)
        assert call.token_ids == expected
        assert first.is_running
        again = await stream(client).read()
        assert again.token_ids == expected, "it serves as before"


async def test_a_storm_of_resumes_is_bounded_and_spread_and_nobody_loses_anything(system: System, folder: Path) -> None:
    bound, num_callers = 8, 500
    gateway = system.add_gateway(TORCHRELAY_GATEWAY_MAX_CALLS=str(bound))
    system.add_worker(folder)
    await system.ready(MODEL)
    patient = RetryPolicy(give_up_after_s=60, first_contact_s=60)
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(system.client(gateway, retry=patient)) for _ in range(4)]
        one = clients[0]
        running = stream(one)
        reading = asyncio.create_task(running.read())
        await begun(running)
        done = [(await one.generate(PROMPT, model=MODEL, max_tokens=3, temperature=0)).generation_id for _ in range(5)]
        refusals: list[RelayError] = []

        async def resume(number: int) -> int:
            """As a bare stub does, once; return how many tokens came."""
            client = clients[number % len(clients)]
            request = pb.ResumeGenerationRequest(generation_id=done[number % len(done)])
            call = client.generation.ResumeGeneration(request, metadata=client.metadata)
            try:
                return sum([len(d.token_ids) async for r in call for d in r.event.deltas.deltas])
            except grpc.aio.AioRpcError as error:
                refusals.append(from_rpc_error(error))
                return 0

        await asyncio.gather(*(resume(number) for number in range(num_callers)))
        full = [error for error in refusals if error.reason == "GATEWAY_FULL"]
        others = {(error.code, error.reason) for error in refusals} - {
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "GATEWAY_FULL"),
            (grpc.StatusCode.ABORTED, "SUPERSEDED"),  # they ask for the same few
            # The transport's own: all share a connection, and it refuses a stream beyond its 256. Nothing was done.
            (grpc.StatusCode.UNAVAILABLE, ""),
        }
        assert others == set()
        assert full, "the bound was reached"
        delays = {error.retry_delay_s for error in full}
        assert len(delays) > len(full) / 10, "not all come back at the same moment"
        assert all(0.5 <= delay <= 1.5 for delay in delays if delay is not None)
        assert None not in delays
        # Those who resume by themselves all get through.
        texts = await asyncio.wait_for(
            asyncio.gather(*(_tokens_of(clients[n % len(clients)], done[n % len(done)]) for n in range(40))), 60
        )
        assert set(map(len, texts)) == {3}
        await asyncio.wait_for(reading, 60)
        assert len(running.token_ids) == MAX_TOKENS, "whoever was in is not disturbed"


async def _tokens_of(client: AsyncClient, generation_id: str) -> list[int]:
    while True:
        try:
            return (await Outcome.resumed(client.resume(generation_id)).read()).token_ids
        except RelayError as error:
            if error.reason != "SUPERSEDED":
                raise


async def test_a_gateway_without_descriptors_refuses_and_recovers(
    system: System, folder: Path, expected: list[int]
) -> None:
    gateway = system.add_gateway()
    system.add_worker(folder)
    await system.ready(MODEL)
    assert gateway.process is not None
    host, port = gateway.address.split(":")
    async with system.client(gateway) as client:
        call = stream(client)
        reading = asyncio.create_task(call.read())
        await begun(call)
        resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE, (128, 128))
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(contextlib.closing(socket.create_connection((host, int(port)))))
            await until(lambda: has_no_descriptor_left(gateway), what="all descriptors taken")
            async with grpc.aio.insecure_channel(gateway.address) as channel:
                list_models = channel.unary_unary("/torchrelay.v1.ModelService/ListModels")
                with refused() as refusal:
                    await list_models(b"", metadata=client.metadata, timeout=3)
            assert refusal.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            await asyncio.wait_for(reading, 60)
            assert call.token_ids == expected, "whoever was in is served"
            assert gateway.is_running
        async with system.client(gateway) as late:
            again = await asyncio.wait_for(stream(late).read(), 60)
    assert again.token_ids == expected, "once connections end, new ones are taken"


async def has_no_descriptor_left(process: Process) -> bool:
    assert process.process is not None
    return len(os.listdir(f"/proc/{process.process.pid}/fd")) >= 127


def start_with_full_log(process: Process) -> int:
    """Start a process whose standard error is a full pipe; return the end that nobody reads."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, b"\n" * 4096)
    env = {**os.environ, **process.env, "TORCHRELAY_LOG_LEVEL": "DEBUG"}
    process.process = subprocess.Popen(
        [sys.executable, "-m", process.module], env=env, stdin=subprocess.DEVNULL, stderr=writer
    )
    os.close(writer)
    return reader


async def test_a_log_that_nobody_reads_stops_nobody(system: System, folder: Path, expected: list[int]) -> None:
    processes: list[Process] = [system.add_gateway(start=False), system.add_worker(folder, start=False)]
    logs = [start_with_full_log(process) for process in processes]
    try:
        await system.ready(MODEL)
        async with system.client() as client:
            for _ in range(3):
                assert (await stream(client).read()).token_ids == expected
            # The reader is back: both say how much it has missed.
            for log in logs:
                assert os.read(log, 1 << 16).strip(b"\n") == b""
            assert (await stream(client).read()).token_ids == expected
            with refused():
                await client.get("no-such.generation")
            await idle_fleet(system)
        for process in processes:
            assert process.stop() == 0
        for log in logs:
            text = b"".join(iter(lambda: os.read(log, 1 << 16), b"")).decode()  # noqa: B023
            assert '"event": "log.dropped"' in text
    finally:
        for log in logs:
            os.close(log)
