"""Translations and summaries over gRPC: what is queued of them, what is refused, and what models tell of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from common import keys
from common.generation import JobBody
from common.job_claims import JobClaims
from common.redis import connect
from common.registry import ModelCard, ModelRegistry, Seq2SeqCard
from common.settings import QueueSettings, RedisSettings
from tests.builders_calls import Outcome, refused
from tests.builders_models import write_tiny_model
from tests.builders_seq2seq import EOS, generate
from tests.builders_system import System, running_system
from tests.builders_translation import (
    SPACE,
    T5_PARAMS,
    marian_ids,
    publish,
    summary,
    their_tokenizer,
    translation,
    write_translator,
)
from torchrelay.client import AsyncClient
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import model_pb2

CONFIG: dict[str, dict[str, Any]] = {"t5": {"task_specific_params": T5_PARAMS}}
START = 3
TEXT = "abba cab jig dad"


@pytest.fixture(scope="module")
def cards() -> dict[str, ModelCard]:
    return {}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, cards: dict[str, ModelCard]) -> Iterator[System]:
    """Models that no worker serves, so that what is queued can be looked at; and two that one does."""
    folder = tmp_path_factory.mktemp("models")
    publications = {}
    for kind in ("t5", "nllb", "mbart", "bart"):
        write_translator(folder / kind, kind, **CONFIG.get(kind, {}))
        path = folder / kind / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "max_length": 20, "min_length": 5}))
        publications[kind] = publish(folder / kind, kind)
    publications["plain"] = publish(write_tiny_model(folder / "plain"), "plain")
    cards |= {name: publication.card for name, publication in publications.items()}

    async def register(url: str) -> None:
        redis = connect(RedisSettings(url=url))
        for publication in publications.values():
            await ModelRegistry(redis).publish(*publication)
        await redis.aclose()

    with running_system(tmp_path_factory.mktemp("system")) as system:
        asyncio.run(register(system.server.url))
        system.add_gateway()
        system.add_worker(write_translator(folder / "served", "marian-multi"), "served")
        asyncio.run(system.ready(*publications, num_workers=0))
        yield system


@pytest.fixture
async def client(system: System) -> AsyncIterator[AsyncClient]:
    async with system.client() as client:
        yield client


class Queue:
    """What is queued of a request, as a worker finds it."""

    def __init__(self, system: System, client: AsyncClient, cards: dict[str, ModelCard]) -> None:
        self._system, self._client, self._cards = system, client, cards

    async def job(self, model: str, source: pb.GenerationInput, **config: Any) -> tuple[JobBody, pb.Accepted]:
        request = pb.SubmitGenerationRequest(model=model, input=source, config=pb.GenerationConfig(**config))
        response = await self._client.generation.SubmitGeneration(request, metadata=self._client.metadata)
        redis = connect(RedisSettings(url=self._system.server.url))
        claims = JobClaims(redis, self._cards[model].shard, keys.random_id(), QueueSettings())
        (claimed,) = await claims.claim(1, 1 << 20, 1 << 20)
        await redis.aclose()
        assert claimed.generation_id == response.accepted.generation_id
        return claimed.body, response.accepted


@pytest.fixture
def queue(system: System, client: AsyncClient, cards: dict[str, ModelCard]) -> Queue:
    return Queue(system, client, cards)


def languages_of(card: ModelCard) -> dict[str, int]:
    own: Seq2SeqCard | None = card.seq2seq
    assert own is not None
    return own.languages


async def test_a_translation_is_queued_with_its_source_and_its_first_token(
    queue: Queue, cards: dict[str, ModelCard]
) -> None:
    body, accepted = await queue.job("nllb", translation(TEXT, "zul_Latn", "eng_Latn"))
    theirs = their_tokenizer("nllb")._build_translation_inputs(TEXT, None, "eng_Latn", "zul_Latn")
    assert list(body.source_token_ids) == theirs["input_ids"]
    assert body.prompt_token_ids == (START,)
    assert body.sampling.forced_bos_token_id == theirs["forced_bos_token_id"] == languages_of(cards["nllb"])["zul_Latn"]
    assert accepted.config.forced_bos_token_id == theirs["forced_bos_token_id"]
    assert accepted.prompt_tokens == body.num_prompt_tokens == len(theirs["input_ids"])
    assert body.echo_text == ""


async def test_or_with_a_decoder_that_begins_with_the_language(queue: Queue, cards: dict[str, ModelCard]) -> None:
    body, _ = await queue.job("mbart", translation(TEXT, "ro_RO", "en_XX"))
    assert body.prompt_token_ids == (languages_of(cards["mbart"])["ro_RO"],)
    assert body.sampling.forced_bos_token_id is None
    assert list(body.source_token_ids) == their_tokenizer("mbart")(TEXT)["input_ids"]


async def test_a_summary_is_queued_with_the_words_that_ask_for_it(queue: Queue) -> None:
    body, _ = await queue.job("t5", summary(TEXT))
    assert list(body.source_token_ids) == their_tokenizer("t5")("cab: " + TEXT)["input_ids"]
    assert body.prompt_token_ids == (START,)


async def test_lengths_count_what_the_decoder_begins_with(queue: Queue) -> None:
    """As transformers counts them: of the model's max_length of 20 and min_length of 5, one is the start."""
    body, accepted = await queue.job("bart", summary(TEXT))
    assert (body.sampling.max_tokens, body.sampling.min_tokens) == (19, 4)
    assert accepted.config.max_tokens == 19
    body, _ = await queue.job("bart", summary(TEXT), max_length=9, min_length=3)
    assert (body.sampling.max_tokens, body.sampling.min_tokens) == (8, 2)
    # A source that fills the encoder leaves the decoder's context as it is.
    ids = pb.GenerationInput(token_ids=pb.TokenIds(ids=[5] * 256))
    body, _ = await queue.job("bart", ids, max_tokens=255)
    assert (body.sampling.max_tokens, len(body.source_token_ids)) == (255, 256)


async def test_a_first_token_can_be_asked_for(queue: Queue) -> None:
    body, _ = await queue.job("bart", summary(TEXT), forced_bos_token_id=7)
    assert body.sampling.forced_bos_token_id == 7
    body, _ = await queue.job("nllb", pb.GenerationInput(text=TEXT), forced_bos_token_id=8)
    assert body.sampling.forced_bos_token_id == 8


async def test_a_decoder_s_jobs_have_no_source(queue: Queue) -> None:
    body, accepted = await queue.job("plain", pb.GenerationInput(text="hi"))
    assert (body.source_token_ids, accepted.prompt_tokens) == ((), 2)


INVALID, FAILED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
LONG = "cab " * 4000
PAIR = ("zul_Latn", "eng_Latn")
GOOD = translation(TEXT, *PAIR)
CHAT = pb.ChatInput(messages=[pb.ChatMessage(role=pb.ROLE_USER, parts=[pb.ContentPart(text="hi")])])
WANTED, FORCED = "input.translation", "config.forced_bos_token_id"
PROMPT_S = ["config.echo", "config.prompt_logprobs"]


@pytest.mark.parametrize(
    ("model", "source", "config", "code", "reason", "fields"),
    [
        ("plain", GOOD, {}, FAILED, "TASK_NOT_SERVED", []),
        ("plain", summary(TEXT), {}, FAILED, "TASK_NOT_SERVED", []),
        ("bart", translation(TEXT, "de", "en"), {}, FAILED, "TASK_NOT_SERVED", []),
        ("nllb", summary(TEXT), {}, FAILED, "TASK_NOT_SERVED", []),
        ("nllb", pb.GenerationInput(chat=CHAT), {}, FAILED, "NO_CHAT_TEMPLATE", []),
        ("nllb", translation(TEXT, "xx", "eng_Latn"), {}, INVALID, "FIELD_INVALID", [f"{WANTED}.target_language"]),
        ("nllb", translation(TEXT, "zul_Latn"), {}, INVALID, "FIELD_REQUIRED", [f"{WANTED}.source_language"]),
        ("nllb", translation("", *PAIR), {}, INVALID, "FIELD_REQUIRED", [f"{WANTED}.text"]),
        ("nllb", translation(LONG, *PAIR), {}, INVALID, "CONTEXT_LENGTH_EXCEEDED", [f"{WANTED}.text"]),
        ("nllb", translation(TEXT, *PAIR, truncation=9), {}, INVALID, "UNSUPPORTED", [f"{WANTED}.truncation"]),
        ("nllb", GOOD, {"forced_bos_token_id": 5}, INVALID, "FIELD_CONFLICT", [FORCED]),
        ("bart", summary(TEXT), {"forced_bos_token_id": 1 << 20}, INVALID, "FIELD_OUT_OF_RANGE", [FORCED]),
        ("bart", summary(TEXT), {"echo": True, "prompt_logprobs": 1}, INVALID, "UNSUPPORTED", PROMPT_S),
        ("bart", summary(TEXT), {"max_length": 1}, INVALID, "FIELD_OUT_OF_RANGE", ["config.max_length"]),
        ("bart", summary(TEXT), {"max_tokens": 256}, INVALID, "CONTEXT_LENGTH_EXCEEDED", ["config.max_tokens"]),
        ("bart", summary(TEXT), {"max_tokens": 0}, INVALID, "FIELD_OUT_OF_RANGE", ["config.max_tokens"]),
    ],
)  # fmt: skip
async def test_what_cannot_be_done_is_refused(
    client: AsyncClient, model: str, source: pb.GenerationInput, config: dict[str, Any], code: Any, reason: str,
    fields: list[str],
) -> None:  # fmt: skip
    with refused() as refusal:
        await Outcome(client.stream(source, model=model, time_limit_s=2, **config)).read()
    assert (refusal.code, refusal.reason, refusal.fields) == (code, reason, fields)
    if reason == "TASK_NOT_SERVED":
        tasks = {"plain": "generate", "bart": "generate,summarize", "nllb": "generate,translate"}
        assert refusal.error is not None
        assert refusal.error.metadata["tasks"] == tasks[model]


async def test_models_tell_what_they_do(client: AsyncClient) -> None:
    async def told(name: str) -> model_pb2.Model:
        request = model_pb2.GetModelRequest(model=name)
        return (await client.model.GetModel(request, metadata=client.metadata)).model

    generates, translates, summarizes = model_pb2.TASK_GENERATE, model_pb2.TASK_TRANSLATE, model_pb2.TASK_SUMMARIZE
    t5, nllb, bart, plain = [await told(name) for name in ("t5", "nllb", "bart", "plain")]
    assert (t5.tasks, t5.languages) == ([generates, translates, summarizes], ["de", "en", "fr"])
    assert (nllb.tasks, len(nllb.languages)) == ([generates, translates], 202)
    assert (bart.tasks, bart.languages) == ([generates, summarizes], [])
    assert (plain.tasks, plain.max_source_tokens) == ([generates], 0)
    assert (t5.max_source_tokens, bart.max_source_tokens, bart.context_length) == (512, 256, 256)
    assert bart.default_config.max_tokens == 19


async def test_tokenize_shows_what_an_encoder_reads(client: AsyncClient) -> None:
    request = model_pb2.TokenizeRequest(model="nllb", input=GOOD)
    response = await client.model.Tokenize(request, metadata=client.metadata)
    theirs = their_tokenizer("nllb")._build_translation_inputs(TEXT, None, "eng_Latn", "zul_Latn")
    assert response.token_ids == theirs["input_ids"]


async def test_a_translation_is_what_transformers_generates(
    system: System, client: AsyncClient, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With two tokenizers: one reads the source, the other writes the text."""
    await system.ready("served")
    folder = next(path for path in tmp_path_factory.getbasetemp().glob("models*/served"))
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    wanted = translation(TEXT, "fra")
    request = model_pb2.TokenizeRequest(model="served", input=wanted)
    source = (await client.model.Tokenize(request, metadata=client.metadata)).token_ids
    assert source[0] == marian_ids(">>deu<<", ">>fra<<")[">>fra<<"]
    ids = marian_ids(">>deu<<", ">>fra<<")
    pieces = {token_id: piece for piece, token_id in ids.items()}
    without = [0, 1, EOS, *range(len(ids) - 3, model.config.vocab_size)]  # what writes nothing
    options: dict[str, Any] = {"suppress_tokens": without}
    for num_beams in (1, 4):
        stream = client.stream(wanted, model="served", max_tokens=12, num_beams=num_beams, **options)
        outcome = await Outcome(stream).read()
        assert outcome.token_ids == generate(model, source, 12, num_beams=num_beams, **options)[0]
        written = "".join(pieces[token_id] for token_id in outcome.token_ids).replace(SPACE, " ").strip()
        assert outcome.output.text.strip() == written != ""
        assert outcome.finished is not None
        assert outcome.finished.usage.prompt_tokens == len(source)
