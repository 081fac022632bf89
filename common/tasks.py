"""The tasks of encoder models, between gateway, Redis and worker: texts in, one result out. Pure data, no I/O.

The gateway tokenizes, so a text is token ids here, with what the answer is made of: where its tokens stand in the
caller's text. Records only grow, as those of `common/generation.py` do: new fields come last, with a default.
"""

from __future__ import annotations

from array import array
from enum import StrEnum
from typing import Final, TypeAlias

import msgspec

MAX_TEXTS: Final = 2048  # of one request


class TaskName(StrEnum):
    """What a model can do, as its card names it."""

    GENERATE = "generate"
    TRANSLATE = "translate"  # a generation from a text in another language
    SUMMARIZE = "summarize"  # a generation from a longer text
    EMBED = "embed"
    CLASSIFY = "classify"
    RERANK = "rerank"
    CLASSIFY_TOKENS = "classify_tokens"
    ANSWER_QUESTION = "answer_question"


class ScoreFunction(StrEnum):
    """What turns a classifier's logits into scores."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    NONE = "none"


class Aggregation(StrEnum):
    """How labels of tokens become labels of entities. Names and meaning are those of transformers' pipeline."""

    NONE = "none"  # each token for itself
    SIMPLE = "simple"  # neighbours of one label
    FIRST = "first"  # a word has its first token's label
    AVERAGE = "average"  # a word has the label of its tokens' mean scores
    MAX = "max"  # a word has the label of its token with the highest score


class EncodedText(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A text, or a pair of texts, as the model reads it: with the special tokens around it."""

    token_ids: bytes  # int32, little endian
    type_ids: bytes = b""  # a byte per token; empty: all are 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) // 4


class TokenSpans(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where tokens stand in a text, in characters (Unicode code points). One entry per token of the EncodedText."""

    starts: bytes  # int32, little endian; -1: the token is none of the text's
    ends: bytes  # likewise
    is_word_start: bytes = b""  # a byte per token, 1 where a word begins


class EmbedTask(msgspec.Struct, frozen=True, array_like=True, tag="embed"):
    """Vectors of texts."""

    texts: tuple[EncodedText, ...]
    dimensions: int = 0  # the first so many; 0: all
    normalize: bool | None = None  # to length 1; None: as the model does


class ClassifyTask(msgspec.Struct, frozen=True, array_like=True, tag="classify"):
    """Labels of texts, or of pairs."""

    texts: tuple[EncodedText, ...]
    top_k: int = 0  # the most probable; 0: all
    function: ScoreFunction | None = None  # None: the model's


class RerankTask(msgspec.Struct, frozen=True, array_like=True, tag="rerank"):
    """How well documents fit a query: each text is a pair of both."""

    texts: tuple[EncodedText, ...]
    top_n: int = 0  # the best; 0: all
    function: ScoreFunction | None = None  # None: the model's


class ClassifyTokensTask(msgspec.Struct, frozen=True, array_like=True, tag="classify_tokens"):
    """Entities in texts."""

    texts: tuple[EncodedText, ...]
    sources: tuple[str, ...]  # the texts themselves
    spans: tuple[TokenSpans, ...]
    aggregation: Aggregation = Aggregation.SIMPLE
    ignored_labels: tuple[str, ...] = ("O",)


class AnswerQuestionTask(msgspec.Struct, frozen=True, array_like=True, tag="answer_question"):
    """Where a text answers a question. Each of `texts` is the question and a window of the context."""

    texts: tuple[EncodedText, ...]
    context: str
    spans: tuple[TokenSpans, ...]  # of the context
    top_k: int = 1
    max_answer_tokens: int = 15
    may_have_no_answer: bool = False


Task: TypeAlias = EmbedTask | ClassifyTask | RerankTask | ClassifyTokensTask | AnswerQuestionTask


def num_tokens(task: Task) -> int:
    """Return how many tokens a task's texts have together."""
    return sum(text.num_tokens for text in task.texts)


def pack_ids(values: list[int]) -> bytes:
    """Return 32-bit integers as they are stored."""
    packed = array("i", values)
    if _IS_BIG_ENDIAN:
        packed.byteswap()
    return packed.tobytes()


_IS_BIG_ENDIAN: Final = array("i", [1]).tobytes()[0] == 0


class LabelScore(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A label, and how probable it is."""

    label: str
    score: float


class Entity(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A part of a text with one label. Offsets are characters (Unicode code points) of the caller's text."""

    label: str
    score: float
    start: int
    end: int
    text: str


class Answer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A part of the context that may answer; an empty one at 0 says that nothing there does."""

    score: float
    start: int
    end: int
    text: str


class Embeddings(msgspec.Struct, frozen=True, array_like=True, tag="embed"):
    """One vector per text."""

    dimensions: int
    vectors: tuple[bytes, ...]  # float32, little endian


class Labels(msgspec.Struct, frozen=True, array_like=True, tag="classify"):
    """Per text its labels, the most probable first."""

    texts: tuple[tuple[LabelScore, ...], ...]


class Ranking(msgspec.Struct, frozen=True, array_like=True, tag="rerank"):
    """Documents by their index in the request with their scores, the best first."""

    documents: tuple[tuple[int, float], ...]


class Entities(msgspec.Struct, frozen=True, array_like=True, tag="classify_tokens"):
    """Per text its entities, in order."""

    texts: tuple[tuple[Entity, ...], ...]


class Answers(msgspec.Struct, frozen=True, array_like=True, tag="answer_question"):
    """The best answers, the best first."""

    answers: tuple[Answer, ...]


TaskResult: TypeAlias = Embeddings | Labels | Ranking | Entities | Answers


def bytes_of_result(result: TaskResult) -> int:
    """Return about how much memory a result takes."""
    match result:
        case Embeddings(vectors=vectors):
            return sum(64 + len(vector) for vector in vectors)
        case Labels(texts=texts):
            return sum(64 + 160 * len(labels) for labels in texts)
        case Ranking(documents=documents):
            return 120 * len(documents)
        case Entities(texts=texts):
            return sum(64 + sum(320 + 4 * len(one.text) for one in found) for found in texts)
        case Answers(answers=answers):
            return sum(256 + 4 * len(one.text) for one in answers)
