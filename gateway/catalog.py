"""The models that this gateway knows, with their tokenizers ready to use."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple, TypeVar

import msgspec

from common.errors import AdapterNotFound, FailedPrecondition, InvalidRequest, ModelNotReady
from common.generation import AdapterRef, ChatParsing, SamplingParams, StructuredOutput, peak_kv_tokens
from common.registry import (
    SOURCE_TOKENIZER_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    ModelCard,
    ModelDirectory,
    ModelEntry,
    ModelRegistry,
)
from common.tasks import TaskName
from gateway import beams, structured, token_choice
from gateway import validation as check
from gateway.chat_constraints import chat_constraint
from gateway.chat_template import TemplateError
from gateway.conversation import Conversation, conversation_of
from gateway.served_tasks import check_task, not_served
from gateway.sources import SourceEncoder
from gateway.structured import StructuredOutputs
from gateway.tokenization import MAX_INLINE_CHARS, EncodedChat, TextCodec
from gateway.tool_calls import GENERIC, as_plain, parsing_of
from gateway.turns import TenantTurns
from torchrelay.v1 import generation_pb2 as pb

_T = TypeVar("_T")

MAX_INLINE_BYTES: Final = 64 * 1024  # of a message that is read in the event loop; a longer one waits for a turn
_AGAIN_MS: Final = 5000  # when files that could not be used are looked at again
# No tokenizer makes less than one token of so many characters of ordinary text; a longer one cannot fit the context.
_MAX_CHARS_PER_TOKEN = 64


class EncodedInput(NamedTuple):
    """What a request's input comes to."""

    token_ids: list[int]  # the prompt; of an encoder-decoder model what its decoder begins with
    chat: ChatParsing | None = None  # what is looked for in the answer; None: nothing
    conversation: Conversation | None = None  # None: it is no chat
    source_token_ids: Sequence[int] = ()  # what an encoder beside the decoder reads
    forced_bos_token_id: int | None = None  # what the first new token must be

    @property
    def num_tokens(self) -> int:
        """Tokens of the caller's input, as `JobBody.num_prompt_tokens` counts them."""
        return len(self.source_token_ids or self.token_ids)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model revision that requests can be made for."""

    card: ModelCard
    codec: TextCodec
    defaults: pb.GenerationConfig
    turns: TenantTurns = field(default_factory=TenantTurns)  # at what takes long, of all models
    structured: StructuredOutputs | None = None  # None where its workers do not take any
    sources: SourceEncoder | None = None  # of a model with an encoder beside its decoder

    @property
    def max_input_tokens(self) -> int:
        """Most tokens of a request's input."""
        return self.card.context_tokens - 1 if self.sources is None else self.sources.max_tokens

    async def encode(self, source: pb.GenerationInput, tenant: str = "") -> EncodedInput:
        """Tokenize a request's input; a long one waits for the tenant's turn.

        Raises InvalidRequest, or FailedPrecondition for a task that is not served, a chat without a chat template, or
        tools where none are served.
        """
        kind = source.WhichOneof("input")
        if kind is None:
            kinds = "text, token_ids, chat, translation and summarization"
            raise InvalidRequest(f"one of {kinds} is required", reason="FIELD_REQUIRED", field="input")
        if self.sources is not None:
            return await self._encode_source(self.sources, source, tenant)
        if kind in ("translation", "summarization"):
            raise not_served(self.card)
        if kind == "token_ids":
            ids = source.token_ids.ids[:]  # a list, in half the time that list() takes
            if not ids:
                raise InvalidRequest("must not be empty", reason="FIELD_REQUIRED", field="input.token_ids.ids")
            check.check_token_ids(ids, self.card.vocab_size, "input.token_ids.ids")
            return EncodedInput(ids)
        if kind == "text":
            if not source.text:
                raise InvalidRequest("must not be empty", reason="FIELD_REQUIRED", field="input.text")
            self._check_length(len(source.text))
            encoded = EncodedInput(
                await self._beside(tenant, lambda: self.codec.encode_text(source.text), len(source.text))
            )
        else:
            encoded = await self._encode_chat(source.chat, tenant)
        if not encoded.token_ids:
            raise InvalidRequest("the input has no tokens", reason="FIELD_REQUIRED", field="input")
        return encoded

    async def _encode_source(self, sources: SourceEncoder, source: pb.GenerationInput, tenant: str) -> EncodedInput:
        """As `encode`, for what an encoder reads."""
        kind = source.WhichOneof("input")
        if kind == "chat":
            raise _no_chat_template()
        if kind == "token_ids":
            check_task(self.card, TaskName.GENERATE)
            ids = source.token_ids.ids[:]
            if not ids:
                raise InvalidRequest("must not be empty", reason="FIELD_REQUIRED", field="input.token_ids.ids")
            check.check_token_ids(ids, self.card.vocab_size, "input.token_ids.ids")
            found = sources.encode_ids(ids)
        else:
            sources.check(source)
            found = await self._beside(tenant, lambda: sources.encode(source), source.ByteSize())
        return EncodedInput(
            found.decoder_token_ids,
            source_token_ids=found.token_ids,
            forced_bos_token_id=found.forced_bos_token_id,
        )

    async def text_of(self, source: pb.GenerationInput, tenant: str) -> str:
        """Return the text of an input that `encode` took and that is no conversation, as an output repeats it.

        Many ids wait for the tenant's turn: 8,192 of them take 4 ms, 32,768 take 18 ms.
        """
        if source.WhichOneof("input") == "text":
            return source.text
        ids = source.token_ids.ids[:]
        return await self._beside(tenant, lambda: self.codec.decode(ids), len(ids))

    async def _encode_chat(self, chat: pb.ChatInput, tenant: str) -> EncodedInput:
        if chat.ByteSize() <= MAX_INLINE_BYTES:
            conversation = conversation_of(chat)
        else:  # its arguments and schemas are JSON, which takes long to read
            conversation = await self.turns.run(tenant, lambda: conversation_of(chat))
        if not self.codec.has_chat_template:
            raise _no_chat_template()
        if conversation.tools and not self.card.tool_format:
            raise FailedPrecondition("tools are not served with this model", reason="TOOLS_NOT_SERVED")
        self._check_length(conversation.num_chars)
        try:
            # What comes with a model is not trusted with the event loop before it has shown what it takes.
            if not self.codec.is_quick:
                encoded = await self.turns.run(tenant, lambda: self._render(conversation))
            else:
                encoded = await self._beside(tenant, lambda: self._render(conversation), conversation.size)
        except TemplateError as error:
            raise InvalidRequest(
                "the model's chat template refuses this conversation", reason="CHAT_REFUSED", field="input.chat"
            ) from error
        chat_parsing = parsing_of(self.card, conversation, encoded.rendered)
        return EncodedInput(encoded.token_ids, chat_parsing, conversation)

    def _render(self, conversation: Conversation) -> EncodedChat:
        """Raises TemplateError."""
        uses_tools = conversation.tools or any(m.tool_calls or m.role == "tool" for m in conversation.messages)
        if not uses_tools or self.card.tool_format not in ("", GENERIC):
            return self.codec.encode_chat(conversation)
        try:
            return self.codec.encode_chat(as_plain(conversation, in_system=True))
        except TemplateError:
            if not conversation.tools or conversation.messages[0].role == "system":
                raise
            return self.codec.encode_chat(as_plain(conversation, in_system=False))  # it may take no system message

    def adapter(self, name: str) -> AdapterRef | None:
        """Return an adapter of this model; None for no name. Raises AdapterNotFound."""
        return adapter_of(self.card, name)

    async def bad_words_ids(self, words: Sequence[str], tenant: str = "") -> list[list[int]]:
        """Return the token sequences that words stand for: see `TextCodec.encode_words`."""
        if not words:
            return []
        if sum(map(len, words)) <= MAX_INLINE_CHARS:
            return self.codec.encode_words(words)
        return await self.turns.run(tenant, lambda: self.codec.encode_words(words))

    async def _beside(self, tenant: str, encode: Callable[[], _T], num_chars: int) -> _T:
        return encode() if num_chars <= MAX_INLINE_CHARS else await self.turns.run(tenant, encode)

    async def constraint_of(
        self, config: pb.GenerationConfig, encoded: EncodedInput, tenant: str
    ) -> StructuredOutput | None:
        """Return what an output must match, by its config and as the answer in its conversation; None: nothing.

        Raises InvalidRequest for a constraint that cannot be kept to, FailedPrecondition if none can.
        """
        spec: StructuredOutput | None = None
        if config.HasField("structured_output"):
            if self.structured is None:
                raise structured.unsupported()
            spec = await self.structured.check(config.structured_output, self.turns, tenant)
        if encoded.chat is None or encoded.conversation is None:
            return spec
        return await chat_constraint(spec, encoded.conversation, encoded.chat, self.structured, self.turns, tenant)

    def _check_length(self, num_chars: int) -> None:
        """Refuse what cannot fit before its tokens are counted: tokenizing takes time that others need."""
        longest = self.card.context_tokens * _MAX_CHARS_PER_TOKEN
        if num_chars > longest:
            raise InvalidRequest(
                f"the input is longer than any that fits the model's context of {self.card.context_tokens} tokens",
                reason="CONTEXT_LENGTH_EXCEEDED",
                field="input",
                limit=self.card.context_tokens,
            )

    def has_room_for_beams(
        self, num_prompt_tokens: int, config: pb.GenerationConfig, num_source_tokens: int = 0
    ) -> bool:
        """Whether the search that a resolved config asks for, if it does, fits this model's workers."""
        search = SamplingParams(max_tokens=config.max_tokens, num_beams=config.num_beams or 1)
        peak = peak_kv_tokens(num_prompt_tokens, search, self.card.block_tokens, num_source_tokens)
        return not self.card.kv_tokens or peak <= self.card.kv_tokens

    def kv_tokens(
        self, num_prompt_tokens: int, sampling: SamplingParams, num_source_tokens: int = 0
    ) -> tuple[int, int]:
        """Return the KV slots that a request needs to begin, and those without which it can never end.

        Outputs share the prompt's full blocks, and a worker may run them one after another: the longest alone must fit.
        Beams run together. All of them share what the encoder read, which is kept to the end. Raises InvalidRequest if
        no worker of this model could ever hold it.
        """
        block = self.card.block_tokens
        peak = peak_kv_tokens(num_prompt_tokens, sampling, block, num_source_tokens)
        begin = (-(-num_prompt_tokens // block) + -(-num_source_tokens // block) + sampling.num_sequences) * block
        if self.card.kv_tokens and peak > self.card.kv_tokens:
            raise InvalidRequest(
                f"prompt and output need {peak} KV slots; a worker of this model has {self.card.kv_tokens}",
                reason="REQUEST_TOO_LARGE",
                field="config.max_tokens",
                limit=self.card.kv_tokens,
                got=peak,
            )
        return min(begin, peak), peak


def adapter_of(card: ModelCard, name: str) -> AdapterRef | None:
    """As `ServedModel.adapter`, of what is published."""
    if not name:
        return None
    found = next((adapter for adapter in card.adapters if adapter.name == name), None)
    if found is None:
        raise AdapterNotFound("the model has no such adapter", metadata={"field": "adapter"})
    return AdapterRef(found.name, found.revision)


class _Failed(NamedTuple):
    """A model whose files were of no use: nobody tries again before."""

    card: ModelCard
    message: str
    until: float  # on the clock


class Catalog:
    """Models by name, as of the last `refresh`, which is called each second; a lookup never causes one."""

    def __init__(
        self, directory: ModelDirectory, registry: ModelRegistry, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """`monotonic` is the clock, in seconds."""
        self._monotonic = monotonic
        self._directory = directory
        self._registry = registry
        self._served: dict[str, ServedModel] = {}  # by shard
        self._failed: dict[str, _Failed] = {}  # likewise
        self._loading = asyncio.Lock()
        self.turns = TenantTurns()  # at what takes long, of all models

    async def refresh(self) -> None:
        """Learn of new models and workers. Raises BackendUnavailable."""
        await self._directory.refresh()
        for shard in self._served.keys() - self.shards():
            del self._served[shard]
        for shard in self._failed.keys() - self.shards():
            del self._failed[shard]

    def shards(self) -> set[str]:
        """Return the shards of all revisions of all models."""
        return set(self._directory.shards)

    def entries(self) -> Sequence[ModelEntry]:
        """Return the revision that new requests use of each model, by name. Raises BackendUnavailable if unread."""
        self._directory.check_read()
        names = sorted({entry.card.name for entry in self._directory.entries})
        return [self._directory.resolve(name) for name in names]

    def entry(self, name: str) -> ModelEntry:
        """Return the revision that new requests use. Raises ModelNotFound."""
        return self._directory.resolve(name)

    def all_entries(self) -> Sequence[ModelEntry]:
        """Return all revisions of all models. Raises BackendUnavailable before a refresh."""
        self._directory.check_read()
        return sorted(self._directory.entries, key=lambda entry: (entry.card.name, entry.card.revision))

    def name_of(self, shard: str) -> str | None:
        """Return the name of the model that a shard belongs to, None if it is not registered."""
        return next((entry.card.name for entry in self._directory.entries if entry.card.shard == shard), None)

    def earlier_shards(self, name: str) -> list[str]:
        """Return the shards of a model's revisions that new requests do not use."""
        current = self._directory.resolve(name).card.shard
        return [entry.card.shard for entry in self._directory.revisions(name) if entry.card.shard != current]

    async def get(self, name: str) -> ServedModel:
        """Return a model that requests can be made for. Raises ModelNotFound, ModelNotReady if its files are broken."""
        card = self._directory.resolve(name).card
        served = self._served.get(card.shard)
        if served is None or served.card != card:
            async with self._loading:  # those that waited find what the first one has loaded
                served = self._served.get(card.shard)
                if served is not None and _differ_in_adapters_alone(served.card, card):
                    served = self._served[card.shard] = replace(served, card=card)
                if served is None or served.card != card:
                    served = await self._load(card)
                    self._served[card.shard] = served
        return served

    async def _load(self, card: ModelCard) -> ServedModel:
        failed = self._failed.get(card.shard)
        if failed is not None and failed.card == card and self._monotonic() < failed.until:
            raise _not_ready(failed.message)
        try:
            codec, tokenizer_json, reader = await self._codec(card)
        except ValueError as error:
            self._failed[card.shard] = _Failed(card, str(error), self._monotonic() + _AGAIN_MS / 1000)
            raise _not_ready(str(error)) from error
        self._failed.pop(card.shard, None)
        structured = None
        if card.structured_output:
            structured = StructuredOutputs(tokenizer_json, card.vocab_size, card.eos_token_ids)
        sources = None if card.seq2seq is None else SourceEncoder(card, codec, reader)
        return ServedModel(card, codec, default_config(card), self.turns, structured, sources)

    async def _codec(self, card: ModelCard) -> tuple[TextCodec, bytes, TextCodec | None]:
        """Make it of the files that were published; return the tokenizer's too, and what sources are read with.

        Raises ValueError.
        """
        files = {name: await self._registry.file(digest) for name, digest in card.tokenizer_files.items()}
        if TOKENIZER_FILE not in files:
            raise ValueError("the model was published without a tokenizer")
        template = files.get(TEMPLATE_FILE)
        try:
            special = msgspec.json.decode(files.get(SPECIAL_TOKENS_FILE, b"{}"), type=dict[str, str])
            text = template.decode() if template is not None else None
            codec = await asyncio.to_thread(TextCodec, files[TOKENIZER_FILE], text, special)
            reader = None
            if SOURCE_TOKENIZER_FILE in files:
                reader = await asyncio.to_thread(TextCodec, files[SOURCE_TOKENIZER_FILE], None)
        except (ValueError, msgspec.MsgspecError) as error:
            raise ValueError("the model was published with files that cannot be used") from error
        return codec, files[TOKENIZER_FILE], reader


def _differ_in_adapters_alone(one: ModelCard, other: ModelCard) -> bool:
    """Adapters come and go while a model is served; its tokenizer need not be made again for that."""
    return one != other and msgspec.structs.replace(one, adapters=other.adapters) == other


def _no_chat_template() -> FailedPrecondition:
    return FailedPrecondition("the model has no chat template; send text or token ids", reason="NO_CHAT_TEMPLATE")


def _not_ready(message: str) -> ModelNotReady:
    return ModelNotReady(message, retry_after_ms=_AGAIN_MS)


def default_config(card: ModelCard) -> pb.GenerationConfig:
    """Return what an unset field of a request's config takes."""
    defaults = card.defaults
    config = pb.GenerationConfig(
        temperature=defaults.temperature,
        top_k=defaults.top_k,
        top_p=defaults.top_p,
        min_p=defaults.min_p,
        repetition_penalty=defaults.repetition_penalty,
        no_repeat_ngram_size=defaults.no_repeat_ngram_size,
        num_outputs=1,
        logprobs=False,
    )
    if defaults.max_tokens is not None:
        config.max_tokens = defaults.max_tokens
    config.MergeFrom(token_choice.default_config(defaults))
    config.MergeFrom(beams.default_config(defaults))
    return config
