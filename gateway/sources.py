"""What the encoder of an encoder-decoder model reads, and what its decoder begins with.

The layout is the card's (`Seq2SeqCard`); it is that of the family's tokenizer class in transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from common.errors import InvalidRequest
from common.grants import Caps
from common.registry import LanguagePlace, ModelCard, Seq2SeqCard
from common.tasks import TaskName
from gateway.served_tasks import check_task
from gateway.tokenization import TextCodec
from gateway.violations import Violations
from torchrelay.v1 import generation_pb2 as pb

MAX_NAMED: Final = 24  # languages that a refusal names
# No tokenizer makes less than one token of so many characters of ordinary text.
_MAX_CHARS_PER_TOKEN: Final = 64
_TRUNCATIONS: Final = frozenset(pb.Truncation.values())


class Source(NamedTuple):
    """A request's input."""

    token_ids: list[int]  # for the encoder
    decoder_token_ids: list[int]  # what the decoder begins with
    forced_bos_token_id: int | None = None  # what the first new token must be


@dataclass(frozen=True, slots=True)
class _Layout:
    """What stands around a text."""

    path: str  # of the text, in the request
    text: str
    prefix: str = ""  # words before it
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    decoder: tuple[int, ...] = ()
    forced: int | None = None
    truncation: pb.Truncation.ValueType = pb.TRUNCATION_UNSPECIFIED


class SourceEncoder:
    """Lays texts out for one model. Thread-safe."""

    def __init__(self, card: ModelCard, codec: TextCodec, reader: TextCodec | None = None) -> None:
        """`codec` is what the model writes with; `reader` what it reads with, where that is another."""
        assert card.seq2seq is not None
        self._card = card
        self._own: Seq2SeqCard = card.seq2seq
        self._codec = codec
        self._reader = reader

    @property
    def max_tokens(self) -> int:
        return self._own.max_source_tokens

    def check(self, source: pb.GenerationInput) -> None:
        """Refuse what can be refused before anything is tokenized, of a text, a translation or a summary.

        Raises InvalidRequest, and FailedPrecondition for a task that the model does not serve.
        """
        check_task(self._card, task_of(source))
        layout = self._layout(source)
        if not layout.text:
            raise InvalidRequest("must not be empty", reason="FIELD_REQUIRED", field=layout.path)
        longest = self._own.max_source_tokens * _MAX_CHARS_PER_TOKEN
        if len(layout.text) > longest and layout.truncation == pb.TRUNCATION_UNSPECIFIED:
            raise InvalidRequest(
                f"the input is longer than any of the {self._own.max_source_tokens} tokens that the model reads",
                reason="CONTEXT_LENGTH_EXCEEDED",
                field=layout.path,
                limit=self._own.max_source_tokens,
            )

    def encode(self, source: pb.GenerationInput) -> Source:
        """Tokenize what `check` has taken. Raises InvalidRequest where it is too long or has no tokens."""
        layout = self._layout(source)
        if source.WhichOneof("input") == "text":
            ids = self._ids(layout.text, alone=True)
            self._check_length(len(ids), layout.path)
            return Source(ids, list(layout.decoder))
        kept, text = len(layout.first) + len(layout.last), layout.text
        longest = self._own.max_source_tokens * _MAX_CHARS_PER_TOKEN
        if len(text) > longest:  # the rest would be left out: it need not be read
            text = text[:longest] if layout.truncation == pb.TRUNCATION_END else text[-longest:]
        ids = self._ids(layout.prefix + text)
        if not ids:
            raise InvalidRequest("the input has no tokens", reason="FIELD_REQUIRED", field=layout.path)
        room = self._own.max_source_tokens - kept
        if len(ids) > room:
            ids = self._cut(ids, room, layout)
        return Source([*layout.first, *ids, *layout.last], list(layout.decoder), layout.forced)

    def encode_ids(self, ids: list[int]) -> Source:
        """Take token ids as they are. Raises InvalidRequest for too many."""
        self._check_length(len(ids), "input.token_ids.ids")
        return Source(ids, list(self._own.decoder_start_token_ids))

    def _layout(self, source: pb.GenerationInput) -> _Layout:
        kind = source.WhichOneof("input")
        if kind == "text":
            return _Layout("input.text", source.text, decoder=self._own.decoder_start_token_ids)
        if kind == "summarization":
            return self._summary(source.summarization)
        assert kind == "translation"
        return self._translation(source.translation)

    def _summary(self, wanted: pb.SummarizationInput) -> _Layout:
        """With the model's own languages, where it has any: a summary is asked for without one."""
        own = self._own
        _check_truncation(wanted.truncation, "input.summarization.truncation")
        path = "input.summarization.text"
        places = self._places(own.default_source, own.default_target)
        return self._laid_out(path, wanted.text, own.summary_prefix, places, wanted.truncation)

    def _translation(self, wanted: pb.TranslationInput) -> _Layout:
        own = self._own
        _check_truncation(wanted.truncation, "input.translation.truncation")
        source = self._language(wanted.source_language, own.default_source, "source_language", own.source_place)
        target = self._language(wanted.target_language, own.default_target, "target_language", own.target_place)
        prefix, places = self._prefix(source, target), self._places(source, target)
        return self._laid_out("input.translation.text", wanted.text, prefix, places, wanted.truncation)

    def _places(self, source: str, target: str) -> dict[LanguagePlace, tuple[int, ...]]:
        """Return where tokens of languages stand; of one that is not named, nowhere."""
        told = ((self._own.source_place, source), (self._own.target_place, target))
        return {place: (self._own.languages[code],) for place, code in told if code in self._own.languages}

    def _laid_out(
        self,
        path: str,
        text: str,
        prefix: str,
        places: Mapping[LanguagePlace, tuple[int, ...]],
        truncation: pb.Truncation.ValueType,
    ) -> _Layout:
        own, forced = self._own, places.get(LanguagePlace.FIRST_TOKEN)
        return _Layout(
            path,
            text,
            prefix,
            (*places.get(LanguagePlace.SOURCE_START, ()), *own.before),
            (*own.after, *places.get(LanguagePlace.SOURCE_END, ())),
            places.get(LanguagePlace.DECODER_START, own.decoder_start_token_ids),
            None if forced is None else forced[0],
            truncation,
        )

    def _language(self, code: str, default: str, name: str, place: LanguagePlace) -> str:
        """Return a language that the model knows; empty where it has only one and does not say which."""
        own, path = self._own, f"input.translation.{name}"
        if place is not LanguagePlace.NONE:
            known: Iterable[str] = own.languages
        elif own.pair_prefixes:
            known = dict.fromkeys(pair[0 if name == "source_language" else 1] for pair in own.pair_prefixes)
        else:
            known = (default,) if default else ()
        if not code and not default and known:
            raise InvalidRequest(f"is required: one of {_named(known)}", reason="FIELD_REQUIRED", field=path)
        if code and code not in known:
            what = (
                f"is none of the model's: {_named(known)}"
                if known
                else "must be empty: the model does not name its own"
            )
            raise InvalidRequest(what, reason="FIELD_INVALID", field=path)
        return code or default

    def _prefix(self, source: str, target: str) -> str:
        if not self._own.pair_prefixes:
            return ""
        for one, other, prefix in self._own.pair_prefixes:
            if (one, other) == (source, target):
                return prefix
        known = [other for one, other, _ in self._own.pair_prefixes if one == source]
        raise InvalidRequest(
            f"is none that the model translates to from this source language: {_named(known)}",
            reason="FIELD_INVALID",
            field="input.translation.target_language",
        )

    def _ids(self, text: str, *, alone: bool = False) -> list[int]:
        """Return a text's ids; `alone` with the special tokens that the tokenizer adds."""
        unk, size = self._own.unk_token_id, self._card.vocab_size
        ids, pieces = (self._reader or self._codec).encode_source(text, with_special=alone)
        if self._own.names_unknown:  # what one segmentation does not know, the other's vocabulary may name
            named = ((token_id, self._codec.id_of(piece) if token_id == unk else None) for token_id, piece in pieces)
            ids = [token_id if other is None else other for token_id, other in named]
        return [token_id if token_id < size else unk for token_id in ids]

    def _cut(self, ids: list[int], room: int, layout: _Layout) -> list[int]:
        if layout.truncation == pb.TRUNCATION_UNSPECIFIED:
            self._check_length(len(ids) + self._own.max_source_tokens - room, layout.path)
        if layout.truncation == pb.TRUNCATION_END:
            return ids[:room]
        words = self._ids(layout.prefix) if layout.prefix.strip() else []
        num_words = next((i for i, pair in enumerate(zip(words, ids, strict=False)) if pair[0] != pair[1]), len(words))
        return ids[:num_words] + ids[len(ids) - max(0, room - num_words) :]

    def _check_length(self, num_tokens: int, path: str) -> None:
        if num_tokens > self._own.max_source_tokens:
            raise InvalidRequest(
                f"the input has {num_tokens} tokens, the model reads at most {self._own.max_source_tokens}",
                reason="CONTEXT_LENGTH_EXCEEDED",
                field=path,
                limit=self._own.max_source_tokens,
                got=num_tokens,
            )


def task_of(source: pb.GenerationInput) -> TaskName:
    """Return the task that an input asks for."""
    kind = source.WhichOneof("input")
    if kind == "translation":
        return TaskName.TRANSLATE
    return TaskName.SUMMARIZE if kind == "summarization" else TaskName.GENERATE


def check_config(config: pb.GenerationConfig, num_source_tokens: int, caps: Caps) -> None:
    """Refuse what an encoder-decoder model has not, and more than a caller may use. Raises InvalidRequest."""
    bad = Violations()
    for name in ("echo", "prompt_logprobs"):
        if getattr(config, name) or (name == "prompt_logprobs" and config.HasField(name)):
            bad.add(f"config.{name}", "is not served with encoder-decoder models", "UNSUPPORTED")
    bad.raise_if_any()
    if caps.max_context_tokens and num_source_tokens >= caps.max_context_tokens:
        raise InvalidRequest(
            f"the input has {num_source_tokens} tokens; this key may use {caps.max_context_tokens}, output included",
            reason="CONTEXT_LENGTH_EXCEEDED",
            field="input",
            limit=caps.max_context_tokens - 1,
            got=num_source_tokens,
        )


def with_forced(config: pb.GenerationConfig, forced_bos_token_id: int | None) -> pb.GenerationConfig:
    """Return a request's config with what its input forces. Raises InvalidRequest where it forces something else."""
    if forced_bos_token_id is None:
        return config
    if config.HasField("forced_bos_token_id"):
        raise InvalidRequest(
            "must not be set together with input.translation, whose language is told by the first token",
            reason="FIELD_CONFLICT",
            field="config.forced_bos_token_id",
        )
    forced = pb.GenerationConfig()
    forced.CopyFrom(config)
    forced.forced_bos_token_id = forced_bos_token_id
    return forced


def languages_of(own: Seq2SeqCard | None) -> list[str]:
    """Return the codes that a translation may name, sorted."""
    if own is None:
        return []
    pairs = [code for source, target, _ in own.pair_prefixes for code in (source, target)]
    return sorted({*own.languages, *pairs, *filter(None, (own.default_source, own.default_target))})


def _check_truncation(truncation: int, path: str) -> None:
    if truncation not in _TRUNCATIONS:
        raise InvalidRequest("is not known", reason="UNSUPPORTED", field=path)


def _named(codes: Iterable[str]) -> str:
    names = [*codes]
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more, which GetModel names" if more > 0 else "")
