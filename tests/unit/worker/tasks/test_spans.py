"""Answers in windows, held to a search through all spans."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from common.tasks import AnswerQuestionTask, EncodedText, TokenSpans, pack_ids
from worker.tasks.spans import find_answers

CONTEXT = "".join(f"w{i:02d}" for i in range(40))  # tokens of three characters


def window(first: int, count: int, begins: list[bool], num_asked: int) -> TokenSpans:
    """A window of context tokens first.. behind the question's, and one token after it."""
    starts = [-1] * num_asked + [3 * i for i in range(first, first + count)] + [-1]
    ends = [-1] * num_asked + [3 * i + 3 for i in range(first, first + count)] + [-1]
    flags = [0] * num_asked + [int(begins[i]) for i in range(first, first + count)] + [0]
    return TokenSpans(pack_ids(starts), pack_ids(ends), bytes(flags))


def softmax(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def by_hand(
    task: AnswerQuestionTask, logits: list[np.ndarray[Any, Any]], begins: list[bool], firsts: list[int], num_asked: int
) -> tuple[dict[tuple[int, int], float], float]:
    """Every span of every window with its score, whole words each; and that of no answer."""
    found: dict[tuple[int, int], float] = {}
    none = 1.0
    for first, window_logits in zip(firsts, logits, strict=True):
        count = len(window_logits) - num_asked - 1
        places = [0, *range(num_asked, num_asked + count)]
        begin, end = softmax(window_logits[places, 0].astype(float)), softmax(window_logits[places, 1].astype(float))
        none = min(none, begin[0] * end[0])
        inside = list(range(first, first + count))
        for i, j in itertools.combinations_with_replacement(range(count), 2):
            if j - i >= task.max_answer_tokens:
                continue
            a, b = inside[i], inside[j]
            while a > first and not begins[a]:
                a -= 1
            while b + 1 < first + count and not begins[b + 1]:
                b += 1
            span = (3 * a, 3 * b + 3)
            found[span] = max(found.get(span, 0.0), begin[i + 1] * end[j + 1])
    return found, none


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_they_are_the_best_of_all_spans(data: st.DataObject) -> None:
    num_asked = data.draw(st.integers(1, 4))
    begins = data.draw(st.lists(st.booleans(), min_size=40, max_size=40))
    firsts = sorted(data.draw(st.sets(st.integers(0, 30), min_size=1, max_size=3)))
    counts = [data.draw(st.integers(1, 10)) for _ in firsts]
    random = np.random.default_rng(data.draw(st.integers(0, 999)))
    logits = [random.normal(scale=3, size=(num_asked + n + 1, 2)).astype(np.float32) for n in counts]
    task = AnswerQuestionTask(
        texts=(EncodedText(b""),) * len(firsts),
        context=CONTEXT,
        spans=tuple(window(first, n, begins, num_asked) for first, n in zip(firsts, counts, strict=True)),
        top_k=data.draw(st.sampled_from([1, 3, 200])),
        max_answer_tokens=data.draw(st.integers(1, 12)),
        may_have_no_answer=data.draw(st.booleans()),
    )
    found = find_answers(task, logits)
    all_spans, none = by_hand(task, logits, begins, firsts, num_asked)
    if task.may_have_no_answer:
        all_spans[0, 0] = none
    best = sorted(all_spans.values(), reverse=True)[: task.top_k]
    assert np.allclose([one.score for one in found], best, rtol=1e-9)
    assert all(np.isclose(all_spans[one.start, one.end], one.score) for one in found)
    assert all(one.text == CONTEXT[one.start : one.end] for one in found)
    assert len({(one.start, one.end) for one in found}) == len(found)


def test_a_window_without_context_has_no_answer_but_none() -> None:
    spans = TokenSpans(pack_ids([-1, -1]), pack_ids([-1, -1]), bytes(2))
    logits = [np.array([[1.0, 2.0], [0.0, 0.0]], np.float32)]
    for allowed, scores in ((False, []), (True, [1.0])):
        task = AnswerQuestionTask((EncodedText(b""),), "abc", (spans,), may_have_no_answer=allowed)
        assert [one.score for one in find_answers(task, logits)] == scores


def test_the_best_score_of_a_span_that_two_windows_hold_counts() -> None:
    begins = [True] * 40
    spans = (window(0, 4, begins, 1), window(2, 4, begins, 1))
    sharp, flat = np.zeros((6, 2), np.float32), np.zeros((6, 2), np.float32)
    sharp[3] = flat[1] = 5.0  # token 2 of the context in both
    sharp[3] = 9.0
    for first, second in ((sharp, flat), (flat, sharp)):
        windows_ = spans if first is sharp else (spans[1], spans[0])
        task = AnswerQuestionTask((EncodedText(b""),) * 2, CONTEXT, windows_)
        [found] = find_answers(task, [first, second])
        assert (found.start, found.end) == (6, 9)
        assert found.score > 0.99
