"""What the library answers before a handler is asked, and what is answered beside it."""

from __future__ import annotations

import asyncio
import gzip
import struct
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import hpack
import pytest
from grpc_reflection.v1alpha import reflection_pb2_grpc

from tests.builders_calls import Outcome, events_of, refused
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system, until
from tests.security import wire
from torchrelay.admin.v1beta1 import usage_pb2, usage_pb2_grpc
from torchrelay.client import AsyncClient
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import model_pb2

MODEL = "tiny"
MAX_STREAMS = 6
_LIST = "/torchrelay.v1.ModelService/ListModels"
_STREAM = "/torchrelay.v1.GenerationService/StreamGenerate"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A gateway of few streams, one of few calls, and a worker."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=2048, eos_token_id=None)
    with running_system(tmp_path_factory.mktemp("system")) as system:
        system.add_gateway(TORCHRELAY_GATEWAY_MAX_CONCURRENT_STREAMS=str(MAX_STREAMS))
        system.add_gateway(TORCHRELAY_GATEWAY_MAX_CALLS="2")
        system.add_worker(folder, MODEL)
        asyncio.run(system.ready(MODEL))
        yield system


@pytest.fixture
async def client(system: System) -> AsyncIterator[AsyncClient]:
    async with system.client(system.gateways[0]) as client:
        yield client
        outcome = await Outcome(client.stream("still there?", model=MODEL, max_tokens=2)).read()
        assert outcome.finished is not None


def wanted(max_tokens: int = 2) -> pb.StreamGenerateRequest:
    return pb.StreamGenerateRequest(
        model=MODEL, input=pb.GenerationInput(text="hello"), config=pb.GenerationConfig(max_tokens=max_tokens)
    )


@pytest.mark.row(32)
async def test_metadata_over_the_limit_is_refused_and_below_it_never(client: AsyncClient) -> None:
    for size, is_taken in ((1000, True), (6000, True), (9000, False), (40_000, False)):
        for _ in range(10):
            metadata = [*client.metadata, ("x-more", "m" * size)]
            try:
                await client.model.ListModels(model_pb2.ListModelsRequest(), metadata=metadata, timeout=10)
                taken = True
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # noqa: PT017 - half of the cases
                taken = False
            assert taken == is_taken, size


async def raw_call(system: System, path: str, payload: bytes, *extra: tuple[str, str], key: str = "") -> dict[str, str]:
    """Send a message's bytes as they are, and return the trailers."""

    def call() -> dict[str, str]:
        with wire.Attacker(system.gateways[0].address) as attacker:
            block = wire.grpc_headers(
                path, attacker.authority, ("authorization", f"Bearer {key or system.key}"), *extra
            )
            attacker.send(wire.frame(wire.HEADERS, block, flags=wire.END_HEADERS, stream=1))
            for start in range(0, len(payload), 16384):
                part = payload[start : start + 16384]
                is_last = start + 16384 >= len(payload)
                attacker.send(wire.frame(wire.DATA, part, flags=wire.END_STREAM if is_last else 0, stream=1))
            end = time.monotonic() + 20
            found: dict[str, str] = {}
            while time.monotonic() < end and "grpc-status" not in found:
                attacker.wait_until_closed(0.1)
                decoder = hpack.Decoder()
                for kind, _, _, block in attacker.frames():
                    if kind == wire.HEADERS:
                        found |= {str(name): str(value) for name, value in decoder.decode(block)}
            return found

    return await asyncio.to_thread(call)


@pytest.mark.row(33)
async def test_a_message_that_grows_beyond_the_limit_is_refused(system: System, client: AsyncClient) -> None:
    bomb = gzip.compress(b"\0" * (64 << 20), 9)
    assert len(bomb) < 100_000
    payload = struct.pack(">BI", 1, len(bomb)) + bomb
    trailers = await raw_call(system, _LIST, payload, ("grpc-encoding", "gzip"))
    assert trailers["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    good = gzip.compress(model_pb2.ListModelsRequest(page_size=3).SerializeToString())
    payload = struct.pack(">BI", 1, len(good)) + good
    assert (await raw_call(system, _LIST, payload, ("grpc-encoding", "gzip")))["grpc-status"] == "0"


@pytest.mark.row(34)
async def test_an_encoding_that_nobody_knows_is_refused(system: System, client: AsyncClient) -> None:
    """By the library, and as INTERNAL: it says which encodings it takes, and not that it misses this one."""
    payload = struct.pack(">BI", 1, 3) + b"abc"
    trailers = await raw_call(system, _LIST, payload, ("grpc-encoding", "zebra"))
    assert trailers["grpc-status"] == str(grpc.StatusCode.INTERNAL.value[0])


@pytest.mark.row(36)
async def test_a_deadline_that_has_passed_starts_nothing(system: System, client: AsyncClient) -> None:
    key = system.create_key("late")
    metadata = [("authorization", f"Bearer {key}")]
    for seconds in (0.0, 1e-6, -1.0):
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await Outcome(
                events_of(client.generation.StreamGenerate(wanted(), metadata=metadata, timeout=seconds))
            ).read()
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    payload = struct.pack(">BI", 0, wanted().ByteSize()) + wanted().SerializeToString()
    for timeout in ("1n", *["4m"] * 20):
        trailers = await raw_call(system, _STREAM, payload, ("grpc-timeout", timeout), key=key)
        assert trailers.get("grpc-status", "4") == "4"
    await Outcome(events_of(client.generation.StreamGenerate(wanted(), metadata=metadata))).read()
    async with grpc.aio.insecure_channel(system.gateways[0].admin_address) as channel:
        usage: usage_pb2_grpc.UsageServiceAsyncStub = usage_pb2_grpc.UsageServiceStub(channel)
        rows = (await usage.QueryUsage(usage_pb2.QueryUsageRequest(tenant="late"))).rows
    assert sum(row.generations for row in rows) == 1


@pytest.mark.row(55)
async def test_a_megabyte_of_one_letter_holds_nobody_up(client: AsyncClient) -> None:
    """Tokenizers that merge pairs take time that grows faster than their text; here others are served meanwhile."""
    long = pb.StreamGenerateRequest(model=MODEL, input=pb.GenerationInput(text="a" * (1 << 20)))

    async def ask() -> str:
        with refused() as refusal:
            await Outcome(events_of(client.generation.StreamGenerate(long, metadata=client.metadata))).read()
        return refusal.reason

    asking = [asyncio.create_task(ask()) for _ in range(4)]
    others = await Outcome(client.stream("short", model=MODEL, max_tokens=2)).read()
    assert others.finished is not None
    assert await asyncio.wait_for(asyncio.gather(*asking), 60) == ["CONTEXT_LENGTH_EXCEEDED"] * 4


@pytest.mark.row(57)
async def test_one_stream_too_many_waits_at_its_client(system: System) -> None:
    async with system.client(system.gateways[0]) as client:
        outcomes = [Outcome(client.stream("hello", model=MODEL, max_tokens=1500)) for _ in range(MAX_STREAMS)]
        running = [asyncio.create_task(outcome.read()) for outcome in outcomes]

        async def have_begun() -> bool:
            return all(outcome.accepted is not None for outcome in outcomes)

        await until(have_begun)
        waiting = client.model.ListModels(model_pb2.ListModelsRequest(), metadata=client.metadata)
        done, _ = await asyncio.wait([asyncio.ensure_future(waiting.code()), *running], timeout=0.3)
        assert not done, "it did not wait, or the streams were too short"
        async with system.client(system.gateways[0]) as other:  # over a connection of its own
            await asyncio.gather(*(other.cancel(outcome.generation_id) for outcome in outcomes))
        await asyncio.gather(*running)
        assert (await waiting).models


@pytest.mark.row(58)
async def test_one_call_too_many_is_refused_with_a_time_to_come_again(system: System) -> None:
    async with system.client(system.gateways[1]) as client:
        outcomes = [Outcome(client.stream("hello", model=MODEL, max_tokens=1500)) for _ in range(2)]
        running = [asyncio.create_task(outcome.read()) for outcome in outcomes]

        async def have_begun() -> bool:
            return all(outcome.accepted is not None for outcome in outcomes)

        await until(have_begun)
        with refused() as refusal:
            await Outcome(events_of(client.generation.StreamGenerate(wanted(), metadata=client.metadata))).read()
        assert refusal.summary[:2] == (grpc.StatusCode.RESOURCE_EXHAUSTED, "GATEWAY_FULL")
        assert refusal.error is not None
        assert refusal.error.retry_delay_s is not None
        assert refusal.error.retry_delay_s > 0
        for outcome in outcomes:
            await client.cancel(outcome.generation_id)
        await asyncio.gather(*running)
        assert (await Outcome(client.stream("hello", model=MODEL, max_tokens=2)).read()).finished is not None


@pytest.mark.row(59)
async def test_reflection_is_off_unless_it_is_asked_for(system: System, client: AsyncClient) -> None:
    async with grpc.aio.insecure_channel(system.gateways[0].address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo()  # nothing is sent: a request that the refusal overtakes fails by itself
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
