"""A canary in all that callers write is found nowhere: not in logs at DEBUG, records, letters, files or crashes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import msgspec
import pytest

from tests.builders_calls import Outcome
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system, until
from torchrelay.admin.v1beta1 import fleet_pb2, fleet_pb2_grpc, usage_pb2, usage_pb2_grpc
from torchrelay.client import AsyncClient, RelayError
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import model_pb2

MODEL = "tiny"
MARK = 200
CANARY = "Kanarienvogel7Q"
TEXT = f"my {CANARY} sings at dawn"
REFUSED = (grpc.aio.AioRpcError, RelayError)


@pytest.fixture(scope="module", params=["sealed", "plain"])
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A gateway and a worker that say all they can, and one that crashes with what it was given."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=512, eos_token_id=None)
    home = tmp_path_factory.mktemp("system")
    env = {"TORCHRELAY_LOG_LEVEL": "DEBUG", "TORCHRELAY_QUEUE_MAX_FRUITLESS_ATTEMPTS": "1"}
    if request.param == "sealed":
        keys = home / "keys"
        keys.write_text(f"k1 {base64.b64encode(os.urandom(32)).decode()}\n")
        env["TORCHRELAY_ENCRYPTION_KEYS_FILE"] = str(keys)
    with running_system(home, **env) as system:
        system.add_gateway(TORCHRELAY_GATEWAY_AUDIT_FILE=str(home / "audit.jsonl"))
        worker = system.add_worker(
            folder,
            MODEL,
            start=False,
            BROKEN_WORKER_TOKEN=str(MARK),
            BROKEN_WORKER_ACT="raise",
            BROKEN_WORKER_TEXT=f"cannot compute {TEXT}",
        )
        worker.module = "tests.broken_worker"
        worker.start()
        asyncio.run(system.ready(MODEL))
        asyncio.run(_call_everything(system))
        yield system


async def _call_everything(system: System) -> None:
    """What callers write goes through every door, well and badly."""
    async with system.client() as client:
        for prompt in (TEXT, [{"role": "user", "content": TEXT}]):
            with contextlib.suppress(*REFUSED):  # the model may have no chat template
                await Outcome(client.stream(prompt, model=MODEL, max_tokens=8, stop=[CANARY])).read()
        request = pb.StreamGenerateRequest(
            model=MODEL,
            input=pb.GenerationInput(text=TEXT),
            config=pb.GenerationConfig(max_tokens=4),
            idempotency_key=CANARY,
            cache_salt=CANARY.encode(),
        )
        accepted = client.generation.StreamGenerate(request, metadata=[*client.metadata, ("x-note", CANARY)])
        assert [response async for response in accepted]
        bad: list[Any] = [
            pb.StreamGenerateRequest(model=CANARY, input=request.input),
            pb.StreamGenerateRequest(model=MODEL, input=pb.GenerationInput(text=TEXT * 4000)),
            pb.StreamGenerateRequest(model=MODEL, input=request.input, config=pb.GenerationConfig(stop=[TEXT * 20])),
            pb.StreamGenerateRequest(model=MODEL, input=request.input, idempotency_key=f"{CANARY} with spaces"),
        ]
        texts = []
        for one in bad:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                [response async for response in client.generation.StreamGenerate(one, metadata=client.metadata)]
            texts.append(str(refused.value.details()) + str(refused.value.trailing_metadata()))
        raw = client._channel.unary_unary("/torchrelay.v1.GenerationService/GetGeneration")
        for data in (b"\x0a\x40" + TEXT.encode(), b"\x0a\x04\xff\xff\xff\xff" + TEXT.encode()):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await raw(data, metadata=client.metadata)
            texts.append(str(refused.value.details()) + str(refused.value.trailing_metadata()))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.generation.GetGeneration(
                pb.GetGenerationRequest(generation_id=CANARY), metadata=[("authorization", f"Bearer {CANARY}")]
            )
        texts.append(str(refused.value.details()) + str(refused.value.trailing_metadata()))
        assert not any(CANARY in text for text in texts), "errors repeat nothing"
        await _crash(system, client)


async def _crash(system: System, client: AsyncClient) -> None:
    """The worker raises what it was given, ends, and leaves a dead letter."""
    poison = pb.SubmitGenerationRequest(
        model=MODEL,
        input=pb.GenerationInput(token_ids=pb.TokenIds(ids=[MARK, 5, 6])),
        config=pb.GenerationConfig(max_tokens=4, stop=[CANARY]),
    )
    submitted = await client.generation.SubmitGeneration(poison, metadata=client.metadata)
    (worker,) = system.workers

    async def has_ended() -> bool:
        return not worker.is_running

    await until(has_ended, 60, "the worker's crash")

    async def is_dead() -> bool:
        asked = pb.GetGenerationRequest(generation_id=submitted.accepted.generation_id)
        generation = (await client.generation.GetGeneration(asked, metadata=client.metadata)).generation
        return generation.state == pb.GENERATION_STATE_FAILED

    await until(is_dead, 60, "the dead letter")


def files_of(system: System) -> dict[str, bytes]:
    """Logs, audit records and the server's own files."""
    found = {
        path.name: path.read_bytes() for path in system.folder.rglob("*") if path.is_file() and path.name != "keys"
    }
    return {name: data for name, data in found.items() if not name.endswith(".sock")}


def test_no_file_holds_the_canary(system: System) -> None:
    is_sealed = "TORCHRELAY_ENCRYPTION_KEYS_FILE" in system.env
    files = files_of(system)
    assert any(name.startswith("gateway-") for name in files)
    assert any(name.startswith("worker-") for name in files)
    assert len(files["audit.jsonl"].splitlines()) > 8
    assert any("aof" in name for name in files)
    assert b"ValueError" in b"".join(data for name, data in files.items() if name.startswith("worker-"))
    holding = [name for name, data in files.items() if CANARY.encode() in data]
    if is_sealed:
        assert holding == []
    else:  # the check sees what lies there
        assert holding, "stop strings lie in the server's file where nothing is encrypted"
        assert all("aof" in name for name in holding)


async def test_prompts_and_outputs_are_no_easier_to_read_as_token_ids(system: System) -> None:
    """Prompts are stored as ids: as such too, they are in the server's files only where nothing is encrypted."""
    async with system.client() as client:
        asked = model_pb2.TokenizeRequest(model=MODEL, input=pb.GenerationInput(text=TEXT))
        ids = list((await client.model.Tokenize(asked, metadata=client.metadata)).token_ids)
    packed = b"".join(map(msgspec.msgpack.encode, ids[2:-1]))
    assert len(packed) > 8
    holding = [name for name, data in files_of(system).items() if packed in data]
    assert bool(holding) == ("TORCHRELAY_ENCRYPTION_KEYS_FILE" not in system.env), holding


async def test_what_operators_see_holds_no_text(system: System) -> None:
    async with grpc.aio.insecure_channel(system.gateways[0].admin_address) as channel:
        fleet: fleet_pb2_grpc.FleetServiceAsyncStub = fleet_pb2_grpc.FleetServiceStub(channel)
        usage: usage_pb2_grpc.UsageServiceAsyncStub = usage_pb2_grpc.UsageServiceStub(channel)
        letters = await fleet.ListDeadLetters(fleet_pb2.ListDeadLettersRequest())
        assert letters.total_size == 1
        answers: list[Any] = [
            letters,
            await fleet.ListWorkers(fleet_pb2.ListWorkersRequest()),
            await fleet.ListGenerations(fleet_pb2.ListGenerationsRequest()),
            await usage.QueryUsage(usage_pb2.QueryUsageRequest(group_by=[1, 2, 3, 4])),  # type: ignore[list-item]
        ]
    assert not any(CANARY.encode() in answer.SerializeToString() for answer in answers)


def test_the_audit_names_every_generation_that_was_accepted(system: System) -> None:
    lines = [json.loads(line) for line in files_of(system)["audit.jsonl"].splitlines()]
    accepted = {line["generation_id"]: line for line in lines if line["event"] == "generation.accepted"}
    methods = [line["method"].rpartition("/")[2] for line in accepted.values()]
    assert methods.count("StreamGenerate") >= 2
    assert methods.count("SubmitGeneration") == 1
    ended = [line for line in lines if line["event"] == "call" and line.get("generation_id") in accepted]
    assert {line["generation_id"] for line in ended} == set(accepted), "the end of a call names it too"
    assert all(line["model"] == MODEL and line["prompt_tokens"] > 0 for line in accepted.values())
    assert all(len(bytes.fromhex(line["request_digest"])) == 16 for line in accepted.values()), "with or without a key"
