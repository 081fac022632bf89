"""Translations beside each other, and what their callers see when the worker is killed: nothing, but a pause."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSeq2SeqLM

from tests.builders_seq2seq import generate
from tests.builders_system import System, running_system
from tests.builders_translation import translation, write_translator
from tests.integration.test_survival import Reader, some_tokens
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import model_pb2

MODEL = "served"
MAX_TOKENS = 60
TEXTS = ["abba cab jig dad", "a", "jig jab " * 12, *(f"{'cab ' * n}dad{' fab' * (n % 5)}" for n in range(13))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_translator(tmp_path_factory.mktemp("models") / "nllb", "nllb")


@pytest.fixture(scope="module")
def system(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running_system(tmp_path_factory.mktemp("system")) as found:
        found.add_gateway()
        for _ in range(2):
            found.add_worker(folder, MODEL)
        asyncio.run(found.ready(MODEL, num_workers=2))
        yield found


class Expected:
    """What transformers generates of a text alone."""

    def __init__(self, folder: Path, system: System) -> None:
        self._model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        self._system = system

    async def tokens(self, text: str, **options: Any) -> list[int]:
        source = translation(text, "zul_Latn", "eng_Latn")
        async with self._system.client() as client:
            request = model_pb2.TokenizeRequest(model=MODEL, input=source)
            read = await client.model.Tokenize(request, metadata=client.metadata)
        languages = {**options, "forced_bos_token_id": await self._language()}
        return generate(self._model, read.token_ids, MAX_TOKENS, **languages)[0]

    async def _language(self) -> int:
        accepted = pb.SubmitGenerationRequest(
            model=MODEL, input=translation("a", "zul_Latn", "eng_Latn"), config=pb.GenerationConfig(max_tokens=1)
        )
        async with self._system.client() as client:
            response = await client.generation.SubmitGeneration(accepted, metadata=client.metadata)
        return response.accepted.config.forced_bos_token_id


@pytest.fixture(scope="module")
def expected(folder: Path, system: System) -> Expected:
    return Expected(folder, system)


async def test_sixteen_translations_beside_each_other_are_those_of_each_alone(
    system: System, expected: Expected
) -> None:
    async with system.client() as client:
        for beams in (1, 4):
            calls = [
                client.generate(
                    translation(text, "zul_Latn", "eng_Latn"),
                    model=MODEL,
                    max_tokens=MAX_TOKENS,
                    num_beams=beams if number % 4 else 1,  # searches beside single sequences
                    temperature=0.0,
                )
                for number, text in enumerate(TEXTS)
            ]
            found = await asyncio.gather(*calls)
            for number, (text, one) in enumerate(zip(TEXTS, found, strict=True)):
                wanted = await expected.tokens(text, num_beams=beams if number % 4 else 1)
                assert list(one.outputs[0].token_ids) == wanted, (text, beams)


async def test_a_translation_survives_a_kill_of_its_worker(system: System, expected: Expected) -> None:
    text = TEXTS[0]
    async with system.client() as client:
        stream = client.stream(
            translation(text, "zul_Latn", "eng_Latn"),
            model=MODEL,
            max_tokens=MAX_TOKENS,
            min_tokens=40,
            temperature=0.0,
        )
        reader = Reader(stream)
        async with asyncio.TaskGroup() as group:
            group.create_task(reader.read())
            await some_tokens(reader, 5)
            (await system.worker_of(reader.stream.generation_id)).kill()
        assert reader.token_ids == await expected.tokens(text, min_new_tokens=40)
        assert reader.finished is not None
        assert reader.finished.timings.num_takeovers == 1
        assert reader.stream.position.num_resumes == 0, "the call itself went on"
