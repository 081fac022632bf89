"""Adapters over gRPC: named in a request, mixed in one worker, put in and taken out of a folder while it serves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import pytest
from transformers import PreTrainedModel

from common.generation import SamplingParams
from tests.builders_adapters import linear_layers, merged, write_adapter
from tests.builders_calls import Outcome, refused
from tests.builders_engine import reference_tokens
from tests.builders_http import HttpDoor
from tests.builders_models import tiny_module, write_tiny_model
from tests.builders_system import System, running_system, until
from torchrelay.client import AsyncClient
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import model_pb2
from worker.publishing import register_model

MODEL = "tiny"
PROMPT = [3 + (7 * i) % 250 for i in range(40)]
NUM_TOKENS = 24


@dataclass
class Served:
    """A system whose workers serve a model with a folder of adapters."""

    system: System
    adapters: Path
    model: Path
    client: AsyncClient
    name: str = MODEL

    def write(self, name: str, **fields: object) -> Path:
        whole = write_adapter(self.adapters / f".{name}", linear_layers(tiny()), **{"std": 0.2, **fields})
        shutil.rmtree(self.adapters / name, ignore_errors=True)
        return whole.rename(self.adapters / name)

    def add_worker(self) -> None:
        self.system.add_worker(
            self.model,
            self.name,
            TORCHRELAY_WORKER_ADAPTERS_DIR=str(self.adapters),
            TORCHRELAY_WORKER_ADAPTERS_SCAN_S="0.1",
            TORCHRELAY_WORKER_MAX_LOADED_ADAPTERS="2",
        )

    async def published(self) -> dict[str, str]:
        """Revisions by name, as callers see them."""
        request = model_pb2.GetModelRequest(model=self.name)
        response = await self.client.model.GetModel(request, metadata=self.client.metadata)
        return {adapter.name: adapter.revision for adapter in response.model.adapters}

    async def until_published(self, *names: str, other_than: str = "") -> dict[str, str]:
        async def are_known() -> bool:
            try:
                found = await self.published()
            except grpc.aio.AioRpcError:  # not read yet
                return False
            return found.keys() == set(names) and other_than not in found.values()

        await until(are_known, what=f"that {names} are published")
        return await self.published()

    async def run(self, adapter: str = "", *, num_tokens: int = NUM_TOKENS, salt: bytes = b"") -> Outcome:
        stream = self.client.stream(
            PROMPT,
            model=MODEL,
            adapter=adapter,
            max_tokens=num_tokens,
            temperature=0.0,
            ignore_eos=True,
            cache_salt=salt,
        )
        return await Outcome(stream).read()


@contextlib.contextmanager
def not_found() -> Iterator[None]:
    with refused() as refusal:
        yield
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")


def tiny() -> PreTrainedModel:
    return tiny_module("llama", eos_token_id=None)


def expected(folder: Path | None, num_tokens: int = NUM_TOKENS) -> list[int]:
    model = tiny() if folder is None else merged(tiny(), folder)
    return reference_tokens(model, PROMPT, SamplingParams(max_tokens=num_tokens))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running_system(tmp_path_factory.mktemp("system")) as system:
        system.add_gateway()
        yield system


@pytest.fixture
async def served(system: System, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """A worker of its own folder for each test; the gateway stays."""
    folder = tmp_path_factory.mktemp("served")
    model = write_tiny_model(folder / "model", eos_token_id=None)
    (folder / "adapters").mkdir()
    async with system.client() as client:
        served = Served(system, folder / "adapters", model, client)
        served.write("first", rank=4)
        served.write("second", rank=2, seed=1, targets=("q_proj", "v_proj"), std=0.6)
        served.add_worker()
        await system.ready(MODEL)
        yield served
        for worker in system.workers:
            worker.kill()
        system.workers.clear()
        await until(lambda: _has_no_worker(served), what="that no worker is left")


async def _has_no_worker(served: Served) -> bool:
    request = model_pb2.GetModelRequest(model=MODEL)
    response = await served.client.model.GetModel(request, metadata=served.client.metadata)
    return response.model.num_workers == 0


async def test_each_request_gets_the_adapter_that_it_names(served: Served) -> None:
    revisions = await served.until_published("first", "second")
    names = ["", "first", "second"] * 3
    outcomes = await asyncio.gather(*(served.run(name) for name in names))
    wanted = {name: expected(served.adapters / name if name else None) for name in names}
    assert len({tuple(tokens) for tokens in wanted.values()}) == 3
    for name, outcome in zip(names, outcomes, strict=True):
        assert outcome.token_ids == wanted[name]
        assert outcome.accepted is not None
        assert (outcome.accepted.adapter, outcome.accepted.adapter_revision) == (name, revisions.get(name, ""))
    # Blocks of one prompt are each adapter's own, and shared by its requests.
    for name in ("first", "", "second"):
        again = await served.run(name)
        assert again.token_ids == wanted[name]
        assert again.finished is not None
        assert again.finished.usage.cached_prompt_tokens == 32
    salted = await served.run("first", salt=b"of its own")
    assert salted.finished is not None
    assert salted.finished.usage.cached_prompt_tokens == 0

    with refused() as refusal:
        await served.run("third")
    assert refusal.error is not None
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert refusal.error.metadata["field"] == "adapter"
    for call, request in (
        (served.client.generation.Generate, pb.GenerateRequest),
        (served.client.generation.SubmitGeneration, pb.SubmitGenerationRequest),
    ):
        message = request(model=MODEL, input=pb.GenerationInput(text="a"), adapter="third")
        with not_found():
            await call(message, metadata=served.client.metadata)

    # The same key with another adapter is another request.
    key = "the-same"
    options = {"model": MODEL, "max_tokens": 1, "seed": 1, "idempotency_key": key}
    await served.client.generate(PROMPT, **options, adapter="first")
    with refused() as refusal:
        await served.client.generate(PROMPT, **options, adapter="second")
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "IDEMPOTENCY_KEY_REUSED")
    await _check_openai_door(served, {name: outcome.output.text for name, outcome in zip(names, outcomes, strict=True)})


async def _check_openai_door(served: Served, texts: dict[str, str]) -> None:
    """There an adapter is named behind its model, and is listed as a model whose parent that is."""
    address = served.system.gateways[0].openai_address
    doors = {
        "any": HttpDoor(address, served.system.key),
        "base": HttpDoor(address, served.system.create_key("of-the-base", models=(MODEL,))),
        "other": HttpDoor(address, served.system.create_key("of-another", models=("other",))),
    }
    listed = (await doors["base"].get("/v1/models")).json["data"]
    assert [(one["id"], one["root"], one["parent"]) for one in listed] == [
        (MODEL, MODEL, None),
        (f"{MODEL}:first", MODEL, MODEL),
        (f"{MODEL}:second", MODEL, MODEL),
    ]
    assert (await doors["other"].get("/v1/models")).json["data"] == []
    assert (await doors["any"].get(f"/v1/models/{MODEL}:second")).json == listed[2]
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    for name, text in texts.items():
        model = f"{MODEL}:{name}" if name else MODEL
        answer = await doors["base"].post("/v1/completions", {"model": model, **body})
        assert (answer.status, answer.json["model"]) == (200, model)
        assert answer.json["choices"][0]["text"] == text
    for name in ("third", "", "first:second"):
        model = f"{MODEL}:{name}"
        for path in ("completions", "chat/completions"):
            fields = body if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}
            answer = await doors["any"].post(f"/v1/{path}", {"model": model, **fields})
            error = answer.json["error"]
            assert (answer.status, error["param"], error["code"]) == (404, "model", "model_not_found"), model
        assert (await doors["any"].get(f"/v1/models/{model}")).status == 404
    answer = await doors["other"].post("/v1/completions", {"model": f"{MODEL}:first", **body})
    assert (answer.status, answer.json["error"]["code"]) == (403, "model_not_allowed")


async def test_adapters_come_change_and_go_while_others_are_served(served: Served) -> None:
    before = await served.until_published("first", "second")
    running = asyncio.create_task(served.run("second", num_tokens=180))
    long = expected(served.adapters / "second", 180)
    await served.run("second")  # in memory by now
    third = served.write("third", rank=8, seed=2)
    await served.until_published("first", "second", "third")
    # More than fit into memory at a time: one is evicted, and loaded again.
    for name in ("third", "first", "third", "first"):
        assert (await served.run(name)).token_ids == expected(served.adapters / name)
    changed = served.write("first", rank=8, seed=3)
    after = await served.until_published("first", "second", "third", other_than=before["first"])
    outcome = await served.run("first")
    assert outcome.accepted is not None
    assert outcome.accepted.adapter_revision == after["first"]
    assert outcome.token_ids == expected(changed)
    shutil.rmtree(served.adapters / "second")
    await served.until_published("first", "third")
    with not_found():
        await served.run("second")
    assert (await running).token_ids == long
    assert (await served.run("third")).token_ids == expected(third)


async def test_a_takeover_goes_on_with_the_same_adapter_or_says_that_it_is_gone(served: Served) -> None:
    await served.until_published("first", "second")
    long = expected(served.adapters / "second", 180)
    for goes in (False, True):
        stream = served.client.stream(
            PROMPT, model=MODEL, adapter="second", max_tokens=180, temperature=0.0, ignore_eos=True
        )
        outcome = Outcome(stream)
        reading = asyncio.create_task(outcome.read())
        await until(partial(_has_tokens, outcome), what="the first tokens")
        served.system.workers.pop().kill()
        if goes:
            shutil.rmtree(served.adapters / "second")
        served.add_worker()
        if goes:
            with not_found():
                await reading
            assert outcome.token_ids == long[: len(outcome.token_ids)]
        else:
            assert (await reading).token_ids == long


async def _has_tokens(outcome: Outcome) -> bool:
    return len(outcome.token_ids) > 3


async def test_adapters_are_registered_with_a_model_before_any_worker_serves_it(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, model = "waiting", write_tiny_model(tmp_path / "model", eos_token_id=None)
    folders = [
        write_adapter(tmp_path / "adapters" / each, linear_layers(tiny()), std=0.2, rank=4, seed=number)
        for number, each in enumerate(("first", "second"))
    ]
    environment = {"REDIS_URL": system.server.url, "WORKER_MODEL": str(model), "WORKER_MODEL_NAME": name}
    for key, value in environment.items():
        monkeypatch.setenv(f"TORCHRELAY_{key}", value)
    monkeypatch.setenv("TORCHRELAY_WORKER_DTYPE", "float32")

    async def register(*adapters: str) -> int:
        return await asyncio.to_thread(register_model, as_json=True, adapters=adapters)

    broken = tmp_path / "broken"
    shutil.copytree(folders[0], broken)
    (broken / "adapter_config.json").write_text("{}")
    for bad in (["first"], [f"a b={folders[0]}"], [f"x={tmp_path / 'none'}"], [f"x={broken}"], [f"x={folders[0]}"] * 2):
        assert await register(*bad) == 1, bad
    assert capsys.readouterr().out == ""
    assert await register(f"second={folders[1]}", f"first={folders[0]}") == 0
    assert json.loads(capsys.readouterr().out)["adapters"] == ["first", "second"]
    async with system.client() as client:
        served = Served(system, tmp_path / "adapters", model, client, name)
        await served.until_published("first", "second")
        submit = pb.SubmitGenerationRequest(model=name, adapter="second")
        submit.input.token_ids.ids.extend(PROMPT)
        submit.config.MergeFrom(pb.GenerationConfig(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True))
        accepted = (await client.generation.SubmitGeneration(submit, metadata=client.metadata)).accepted
        served.add_worker()

        async def is_done() -> bool:
            return (await client.get(accepted.generation_id)).state == pb.GENERATION_STATE_FINISHED

        await until(is_done, 60, "the answer of the worker that came later")
        assert (await client.get(accepted.generation_id)).outputs[0].token_ids == expected(folders[1])
        system.workers.pop().kill()
