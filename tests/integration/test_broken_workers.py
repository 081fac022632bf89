"""Real workers that hang or die by what they compute: their jobs move on, and the culprit becomes a dead letter."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tests import reference
from tests.builders_calls import Outcome, refused
from tests.builders_models import write_tiny_model
from tests.builders_system import Process, System, running_system, until
from tests.integration.test_survival import Reader
from torchrelay.admin.v1beta1 import fleet_pb2, fleet_pb2_grpc
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"
MARK = 200
MAX_TOKENS = 40
POISON = [MARK, 4, 5]
PROMPTS = [[3 + (7 * i + 11 * j) % 150 for j in range(5 + 9 * i)] for i in range(3)]
HUNG_STATUS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=2048, eos_token_id=None)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    model = reference.load_reference(folder)
    return [reference.generate(model, prompt, MAX_TOKENS, []) for prompt in PROMPTS]


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    with running_system(tmp_path) as system:
        yield system


def add_broken_worker(system: System, folder: Path, act: str, **env: str) -> Process:
    worker = system.add_worker(
        folder, MODEL, start=False, BROKEN_WORKER_TOKEN=str(MARK), BROKEN_WORKER_ACT=act, **env
    )  # fmt: skip
    worker.module = "tests.broken_worker"
    worker.start()
    return worker


async def test_a_hung_step_ends_the_process_and_its_job_moves_on(
    system: System, folder: Path, expected: list[list[int]]
) -> None:
    system.add_gateway()
    hung = add_broken_worker(system, folder, "hang", TORCHRELAY_WORKER_HANG_S="1")
    await system.ready(MODEL)
    async with system.client() as client:
        readers = [Reader(client.stream(prompt, model=MODEL, max_tokens=MAX_TOKENS)) for prompt in (POISON, PROMPTS[0])]
        reading = [asyncio.create_task(reader.read()) for reader in readers]
        assert hung.process is not None
        assert await asyncio.to_thread(hung.process.wait, 40) == HUNG_STATUS, hung.log()
        assert "StepHungError" in hung.log()
        system.add_worker(folder, MODEL)
        await asyncio.wait_for(asyncio.gather(*reading), 60)
    assert readers[1].token_ids == expected[0]
    assert all(reader.finished is not None for reader in readers)


@pytest.mark.row(52)
async def test_a_prompt_that_kills_its_workers_becomes_a_dead_letter_and_its_neighbours_finish(
    system: System, folder: Path, expected: list[list[int]]
) -> None:
    gateway = system.add_gateway()
    workers = [add_broken_worker(system, folder, "die", TORCHRELAY_WORKER_MAX_JOBS="8")]
    await system.ready(MODEL)

    async def keep_running() -> None:
        """As a supervisor does."""
        while True:
            for worker in workers:
                if not worker.is_running:
                    worker.process = None
                    worker.start()
            await asyncio.sleep(0.1)

    keeping = asyncio.create_task(keep_running())
    try:
        async with system.client() as client, grpc.aio.insecure_channel(gateway.admin_address) as channel:
            request = pb.SubmitGenerationRequest(
                model=MODEL,
                input=pb.GenerationInput(token_ids=pb.TokenIds(ids=POISON)),
                config=pb.GenerationConfig(max_tokens=MAX_TOKENS),
            )
            submitted = await client.generation.SubmitGeneration(request, metadata=client.metadata)
            poison = submitted.accepted.generation_id
            readers = [Reader(client.stream(prompt, model=MODEL, max_tokens=MAX_TOKENS)) for prompt in PROMPTS]
            await asyncio.wait_for(asyncio.gather(*(reader.read() for reader in readers)), 180)
            assert [reader.token_ids for reader in readers] == expected
            fleet: fleet_pb2_grpc.FleetServiceAsyncStub = fleet_pb2_grpc.FleetServiceStub(channel)

            async def is_buried() -> bool:
                return (await client.get(poison)).state == pb.GENERATION_STATE_FAILED

            await until(is_buried, timeout_s=120, what="the dead letter")
            (letter,) = (await fleet.ListDeadLetters(fleet_pb2.ListDeadLettersRequest(model=MODEL))).dead_letters
            assert letter.generation_id == poison
            assert letter.reason == fleet_pb2.DEAD_LETTER_REASON_ATTEMPTS_EXHAUSTED
            assert (letter.num_attempts, letter.num_claims) == (3, 3)
            with refused() as refusal:
                await Outcome.resumed(client.resume(poison)).read()
            assert refusal.summary[:2] == (grpc.StatusCode.INTERNAL, "WORKER_FAILED")
    finally:
        keeping.cancel()
