"""The card that a worker publishes says what the model is and what this worker can hold of it."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from common import keys
from common.generation import SamplingParams
from common.registry import GenerationDefaults, ModelCard
from gateway import catalog
from gateway.conversation import Message
from gateway.tokenization import TextCodec
from tests.builders_chat import chat_ids
from tests.builders_models import VOCAB_SIZE, write_tiny_model
from worker import registration
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.model import LoadedModel, ModelError, load_model
from worker.registration import Publication, make_card


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")
    return load_model(str(folder), torch.float32, torch.device("cpu"), cache_root=folder.parent / "cache")


def publish(
    loaded: LoadedModel, name: str = "tiny-llama", context_tokens: int = 256, kv_tokens: int = 4096
) -> Publication:
    return make_card(
        loaded,
        name=name,
        context_tokens=context_tokens,
        block_tokens=16,
        kv_tokens=kv_tokens,
        attention_backend="cpu_ext",
    )


def test_a_card_holds_what_a_gateway_must_know(loaded: LoadedModel) -> None:
    card, files = publish(loaded)
    assert card == ModelCard(
        name="tiny-llama",
        revision=loaded.revision,
        shard=keys.shard_name("tiny-llama", loaded.revision),
        family="llama",
        num_parameters=loaded.num_parameters,
        dtype="float32",
        weight_format="float32",
        weight_bytes=loaded.weight_bytes,
        attention_backend="cpu_ext",
        vocab_size=VOCAB_SIZE,
        context_tokens=256,
        max_output_tokens=255,
        eos_token_ids=(2,),
        bos_token_id=1,
        has_chat_template=True,
        tool_format="generic",
        block_tokens=16,
        kv_tokens=4096,
        tokenizer_files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    )
    assert keys.check_shard(card.shard)


class TestWeights:
    """What a card says of a model's weights."""

    @staticmethod
    def load(tmp_path: Path, **options: Any) -> LoadedModel:
        folder = write_tiny_model(tmp_path / "tiny")
        return load_model(str(folder), torch.bfloat16, torch.device("cpu"), cache_root=tmp_path / "cache", **options)

    def test_plain_ones_take_what_their_type_takes(self, tmp_path: Path) -> None:
        loaded = self.load(tmp_path)
        card, _ = publish(loaded)
        buffers = sum(buffer.nbytes for buffer in loaded.module.buffers())  # rotary frequencies
        assert (card.weight_format, card.weight_bytes) == ("bfloat16", 2 * loaded.num_parameters + buffers)

    def test_int8_takes_less_than_packed_bfloat16(self, tmp_path: Path) -> None:
        packed, _ = publish(self.load(tmp_path, compile_for=CpuAttention()))
        int8, _ = publish(self.load(tmp_path, compile_for=CpuAttention(), narrow="int8"))
        assert (packed.weight_format, int8.weight_format) == ("bfloat16", "int8")
        assert packed.weight_bytes // 2 < int8.weight_bytes < packed.weight_bytes

    def test_before_a_worker_has_them_nothing_is_known(self, tmp_path: Path) -> None:
        card, _ = publish(self.load(tmp_path, with_weights=False))
        assert (card.weight_format, card.weight_bytes) == ("bfloat16", 0)


def test_a_gateway_tokenizes_with_the_files_as_the_worker_would(loaded: LoadedModel) -> None:
    names = ("TOKENIZER_FILE", "TEMPLATE_FILE", "SPECIAL_TOKENS_FILE")
    assert [getattr(registration, name) for name in names] == [getattr(catalog, name) for name in names]
    files = publish(loaded).files
    special = msgspec.json.decode(files[registration.SPECIAL_TOKENS_FILE], type=dict[str, str])
    assert special == {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    codec = TextCodec(files[registration.TOKENIZER_FILE], files[registration.TEMPLATE_FILE].decode(), special)
    assert codec.encode_text("Hi there") == loaded.text.tokenizer.encode("Hi there").ids
    assert chat_ids(codec, [Message("user", "Hi")]) == loaded.text.tokenizer.encode("Hi").ids


@pytest.mark.parametrize(("kv", "engine", "expected"), [(4096, 100, 100), (64, 100, 64), (4096, 9999, 256)])
def test_the_context_is_the_least_of_model_engine_and_cache(
    loaded: LoadedModel, kv: int, engine: int, expected: int
) -> None:
    card, _ = publish(loaded, context_tokens=engine, kv_tokens=kv)
    assert (card.context_tokens, card.max_output_tokens, card.kv_tokens) == (expected, expected - 1, kv)


def test_a_cache_without_room_for_prompt_and_answer_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ModelError, match="enlarge the KV cache"):
        publish(loaded, kv_tokens=1)


def test_defaults_are_the_model_s_within_what_fits(loaded: LoadedModel) -> None:
    generous = dataclasses.replace(loaded, generation_defaults={"max_tokens": 1000, "temperature": 0.6, "top_p": 0.9})
    card, _ = publish(generous)
    assert card.defaults == GenerationDefaults(max_tokens=255, temperature=0.6, top_p=0.9)
    of_requests = {*SamplingParams.__struct_fields__, "min_length"}  # which a prompt's length turns into min_tokens
    assert set(GenerationDefaults.__struct_fields__) <= of_requests


def test_without_a_chat_template_none_is_published(loaded: LoadedModel) -> None:
    plain = dataclasses.replace(loaded, text=dataclasses.replace(loaded.text, chat_template=None, special_tokens={}))
    card, files = publish(plain)
    assert not card.has_chat_template
    assert set(files) == set(card.tokenizer_files) == {"tokenizer.json", "special_tokens.json"}
    assert card.bos_token_id is None


def test_a_file_that_the_registry_would_refuse_is_refused_before(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "MAX_FILE_BYTES", 100)
    with pytest.raises(ModelError, match=r"tokenizer\.json has \d+ bytes; the registry takes 100"):
        publish(loaded)


@pytest.mark.parametrize("name", ["", "with space", "-x", "{tag}", "näme", "x" * 201, "a\n"])
def test_a_name_that_requests_could_not_carry_is_refused(loaded: LoadedModel, name: str) -> None:
    with pytest.raises(ModelError, match="cannot be a model name"):
        publish(loaded, name)


def test_an_owner_may_stand_in_the_name(loaded: LoadedModel) -> None:
    assert publish(loaded, "team/chat-v2.1").card.name == "team/chat-v2.1"
