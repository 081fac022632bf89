"""From the request messages of tasks to what the queue takes. What can be refused is refused here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

from tokenizers import Encoding

from common.errors import InvalidRequest
from common.registry import ModelCard
from common.tasks import (
    MAX_TEXTS,
    Aggregation,
    AnswerQuestionTask,
    ClassifyTask,
    ClassifyTokensTask,
    EmbedTask,
    EncodedText,
    RerankTask,
    ScoreFunction,
    Task,
    TaskName,
)
from gateway.tasks.encoding import Cut, Tokens, WordMarks, cut, whole, windows
from gateway.tokenization import TextCodec
from gateway.violations import Violations
from torchrelay.v1 import classification_pb2 as cpb
from torchrelay.v1 import embedding_pb2 as epb
from torchrelay.v1 import generation_pb2 as pb

TaskRequest: TypeAlias = (
    epb.EmbedRequest | cpb.ClassifyRequest | cpb.ClassifyTokensRequest | cpb.AnswerQuestionRequest | cpb.RerankRequest
)

Truncation: TypeAlias = pb.Truncation.ValueType

MAX_ANSWERS: Final = 128
MAX_ANSWER_TOKENS: Final = 512
_WINDOW_TOKENS: Final = 384  # models that answer questions are trained with windows of this length
_WINDOW_OVERLAP: Final = 128
_MAX_CHARS_PER_TOKEN: Final = 64  # no tokenizer makes less than one token of so many characters of ordinary text
_DEFAULT_ANSWER_TOKENS: Final = 15

_FUNCTIONS: Final = {
    cpb.SCORE_FUNCTION_UNSPECIFIED: None,
    cpb.SCORE_FUNCTION_SOFTMAX: ScoreFunction.SOFTMAX,
    cpb.SCORE_FUNCTION_SIGMOID: ScoreFunction.SIGMOID,
    cpb.SCORE_FUNCTION_NONE: ScoreFunction.NONE,
}
_AGGREGATIONS: Final = {
    cpb.AGGREGATION_UNSPECIFIED: Aggregation.SIMPLE,
    cpb.AGGREGATION_NONE: Aggregation.NONE,
    cpb.AGGREGATION_SIMPLE: Aggregation.SIMPLE,
    cpb.AGGREGATION_FIRST: Aggregation.FIRST,
    cpb.AGGREGATION_AVERAGE: Aggregation.AVERAGE,
    cpb.AGGREGATION_MAX: Aggregation.MAX,
}


def name_of(request: TaskRequest) -> TaskName:
    """Return what a request asks for."""
    match request:
        case epb.EmbedRequest():
            return TaskName.EMBED
        case cpb.ClassifyRequest():
            return TaskName.CLASSIFY
        case cpb.ClassifyTokensRequest():
            return TaskName.CLASSIFY_TOKENS
        case cpb.AnswerQuestionRequest():
            return TaskName.ANSWER_QUESTION
        case cpb.RerankRequest():
            return TaskName.RERANK


def check_fields(request: TaskRequest, card: ModelCard) -> None:
    """Look at what needs no tokens. Raises InvalidRequest with every bad field."""
    bad = Violations()
    if not isinstance(request, cpb.AnswerQuestionRequest):
        _check_enum(request.truncation, frozenset(pb.Truncation.values()), "truncation", bad)
    match request:
        case epb.EmbedRequest():
            _check_texts(request.texts, "texts", bad)
            if request.HasField("dimensions"):
                most = card.encoder.embedding_dimensions if card.encoder is not None else 0
                if not 1 <= request.dimensions <= most:
                    bad.add("dimensions", f"must be 1 to {most}")
        case cpb.ClassifyRequest():
            _check_texts([entry.text for entry in request.inputs], "inputs", bad, part=".text")
            for number, entry in enumerate(request.inputs[:MAX_TEXTS]):
                if entry.HasField("pair") and not entry.pair:
                    bad.add(f"inputs[{number}].pair", "must not be empty; unset is none", "FIELD_REQUIRED")
            _check_enum(request.function, _FUNCTIONS, "function", bad)
        case cpb.ClassifyTokensRequest():
            _check_texts(request.texts, "texts", bad)
            _check_enum(request.aggregation, _AGGREGATIONS, "aggregation", bad)
        case cpb.AnswerQuestionRequest():
            for name in ("question", "context"):
                if not getattr(request, name):
                    bad.add(name, "must not be empty", "FIELD_REQUIRED")
            if request.top_k > MAX_ANSWERS:
                bad.add("top_k", f"must be at most {MAX_ANSWERS}")
            if request.max_answer_tokens > MAX_ANSWER_TOKENS:
                bad.add("max_answer_tokens", f"must be at most {MAX_ANSWER_TOKENS}")
        case cpb.RerankRequest():
            if not request.query:
                bad.add("query", "must not be empty", "FIELD_REQUIRED")
            _check_texts(request.documents, "documents", bad)
            _check_enum(request.function, _FUNCTIONS, "function", bad)
    bad.raise_if_any()


def _check_texts(texts: Sequence[str], path: str, bad: Violations, part: str = "") -> None:
    if not 1 <= len(texts) <= MAX_TEXTS:
        bad.add(path, f"must be 1 to {MAX_TEXTS}", "FIELD_OUT_OF_RANGE" if texts else "FIELD_REQUIRED")
        return
    for number, text in enumerate(texts):
        if not text:
            bad.add(f"{path}[{number}]{part}", "must not be empty", "FIELD_REQUIRED")


def _check_enum(value: int, known: object, path: str, bad: Violations) -> None:
    if value not in known:  # type: ignore[operator]
        bad.add(path, "is no value of this enum that is known here", "FIELD_INVALID")


def num_chars(request: TaskRequest) -> int:
    """Return how many characters are to be tokenized."""
    match request:
        case epb.EmbedRequest() | cpb.ClassifyTokensRequest():
            return sum(map(len, request.texts))
        case cpb.ClassifyRequest():
            return sum(len(entry.text) + len(entry.pair) for entry in request.inputs)
        case cpb.AnswerQuestionRequest():
            return len(request.question) + len(request.context)
        case cpb.RerankRequest():
            return len(request.query) * len(request.documents) + sum(map(len, request.documents))


class TaskReader:
    """Turns checked requests into tasks for one model. Thread-safe; may take long for long texts."""

    def __init__(self, codec: TextCodec, max_tokens: int) -> None:
        """`max_tokens` is of one text, special tokens included."""
        self.codec = codec
        self._max_tokens = max_tokens
        self._marks = WordMarks(codec.tokenizer)

    def read(self, request: TaskRequest) -> Task:
        """Raises InvalidRequest for a text that is too long, or has no tokens."""
        match request:
            case epb.EmbedRequest():
                vectors_of = [
                    self._stored(text, None, f"texts[{number}]", truncation=request.truncation)
                    for number, text in enumerate(request.texts)
                ]
                return EmbedTask(
                    tuple(vectors_of),
                    request.dimensions,
                    request.normalize if request.HasField("normalize") else None,
                )
            case cpb.ClassifyRequest():
                encoded = [
                    self._stored(entry.text, entry.pair or None, f"inputs[{number}]", truncation=request.truncation)
                    for number, entry in enumerate(request.inputs)
                ]
                return ClassifyTask(tuple(encoded), request.top_k, _FUNCTIONS[request.function])
            case cpb.ClassifyTokensRequest():
                texts = self._texts(request.texts, "texts", truncation=request.truncation)
                sources = tuple(request.texts)
                return ClassifyTokensTask(
                    tuple(text.encoded() for text in texts),
                    sources,
                    tuple(self._marks.spans(text, 0, source) for text, source in zip(texts, sources, strict=True)),
                    _AGGREGATIONS[request.aggregation],
                    () if request.include_outside else ("O",),
                )
            case cpb.AnswerQuestionRequest():
                return self._question(request)
            case cpb.RerankRequest():
                documents = [
                    self._stored(
                        request.query, document, f"documents[{number}]", truncation=request.truncation, side=Cut.SECOND
                    )
                    for number, document in enumerate(request.documents)
                ]
                return RerankTask(tuple(documents), request.top_n, _FUNCTIONS[request.function])

    def _texts(self, texts: Sequence[str], path: str, *, truncation: Truncation) -> list[Tokens]:
        return [
            self._encode(text, None, f"{path}[{number}]", truncation=truncation) for number, text in enumerate(texts)
        ]

    def _stored(
        self, text: str, pair: str | None, path: str, *, truncation: Truncation, side: Cut = Cut.LONGEST
    ) -> EncodedText:
        """Return a text, at most as long as the model reads."""
        encoding = self._tokenize(text, pair, path, truncation)
        if len(encoding) <= self._max_tokens:
            return whole(encoding)
        return self._cut(Tokens.of(encoding), path, truncation, side).encoded()

    def _encode(
        self, text: str, pair: str | None, path: str, *, truncation: Truncation, side: Cut = Cut.LONGEST
    ) -> Tokens:
        """As `_stored`, with where tokens stand."""
        return self._cut(Tokens.of(self._tokenize(text, pair, path, truncation)), path, truncation, side)

    def _tokenize(self, text: str, pair: str | None, path: str, truncation: Truncation) -> Encoding:
        longest = self._max_tokens * _MAX_CHARS_PER_TOKEN
        if truncation:  # what lies beyond cannot matter, and takes time that others need
            beyond = slice(-longest, None) if truncation == pb.TRUNCATION_START else slice(longest)
            text, pair = text[beyond], pair and pair[beyond]
        elif len(text) + len(pair or "") > longest:
            raise self._too_long(path)
        encoding = self.codec.encode_pair(text, pair)
        if not len(encoding):
            raise InvalidRequest("the text has no tokens", reason="FIELD_REQUIRED", field=path)
        return encoding

    def _cut(self, tokens: Tokens, path: str, truncation: Truncation, side: Cut) -> Tokens:
        """Return at most as many tokens as the model takes."""
        if len(tokens) <= self._max_tokens:
            return tokens
        if not truncation:
            raise self._too_long(path, len(tokens))
        short = cut(tokens, self._max_tokens, side, at_start=truncation == pb.TRUNCATION_START)
        if len(short) > self._max_tokens or (tokens.count(1) and not short.count(1)):
            raise self._too_long(path, len(tokens))  # what may not be cut leaves no room for the rest
        return short

    def _question(self, request: cpb.AnswerQuestionRequest) -> AnswerQuestionTask:
        context = request.context
        if len(request.question) > self._max_tokens * _MAX_CHARS_PER_TOKEN:
            raise self._too_long("question")
        tokens = Tokens.of(self.codec.encode_pair(request.question, context))
        width = min(self._max_tokens, _WINDOW_TOKENS)
        num_asked = len(tokens) - tokens.count(1)
        if not tokens.count(0) or not tokens.count(1):
            path = "context" if tokens.count(0) else "question"
            raise InvalidRequest("the text has no tokens", reason="FIELD_REQUIRED", field=path)
        if num_asked > width // 2:
            raise self._too_long("question", num_asked, width // 2)
        room = width - num_asked
        overlap = request.window_overlap if request.HasField("window_overlap") else min(_WINDOW_OVERLAP, room // 2)
        if overlap >= room:
            raise InvalidRequest(
                f"must be below the {room} tokens of the context that fit a window beside this question",
                reason="FIELD_OUT_OF_RANGE",
                field="window_overlap",
                limit=room - 1,
                got=overlap,
            )
        pieces = windows(tokens, width, overlap)
        if len(pieces) > MAX_TEXTS:
            raise InvalidRequest(
                f"the context comes to {len(pieces)} windows; at most {MAX_TEXTS} are read",
                reason="CONTEXT_LENGTH_EXCEEDED",
                field="context",
                limit=MAX_TEXTS,
                got=len(pieces),
            )
        return AnswerQuestionTask(
            tuple(piece.encoded() for piece in pieces),
            context,
            tuple(self._marks.spans(piece, 1, context) for piece in pieces),
            request.top_k or 1,
            request.max_answer_tokens or _DEFAULT_ANSWER_TOKENS,
            request.allow_no_answer,
        )

    def _too_long(self, path: str, got: int | None = None, limit: int | None = None) -> InvalidRequest:
        limit = limit or self._max_tokens
        return InvalidRequest(
            f"the text is longer than the {limit} tokens that are taken",
            reason="CONTEXT_LENGTH_EXCEEDED",
            field=path,
            limit=limit,
            got=got,
        )
