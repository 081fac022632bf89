"""The model registry: cards and tokenizer files in Redis, and a gateway's view of them.

A worker publishes its model; the record outlives the worker, so that a gateway needs no model files and a model without
workers (COLD) can still be queued for. Files are stored once by content.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import msgspec

from common import keys
from common.errors import BackendUnavailable, InvalidRequest, ModelNotFound, Unavailable
from common.generation import EarlyStopping
from common.job_queue import JobQueue
from common.redis import Redis, Retry, execute
from common.scripts import ScriptRunner, as_list

MAX_FILE_BYTES: Final = 64 << 20  # the largest public tokenizer.json files are about half of this
MAX_TEMPLATE_BYTES: Final = 256 << 10  # of a chat template; the largest public ones are about a tenth of this
# The names by which workers publish a model's text files and gateways look them up.
TOKENIZER_FILE: Final = "tokenizer.json"
TEMPLATE_FILE: Final = "chat_template.jinja"
SPECIAL_TOKENS_FILE: Final = "special_tokens.json"
SOURCE_TOKENIZER_FILE: Final = "source_tokenizer.json"  # of what an encoder reads, where that has its own

_RETRY_AFTER_MS: Final = 500
_MAX_UPLOADS: Final = 3  # a deletion that races with us may remove a file between upload and publication


class ModelState(StrEnum):
    """Whether a worker serves the model now. A COLD model's jobs wait for one."""

    READY = "ready"
    COLD = "cold"


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What holds where a request sets nothing: the model's own generation config, as far as we serve it."""

    max_tokens: int | None = None  # None: up to the context
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_tokens: int = 0
    min_length: int = 0  # prompt and output together
    # As in SamplingParams.
    top_h: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    encoder_repetition_penalty: float = 1.0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    forced_eos_token_id: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC
    forced_bos_token_id: int | None = None


class AdapterCard(msgspec.Struct, frozen=True, array_like=True):
    """An adapter that the workers of a model serve."""

    name: str
    revision: str  # digest of its files
    rank: int


class EncoderCard(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of a model that reads whole texts: what its tasks' answers are made of."""

    labels: tuple[str, ...] = ()  # of a classifier, in the order of its logits
    embedding_dimensions: int = 0  # 0: it embeds nothing
    # The greatest number of tokens of a text, special tokens included, is the card's context_tokens.


class LanguagePlace(StrEnum):
    """Where an encoder-decoder model is told of a language, by that language's token."""

    NONE = "none"  # nowhere
    SOURCE_START = "source_start"  # before the text
    SOURCE_END = "source_end"  # behind the text and its end
    DECODER_START = "decoder_start"  # the decoder begins with it, and with nothing else
    FIRST_TOKEN = "first_token"  # forced as the first token of the output


class Seq2SeqCard(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of an encoder-decoder model: how a text is laid out for its encoder, and what its decoder begins with."""

    max_source_tokens: int  # special tokens included
    decoder_start_token_ids: tuple[int, ...]
    before: tuple[int, ...] = ()  # special tokens around the text
    after: tuple[int, ...] = ()
    source_place: LanguagePlace = LanguagePlace.NONE
    target_place: LanguagePlace = LanguagePlace.NONE
    languages: dict[str, int] = {}  # code -> token; of those that are told by tokens
    default_source: str = ""  # the code where a request names none; alone, without `languages`, the only one there is
    default_target: str = ""
    pair_prefixes: tuple[tuple[str, str, str], ...] = ()  # source, target, and the words that ask for that translation
    summary_prefix: str = ""  # the words that ask for a summary
    unk_token_id: int = 0  # of what the tokenizer of the source knows, and the model does not
    names_unknown: bool = False  # what the source's tokenizer does not know may be a token of the other's all the same


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway must know of one model revision. Only grows, with defaults."""

    name: str
    revision: str  # digest of weights, tokenizer and configuration
    shard: str
    tasks: tuple[str, ...] = ("generate",)  # of common.tasks.TaskName; a later version may name others
    family: str = ""  # "llama"
    num_parameters: int = 0
    dtype: str = ""  # of weights and computation: "bfloat16"
    weight_format: str = ""  # what the weights are kept in: the dtype, "int8", or a quantization's name; "" unknown
    weight_bytes: int = 0  # memory of the weights in one worker; 0 unknown
    attention_backend: str = ""  # "cpu_ext"; "" before a worker has started
    vocab_size: int
    context_tokens: int  # prompt and output together
    max_output_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    defaults: GenerationDefaults = GenerationDefaults()
    has_chat_template: bool = False
    tool_format: str = ""  # of common/chat_formats.py; "" is none: tools are refused
    reasoning_format: str = ""  # likewise; "" is none: all text is the answer's
    block_tokens: int = 16  # KV slots of one block
    kv_tokens: int = 0  # KV slots of one worker: a longer request fits nowhere
    max_sequences: int = 0  # that one worker decodes together; 0 unknown
    tokenizer_files: dict[str, str] = {}  # file name -> SHA-256 in hex
    adapters: tuple[AdapterCard, ...] = ()  # by name; changes while workers run, and all of them serve the same
    structured_output: bool = False  # its workers constrain outputs; earlier ones would read over it
    encoder: EncoderCard | None = None  # of a model whose tasks are those of encoders
    seq2seq: Seq2SeqCard | None = None  # of a model with an encoder beside its decoder


_CARD_DECODER: Final = msgspec.msgpack.Decoder(ModelCard)


class ModelRegistry:
    """Reads and writes the registry. Methods raise the errors of `Retry` besides what they name."""

    def __init__(self, redis: Redis, *, retry: Retry | None = None, scripts: ScriptRunner | None = None) -> None:
        self._redis = redis
        self._retry = retry or Retry()
        self._scripts = scripts or ScriptRunner(redis)

    async def _execute(self, *command: str | bytes) -> Any:
        return await self._retry.call(lambda: execute(self._redis, *command))

    async def publish(self, card: ModelCard, files: Mapping[str, bytes]) -> None:
        """Store a card and the files that it names; publishing the same again changes nothing.

        Raises InvalidRequest for a file that is too large, absent, or not the one that the card names.
        """
        keys.check_shard(card.shard)
        contents: dict[str, bytes] = {}
        for name, digest in card.tokenizer_files.items():
            content = files.get(name)
            if content is None or hashlib.sha256(content).hexdigest() != digest:
                raise InvalidRequest("a file is absent or differs from its SHA-256", field=f"tokenizer_files.{name}")
            if len(content) > MAX_FILE_BYTES:
                raise InvalidRequest(
                    "a file is too large", field=f"tokenizer_files.{name}", limit=MAX_FILE_BYTES, got=len(content)
                )
            contents[digest] = content
        packed = msgspec.msgpack.encode(card, order="sorted")
        for _ in range(_MAX_UPLOADS):
            missing = as_list(await self._run("publish", card.shard, packed, *contents))
            if not missing:
                return
            for digest in missing:
                name = digest.decode()
                await self._execute("SET", keys.model_blob(name), contents[name])
        raise Unavailable("the model's files are deleted while they are published")

    async def _run(self, name: str, *args: str | bytes) -> Any:
        return await self._retry.call(lambda: self._scripts.run(name, keys.MODEL_CARDS, *args))

    async def delete(self, shard: str) -> bool:
        """Remove a card, and its files where no other card names them. Returns whether there was one."""
        return bool(await self._run("unpublish", shard))

    async def version(self) -> int:
        """Grows with every change."""
        return int(await self._execute("GET", keys.MODEL_VERSION) or 0)

    async def list(self) -> list[ModelCard]:
        """All cards, the most recently published first."""
        cards, times = await asyncio.gather(
            self._execute("HGETALL", keys.MODEL_CARDS), self._execute("HGETALL", keys.MODEL_TIMES)
        )
        newest_first = sorted(cards, key=lambda shard: (-int(times.get(shard, 0)), shard))
        return [_CARD_DECODER.decode(cards[shard]) for shard in newest_first]

    async def get(self, shard: str) -> ModelCard:
        """The card of a shard. Raises ModelNotFound."""
        packed = await self._execute("HGET", keys.MODEL_CARDS, shard)
        if packed is None:
            raise ModelNotFound("no such model")
        return _CARD_DECODER.decode(packed)

    async def file(self, sha256: str) -> bytes:
        """A tokenizer file by its digest, checked. Raises ModelNotFound."""
        content = await self._execute("GET", keys.model_blob(sha256))
        if content is None or hashlib.sha256(content).hexdigest() != sha256:
            raise ModelNotFound("a file of the model is not stored")
        return bytes(content)


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model revision as a gateway sees it."""

    card: ModelCard
    num_workers: int

    @property
    def state(self) -> ModelState:
        return ModelState.READY if self.num_workers else ModelState.COLD


class ModelDirectory:
    """A gateway's copy of the registry, no older than its last `refresh`; lookups do no I/O."""

    def __init__(self, registry: ModelRegistry, queue: JobQueue) -> None:
        self._registry = registry
        self._queue = queue
        self._version = -1
        self._entries: tuple[ModelEntry, ...] = ()

    async def refresh(self) -> None:
        """Read what has changed: one command, and one for each shard. To be called each second."""
        version = await self._registry.version()
        cards: Sequence[ModelCard] = [entry.card for entry in self._entries]
        if version != self._version:
            cards = await self._registry.list()
        workers = await asyncio.gather(*(self._queue.workers(card.shard) for card in cards))
        self._entries = tuple(
            ModelEntry(card, sum(worker.lease_left_ms > 0 for worker in live))
            for card, live in zip(cards, workers, strict=True)
        )
        self._version = version

    def check_read(self) -> None:
        """Raise BackendUnavailable before the first `refresh`."""
        if self._version < 0:
            raise BackendUnavailable("this gateway has not read the registry yet", retry_after_ms=_RETRY_AFTER_MS)

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """All revisions of all models, the most recently published first."""
        return self._entries

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(entry.card.shard for entry in self._entries)

    def revisions(self, name: str) -> tuple[ModelEntry, ...]:
        """The revisions of a model, the most recently published first.

        Raises ModelNotFound, and BackendUnavailable before the first `refresh`: what exists is not known then.
        """
        self.check_read()
        found = tuple(entry for entry in self._entries if entry.card.name == name)
        if not found:
            raise ModelNotFound("no such model")
        return found

    def resolve(self, name: str) -> ModelEntry:
        """The revision that new generations use: the newest that is READY, else the newest. Errors as `revisions`."""
        found = self.revisions(name)
        return next((entry for entry in found if entry.state is ModelState.READY), found[0])
