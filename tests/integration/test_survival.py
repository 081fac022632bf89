"""What callers see when processes are killed: nothing, but a pause."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest

from tests import reference
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system, until
from torchrelay.client import AsyncGenerationStream
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"
MAX_TOKENS = 300
PROMPTS = [[3 + (7 * i + 11 * j) % 250 for j in range(5 + 9 * i)] for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=2048, eos_token_id=None)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """What the model says to each prompt."""
    model = reference.load_reference(folder)
    return [reference.generate(model, prompt, MAX_TOKENS, []) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running_system(tmp_path_factory.mktemp("system")) as system:
        yield system


class Reader:
    """Reads a stream to its end and holds it to the law: every token once, in order, one end."""

    def __init__(self, stream: AsyncGenerationStream) -> None:
        self.stream = stream
        self.token_ids: list[int] = []
        self.text = ""
        self.finished: pb.Finished | None = None
        self.states: list[int] = []
        self.last_sequence = 0

    async def read(self, stop_after: int | None = None) -> None:
        async for event in self.stream:
            assert self.finished is None, "an event after the end"
            assert event.sequence >= self.last_sequence
            self.last_sequence = event.sequence
            for delta in event.deltas.deltas:
                assert delta.first_token_index == len(self.token_ids), "a gap or a repetition"
                self.token_ids += delta.token_ids
                self.text += delta.text
            if event.HasField("progress"):
                self.states.append(event.progress.state)
            if event.HasField("finished"):
                self.finished = event.finished
            if stop_after is not None and len(self.token_ids) >= stop_after:
                return


async def some_tokens(reader: Reader, at_least: int = 20) -> None:
    async def enough() -> bool:
        return len(reader.token_ids) >= at_least

    await until(enough, what=f"{at_least} tokens")


async def test_killed_worker_is_not_seen_by_the_same_call(
    system: System, folder: Path, expected: list[list[int]]
) -> None:
    await system.scale(folder, workers=2)
    async with system.client() as client:
        readers = [Reader(client.stream(prompt, model=MODEL, max_tokens=MAX_TOKENS)) for prompt in PROMPTS]
        async with asyncio.TaskGroup() as group:
            for reader in readers:
                group.create_task(reader.read())
            await some_tokens(readers[0])
            (await system.worker_of(readers[0].stream.generation_id)).kill()
        assert [reader.token_ids for reader in readers] == expected
        assert all(reader.stream.position.num_resumes == 0 for reader in readers), "the call itself went on"
        assert max(reader.finished.timings.num_takeovers for reader in readers if reader.finished) == 1
        assert pb.GENERATION_STATE_RECOVERING in {state for reader in readers for state in reader.states}


async def test_killed_gateway_is_resumed_on_another(system: System, folder: Path, expected: list[list[int]]) -> None:
    await system.scale(folder, gateways=2)
    first, second = system.gateways
    async with system.client(first) as client, system.client(second) as other:
        reader = Reader(client.stream(PROMPTS[0], model=MODEL, max_tokens=MAX_TOKENS))
        await reader.read(stop_after=30)
        first.kill()
        rest = Reader(
            other.resume(
                reader.stream.generation_id, reader.stream.position.sequence, reader.stream.position.chain_hash
            )
        )
        rest.token_ids = list(reader.token_ids)
        await rest.read()
    assert rest.token_ids == expected[0]
    assert rest.finished is not None


async def test_client_goes_on_by_itself_when_its_gateway_is_killed(
    system: System, folder: Path, expected: list[list[int]]
) -> None:
    await system.scale(folder)
    gateway = system.gateways[0]
    async with system.client(gateway) as client:
        reader = Reader(client.stream(PROMPTS[1], model=MODEL, max_tokens=MAX_TOKENS))
        reading = asyncio.create_task(reader.read())
        await some_tokens(reader)
        gateway.kill()
        gateway.start()
        await asyncio.wait_for(reading, 60)
    assert reader.token_ids == expected[1]
    assert reader.stream.position.num_resumes >= 1


async def test_everything_killed_and_started_again_loses_nothing(
    system: System, folder: Path, expected: list[list[int]]
) -> None:
    await system.scale(folder, workers=0)
    gateway = system.gateways[0]
    # One sequence at a time: one generation runs, the others wait in the queue.
    worker = system.add_worker(folder, TORCHRELAY_ENGINE_MAX_NUM_SEQS="1")
    await system.ready(MODEL)
    async with system.client(gateway) as client:
        readers = [Reader(client.stream(prompt, model=MODEL, max_tokens=MAX_TOKENS)) for prompt in PROMPTS]
        async with asyncio.TaskGroup() as group:
            for reader in readers:
                group.create_task(reader.read())
            await until(lambda: _any_token(readers), what="a first token")
            for process in (worker, gateway):
                process.kill()
            system.server.kill()
            system.server.start()
            gateway.start()
            worker.start()
        assert [reader.token_ids for reader in readers] == expected
        for reader in readers:
            whole = await client.get(reader.stream.generation_id)
            assert list(whole.outputs[0].token_ids) == reader.token_ids
            assert whole.outputs[0].text == reader.text
            assert whole.state == pb.GENERATION_STATE_FINISHED


async def test_paused_worker_writes_nothing_when_it_wakes(
    system: System, folder: Path, expected: list[list[int]]
) -> None:
    await system.scale(folder)
    first = system.workers[0]
    async with system.client() as client:
        reader = Reader(client.stream(PROMPTS[2], model=MODEL, max_tokens=MAX_TOKENS))
        reading = asyncio.create_task(reader.read())
        await some_tokens(reader)
        first.signal(signal.SIGSTOP)
        system.add_worker(folder)
        await asyncio.wait_for(reading, 60)
        first.signal(signal.SIGCONT)
        assert reader.token_ids == expected[2]
        again = Reader(client.stream(PROMPTS[3], model=MODEL, max_tokens=MAX_TOKENS))
        await again.read()
        assert again.token_ids == expected[3]

    async def all_blocks_are_free() -> bool:
        return all(worker.num_free_blocks == worker.num_blocks for worker in await system.fleet())

    await until(all_blocks_are_free, what="free blocks on both workers")


async def test_worker_that_is_told_to_stop_gives_its_work_to_another(
    system: System, folder: Path, expected: list[list[int]]
) -> None:
    await system.scale(folder, workers=0)
    first = system.add_worker(folder, TORCHRELAY_WORKER_DRAIN_S="0")
    await system.ready(MODEL)
    async with system.client() as client:
        reader = Reader(client.stream(PROMPTS[0], model=MODEL, max_tokens=MAX_TOKENS))
        reading = asyncio.create_task(reader.read())
        await some_tokens(reader)
        assert await asyncio.to_thread(first.stop) == 0, first.log()
        system.add_worker(folder)
        await asyncio.wait_for(reading, 60)
    assert reader.token_ids == expected[0]


async def test_gateway_that_is_told_to_stop_ends_its_streams_resumable(
    system: System, folder: Path, expected: list[list[int]]
) -> None:
    await system.scale(folder, gateways=0)
    first = system.add_gateway(TORCHRELAY_GATEWAY_DRAIN_S="0.1")
    second = system.add_gateway(start=False)
    await system.ready(MODEL)
    async with system.client() as client:  # of both addresses; all calls are with the gateway that is up
        readers = [Reader(client.stream(prompt, model=MODEL, max_tokens=MAX_TOKENS)) for prompt in PROMPTS]
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for reader in readers:
                group.create_task(reader.read())
            await some_tokens(readers[0])
            second.start()
            assert await asyncio.to_thread(first.stop) == 0, first.log()
    assert [reader.token_ids for reader in readers] == expected
    assert any(reader.stream.position.num_resumes for reader in readers)


async def test_second_stream_of_a_generation_ends_the_first(system: System, folder: Path) -> None:
    await system.scale(folder)
    async with system.client() as client:
        request = pb.StreamGenerateRequest(
            model=MODEL,
            input=pb.GenerationInput(token_ids=pb.TokenIds(ids=PROMPTS[0])),
            config=pb.GenerationConfig(max_tokens=1500),
        )
        call = client.generation.StreamGenerate(request, metadata=client.metadata)
        generation_id = (await call.read()).event.accepted.generation_id
        reader = Reader(client.resume(generation_id))
        reading = asyncio.create_task(reader.read())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_on(call)
        assert caught.value.code() is grpc.StatusCode.ABORTED
        await asyncio.wait_for(reading, 60)
    assert reader.finished is not None


async def _any_token(readers: list[Reader]) -> bool:
    return any(reader.token_ids for reader in readers)


async def read_on(call: grpc.aio.UnaryStreamCall[pb.StreamGenerateRequest, pb.StreamGenerateResponse]) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass
