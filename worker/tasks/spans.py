"""Where a context answers a question, by the logits of its windows. Pure.

As in BERT's reader for SQuAD (arXiv:1810.04805, 4.2 and 4.3) and transformers' former pipeline: a window's tokens share
out the probability that the answer begins, and ends, with them; its first token takes what stands for no answer. An
answer's score is the product of both. Windows overlap, so an answer may be found twice: its best score counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from common.tasks import Answer, AnswerQuestionTask, TokenSpans
from worker.tasks.labels import Array, softmax

_NO_ANSWER: Final = (0, 0)
_CANDIDATES: Final = 32  # per answer asked for: spans that may come to the same words


def find_answers(task: AnswerQuestionTask, logits: Sequence[Array]) -> tuple[Answer, ...]:
    """Return the best `top_k` answers, of logits [num_tokens, 2] of each window."""
    best: dict[tuple[int, int], float] = {}
    none = 1.0
    for window, spans in zip(logits, task.spans, strict=True):
        found, score = _of_window(window, spans, task.max_answer_tokens, task.top_k)
        none = min(none, score)
        for span, score in found:
            best[span] = max(score, best.get(span, 0.0))
    if task.may_have_no_answer:
        best[_NO_ANSWER] = none
    ordered = sorted(best.items(), key=lambda item: (-item[1], item[0]))[: task.top_k]
    return tuple(Answer(score, start, end, task.context[start:end]) for (start, end), score in ordered)


def _of_window(
    logits: Array, spans: TokenSpans, max_tokens: int, top_k: int
) -> tuple[list[tuple[tuple[int, int], float]], float]:
    """Return a window's best spans in characters, whole words each, and how probable it is that it has none."""
    starts, ends = (np.frombuffer(data, dtype="<i4") for data in (spans.starts, spans.ends))
    is_context = starts >= 0
    allowed = is_context.copy()
    allowed[0] = True
    begin, end = (softmax(np.where(allowed, column.astype(np.float64), -np.inf)) for column in logits.T)
    none = float(begin[0] * end[0])
    context = np.flatnonzero(is_context)
    if not len(context):
        return [], none
    first, last = context[0], context[-1] + 1  # one piece: what stands between two tokens of a text is of that text
    scores = np.triu(np.outer(begin[first:last], end[first:last]))
    scores -= np.triu(scores, max_tokens)
    firsts, lasts = _word_bounds(spans.is_word_start, first, last)
    found: dict[tuple[int, int], float] = {}
    flat = scores.ravel()
    num_candidates = _CANDIDATES * top_k
    while True:
        for place in _largest(flat, num_candidates):
            i, j = divmod(int(place), last - first)
            if len(found) == top_k or flat[place] <= 0:
                return list(found.items()), none
            found.setdefault((int(starts[first + firsts[i]]), int(ends[first + lasts[j]])), float(flat[place]))
        if num_candidates >= len(flat):
            return list(found.items()), none
        num_candidates *= 8  # many came to the same words


def _largest(values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """Return the indices of the largest values, the largest first; of equal ones the first."""
    chosen = np.arange(len(values)) if count >= len(values) else np.argpartition(-values, count)[:count]
    chosen.sort()
    return chosen[np.argsort(-values[chosen], kind="stable")]


def _word_bounds(is_word_start: bytes, first: int, last: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the first and the last token of each context token's word, counted from `first`."""
    begins = np.frombuffer(is_word_start, dtype=np.uint8)[first:last].astype(bool)
    begins[0] = True
    word = begins.cumsum() - 1
    firsts = np.flatnonzero(begins)
    lasts = np.append(firsts[1:], last - first) - 1
    return firsts[word], lasts[word]
