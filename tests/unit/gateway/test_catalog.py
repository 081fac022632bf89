"""What a model takes: inputs of each kind, and requests that its workers can hold."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import keys
from common.errors import AdapterNotFound, FailedPrecondition, InvalidRequest, ModelNotReady
from common.generation import AdapterRef, SamplingParams
from common.registry import (
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    AdapterCard,
    GenerationDefaults,
    ModelCard,
    ModelDirectory,
    ModelEntry,
    ModelRegistry,
)
from gateway.catalog import Catalog, EncodedInput, ServedModel, default_config
from gateway.conversation import Conversation, conversation_of
from gateway.tokenization import EncodedChat, TextCodec
from torchrelay.v1 import generation_pb2 as pb
from worker.engine.demo import demo_model_dir

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'secret' %}{{ raise_exception(m.content) }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)


@pytest.fixture(scope="module")
def model() -> ServedModel:
    card = ModelCard(
        name="tiny",
        revision="r1",
        shard=keys.shard_name("tiny", "r1"),
        vocab_size=49152,
        context_tokens=64,
        max_output_tokens=63,
        block_tokens=16,
        kv_tokens=128,
    )
    tokenizer = (demo_model_dir() / "tokenizer.json").read_bytes()
    return ServedModel(card, TextCodec(tokenizer, TEMPLATE), default_config(card))


def chat(*texts: str) -> pb.GenerationInput:
    parts = [pb.ChatMessage(role=pb.ROLE_USER, parts=[pb.ContentPart(text=text)]) for text in texts]
    return pb.GenerationInput(chat=pb.ChatInput(messages=parts))


async def test_all_kinds_of_input_become_ids(model: ServedModel) -> None:
    ids, *_ = await model.encode(pb.GenerationInput(text="Hello world"))
    assert model.codec.decode(ids) == "Hello world"
    assert (await model.encode(pb.GenerationInput(token_ids=pb.TokenIds(ids=[0, 49151])))).token_ids == [0, 49151]
    assert (await model.encode(chat("Hello world"))).token_ids == ids


async def test_a_long_text_is_tokenized_beside_the_event_loop_and_alike(model: ServedModel) -> None:
    text = "word " * 800  # more characters than are tokenized at once, fewer than are refused
    assert (await model.encode(pb.GenerationInput(text=text))).token_ids == model.codec.encode_text(text)


async def test_a_long_conversation_is_read_beside_the_event_loop(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[threading.Thread] = []

    def reading(source: pb.ChatInput) -> Conversation:
        readers.append(threading.current_thread())
        return conversation_of(source)

    monkeypatch.setattr("gateway.catalog.conversation_of", reading)
    call = pb.ToolCall(id="abcdefghi", name="f", arguments='{"a": [' + ",".join(["[]"] * 30_000) + "]}")
    long = chat("hi")
    long.chat.messages.add(role=pb.ROLE_ASSISTANT, tool_calls=[call])
    with contextlib.suppress(InvalidRequest):
        await model.encode(long)
    await model.encode(chat("hi"))
    here = threading.current_thread()
    assert [reader is here for reader in readers] == [False, True]


async def test_many_ids_to_be_repeated_are_decoded_beside_the_event_loop(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders: list[threading.Thread] = []
    decode = TextCodec.decode

    def decoding(self: TextCodec, token_ids: Iterable[int]) -> str:
        decoders.append(threading.current_thread())
        return decode(self, token_ids)

    monkeypatch.setattr(TextCodec, "decode", decoding)
    (word,) = model.codec.encode_text(" word")
    for count in (3, 3000):
        source = pb.GenerationInput(token_ids=pb.TokenIds(ids=[word] * count))
        assert await model.text_of(source, "acme") == " word" * count
    assert await model.text_of(pb.GenerationInput(text="as it is"), "acme") == "as it is"
    here = threading.current_thread()
    assert [decoder is here for decoder in decoders] == [True, False]


@pytest.mark.parametrize(
    ("source", "reason", "field"),
    [
        (pb.GenerationInput(), "FIELD_REQUIRED", "input"),
        (pb.GenerationInput(text=""), "FIELD_REQUIRED", "input.text"),
        (pb.GenerationInput(token_ids=pb.TokenIds()), "FIELD_REQUIRED", "input.token_ids.ids"),
        (pb.GenerationInput(token_ids=pb.TokenIds(ids=[49152])), "FIELD_OUT_OF_RANGE", "input.token_ids.ids"),
        (pb.GenerationInput(chat=pb.ChatInput()), "FIELD_REQUIRED", "input.chat.messages"),
        (chat(""), "FIELD_REQUIRED", "input"),
        (chat("secret"), "CHAT_REFUSED", "input.chat"),
        (pb.GenerationInput(text="x" * 4097), "CONTEXT_LENGTH_EXCEEDED", "input"),
        (chat("x" * 4000, "y" * 97), "CONTEXT_LENGTH_EXCEEDED", "input"),
    ],
)
async def test_inputs_that_cannot_be_generated_from_are_refused(
    model: ServedModel, source: pb.GenerationInput, reason: str, field: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await model.encode(source)
    assert (raised.value.reason, raised.value.violations[0].field) == (reason, field)
    assert "secret" not in raised.value.message, "a template's own text may hold the caller's"


async def test_without_a_template_a_chat_is_refused(model: ServedModel) -> None:
    bare = replace(model, codec=TextCodec((demo_model_dir() / "tokenizer.json").read_bytes(), None))
    with pytest.raises(FailedPrecondition) as raised:
        await bare.encode(chat("hi"))
    assert raised.value.reason == "NO_CHAT_TEMPLATE"


@given(prompt=st.integers(1, 300), max_tokens=st.integers(1, 300), outputs=st.integers(1, 16))
@settings(deadline=None)
def test_what_a_request_needs_is_whole_blocks_and_fits_a_worker(
    model: ServedModel, prompt: int, max_tokens: int, outputs: int
) -> None:
    params = SamplingParams(max_tokens=max_tokens, num_outputs=outputs)
    peak_expected = -(-(prompt + max_tokens) // 16) * 16
    if peak_expected > 128:
        with pytest.raises(InvalidRequest) as raised:
            model.kv_tokens(prompt, params)
        assert raised.value.reason == "REQUEST_TOO_LARGE"
        assert raised.value.metadata["limit"] == "128"
        return
    begin, peak = model.kv_tokens(prompt, params)
    assert peak == peak_expected
    assert prompt < begin <= peak
    assert begin % 16 == 0


def test_a_worker_that_does_not_say_its_room_takes_any_request(model: ServedModel) -> None:
    unbounded = replace(model, card=msgspec.structs.replace(model.card, kv_tokens=0))
    assert unbounded.kv_tokens(10_000, SamplingParams(max_tokens=1000))[1] == 11_008


def test_defaults_are_the_card_s(model: ServedModel) -> None:
    defaults = GenerationDefaults(
        max_tokens=5, temperature=0.6, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1
    )
    config = default_config(msgspec.structs.replace(model.card, defaults=defaults))
    assert config == pb.GenerationConfig(
        max_tokens=5,
        temperature=0.6,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.1,
        no_repeat_ngram_size=0,
        num_outputs=1,
        logprobs=False,
    )
    assert not model.defaults.HasField("max_tokens")


class Published:
    """The directory and the registry of one model, whose files may change; a clock; and how often files were read."""

    def __init__(self, card: ModelCard) -> None:
        self.files = {TOKENIZER_FILE: (demo_model_dir() / "tokenizer.json").read_bytes(), TEMPLATE_FILE: b"ok"}
        names = (*self.files, SPECIAL_TOKENS_FILE)
        self.card = msgspec.structs.replace(card, tokenizer_files={name: name for name in names})
        self.files[SPECIAL_TOKENS_FILE] = b"{}"
        self.now = 0.0
        self.num_read = 0

    async def file(self, digest: str) -> bytes:
        self.num_read += digest == TOKENIZER_FILE
        await asyncio.sleep(0)
        return self.files[digest]

    def resolve(self, name: str) -> ModelEntry:
        return ModelEntry(self.card, 0)

    def catalog(self) -> Catalog:
        return Catalog(cast("ModelDirectory", self), cast("ModelRegistry", self), monotonic=lambda: self.now)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (TEMPLATE_FILE, b"{% if %}"),
        (TEMPLATE_FILE, b"\xff"),
        (TOKENIZER_FILE, b"{}"),
        (TOKENIZER_FILE, b"no JSON"),
        (SPECIAL_TOKENS_FILE, b"[1]"),
        (SPECIAL_TOKENS_FILE, b"no JSON"),
    ],
)
async def test_a_model_whose_files_cannot_be_used_is_not_ready(model: ServedModel, file: str, content: bytes) -> None:
    published = Published(model.card)
    good, published.files[file] = published.files[file], content
    catalog = published.catalog()
    for published.now in (0.0, 4.9):
        with pytest.raises(ModelNotReady, match="files that cannot be used") as caught:
            await catalog.get("tiny")
        assert caught.value.retry_after_ms == 5000
    assert published.num_read == 1, "read again before anything can have changed"
    published.files[file] = good
    published.now = 5.0
    assert (await catalog.get("tiny")).codec.has_chat_template


async def test_adapters_come_and_go_without_the_files_being_read_again(model: ServedModel) -> None:
    published = Published(model.card)
    catalog = published.catalog()
    before = await catalog.get("tiny")
    with pytest.raises(AdapterNotFound):
        before.adapter("polite")
    assert before.adapter("") is None
    published.card = msgspec.structs.replace(published.card, adapters=(AdapterCard("polite", "r7", 8),))
    after = await catalog.get("tiny")
    assert after.adapter("polite") == AdapterRef("polite", "r7")
    assert after.codec is before.codec
    published.card = msgspec.structs.replace(published.card, adapters=(), context_tokens=100)
    assert (await catalog.get("tiny")).codec is not before.codec
    assert published.num_read == 2


async def test_a_model_is_loaded_once_for_all_that_want_it(model: ServedModel) -> None:
    published = Published(model.card)
    catalog = published.catalog()
    found = await asyncio.gather(*(catalog.get("tiny") for _ in range(5)))
    assert published.num_read == 1
    assert all(served is found[0] for served in found)


async def test_many_empty_messages_are_not_rendered_on_the_event_loop(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    encode = TextCodec.encode_chat

    def noting(self: TextCodec, conversation: Conversation) -> EncodedChat:
        threads.append(threading.get_ident())
        return encode(self, conversation)

    monkeypatch.setattr(TextCodec, "encode_chat", noting)
    for number in (1, 1000):
        await model.encode(chat(*["x"] * number))
    here = threading.get_ident()
    assert [thread == here for thread in threads] == [True, False]


async def test_long_texts_of_one_tenant_wait_for_each_other_and_hold_up_no_other(model: ServedModel) -> None:
    go_on = threading.Event()

    class Slow:
        """A codec whose work takes until it is let go, unless it is asked for a short while."""

        has_chat_template = True

        def encode_text(self, text: str) -> list[int]:
            if text[0] == "s":
                go_on.wait(20)
            return [1]

    slow = replace(model, codec=cast("TextCodec", Slow()))
    flood = [asyncio.create_task(slow.encode(pb.GenerationInput(text="s" * 3000), "a")) for _ in range(100)]
    try:
        assert await asyncio.wait_for(slow.encode(pb.GenerationInput(text="x" * 3000), "b"), 10) == EncodedInput([1])
    finally:
        go_on.set()
        await asyncio.gather(*flood)
