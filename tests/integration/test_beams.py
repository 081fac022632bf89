"""Beam search over gRPC: nothing before the end, and the same end whatever happens to workers."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import reference
from tests.builders_calls import Outcome, refused
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system, until
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"
PROMPT = [3 + (7 * i) % 250 for i in range(20)]
SEARCH: dict[str, Any] = {"num_beams": 8, "num_outputs": 2, "max_tokens": 400}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=2048, eos_token_id=None)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running_system(tmp_path_factory.mktemp("system")) as system:
        yield system


def tokens_of(outcome: Outcome) -> list[list[int]]:
    return [output.token_ids for output in outcome.outputs]


async def test_a_killed_worker_s_search_begins_anew_and_finds_the_same(system: System, folder: Path) -> None:
    await system.scale(folder, workers=2)
    async with system.client() as client:
        whole = await Outcome(client.stream(PROMPT, model=MODEL, **SEARCH)).read()
        stream = client.stream(PROMPT, model=MODEL, **SEARCH)
        outcome = Outcome(stream)
        reading = asyncio.create_task(outcome.read())

        async def is_under_way() -> bool:
            if not stream.generation_id:
                return False
            return 400 < (await client.get(stream.generation_id)).usage.completion_tokens < 8 * 300

        await until(is_under_way, what="a search that is under way")
        (await system.worker_of(stream.generation_id)).kill()
        await reading
    assert tokens_of(outcome) == tokens_of(whole)
    assert [output.end and output.end.score for output in outcome.outputs] == [
        output.end and output.end.score for output in whole.outputs
    ]
    assert outcome.finished is not None
    assert whole.finished is not None
    assert outcome.finished.timings.num_takeovers == 1
    assert outcome.finished.usage.completion_tokens == whole.finished.usage.completion_tokens == 8 * 400


async def test_outputs_come_at_the_end_the_best_first_as_generate_has_them(system: System, folder: Path) -> None:
    await system.scale(folder)
    options: dict[str, Any] = {"num_beams": 4, "length_penalty": 0.5, "early_stopping": False}
    model = reference.load_reference(folder)
    best = reference.generate(model, PROMPT, 30, [7, 8, 9], **options)
    async with system.client() as client:
        outcome, greedy = await asyncio.gather(
            Outcome(
                client.stream(PROMPT, model=MODEL, max_tokens=30, num_outputs=3, stop_token_ids=[7, 8, 9], **options)
            ).read(),
            Outcome(client.stream(PROMPT, model=MODEL, max_tokens=30)).read(),
        )
        whole = await client.get(outcome.generation_id)
    assert tokens_of(outcome)[0] == best
    assert greedy.token_ids == reference.generate(model, PROMPT, 30, [])
    scores = [output.end.score for output in outcome.outputs if output.end is not None]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert [list(output.token_ids) for output in whole.outputs] == tokens_of(outcome)
    assert [output.end.score for output in whole.outputs] == scores
    assert outcome.accepted is not None
    assert outcome.accepted.config.early_stopping == pb.EARLY_STOPPING_HEURISTIC


async def test_a_model_s_own_search_is_done_unasked_as_generate_does_it(system: System, folder: Path) -> None:
    searching = folder.parent / "searching"
    shutil.copytree(folder, searching)
    path = searching / "generation_config.json"
    own = {"num_beams": 4, "length_penalty": 0.5, "early_stopping": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    model = reference.load_reference(searching)
    best = reference.generate(model, PROMPT, 30, [7, 8, 9])
    await system.scale(folder)
    worker = system.add_worker(searching, "searching")
    await system.ready("searching")
    fields: dict[str, Any] = {"model": "searching", "max_tokens": 30, "stop_token_ids": [7, 8, 9]}
    async with system.client() as client:
        found, greedy = await asyncio.gather(
            Outcome(client.stream(PROMPT, **fields)).read(),
            Outcome(client.stream(PROMPT, num_beams=1, **fields)).read(),
        )
    worker.kill()
    assert found.token_ids == best
    assert greedy.token_ids == reference.generate(model, PROMPT, 30, [7, 8, 9], num_beams=1)
    assert best != greedy.token_ids
    assert found.accepted is not None
    config = found.accepted.config
    assert (config.num_beams, config.length_penalty) == (4, 0.5)
    assert config.early_stopping == pb.EARLY_STOPPING_WHEN_FULL


async def test_what_cannot_be_is_refused_by_its_field(system: System, folder: Path) -> None:
    await system.scale(folder)
    async with system.client() as client:
        for fields, names in (
            ({"num_beams": 17}, ["config.num_beams"]),
            ({"num_beams": 2, "temperature": 0.7}, ["config.temperature"]),
            ({"num_beams": 2, "num_outputs": 3}, ["config.num_outputs"]),
            ({"length_penalty": 1.0}, ["config.length_penalty"]),
        ):
            with refused() as refusal:
                await Outcome(client.stream(PROMPT, model=MODEL, max_tokens=5, **fields)).read()  # type: ignore[arg-type]
            assert refusal.fields == names
