from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import EncoderNoRepeatNGramLogitsProcessor, NoRepeatNGramLogitsProcessor

from common.generation import SamplingParams
from worker.engine.history import TokenHistory


def make_history(token_ids: list[int], prompt: list[int] | None = None, **params: object) -> TokenHistory:
    history = TokenHistory(SamplingParams(max_tokens=1, **params), prompt or [])  # type: ignore[arg-type]
    history.extend(token_ids)
    return history


def banned(history: TokenHistory) -> list[int]:
    return sorted({int(token_id) for ids in history.banned_ids() for token_id in ids})


@given(token_ids=st.lists(st.integers(0, 4), min_size=1, max_size=40), ngram_size=st.integers(1, 5))
def test_banned_are_the_ids_that_transformers_bans(token_ids: list[int], ngram_size: int) -> None:
    scores = NoRepeatNGramLogitsProcessor(ngram_size)(torch.tensor([token_ids]), torch.zeros(1, 5))
    expected = (scores[0] == float("-inf")).nonzero()[:, 0].tolist()
    assert banned(make_history(token_ids, no_repeat_ngram_size=ngram_size)) == expected


@example(source=[1, 2, 3, 1], prompt=[2], output=[], ngram_size=3)  # 1 2 stands across the two
@given(
    source=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    prompt=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    output=st.lists(st.integers(0, 4), max_size=10),
    ngram_size=st.integers(1, 4),
)
def test_with_a_source_its_ngrams_are_banned_and_not_the_prompts(
    source: list[int], prompt: list[int], output: list[int], ngram_size: int
) -> None:
    history = TokenHistory(SamplingParams(max_tokens=1, encoder_no_repeat_ngram_size=ngram_size), prompt, source)
    history.extend(output)
    processor = EncoderNoRepeatNGramLogitsProcessor(ngram_size, torch.tensor([source]))
    scores = processor(torch.tensor([prompt + output]), torch.zeros(1, 5))
    assert banned(history) == (scores[0] == float("-inf")).nonzero()[:, 0].tolist()


@given(token_ids=st.lists(st.integers(0, 9), max_size=40), cut=st.integers(0, 40))
def test_tokens_may_come_in_pieces(token_ids: list[int], cut: int) -> None:
    params = {"no_repeat_ngram_size": 3, "repetition_penalty": 1.1}
    whole = make_history(token_ids, **params)
    pieces = make_history(token_ids[:cut], **params)
    for token_id in token_ids[cut:]:
        pieces.extend([token_id])
    assert (banned(pieces), pieces.seen_ids) == (banned(whole), whole.seen_ids)


@given(st.lists(st.integers(0, 9), max_size=40))
def test_every_seen_id_is_listed_once(token_ids: list[int]) -> None:
    assert make_history(token_ids, repetition_penalty=1.1).seen_ids.tolist() == list(dict.fromkeys(token_ids))


def test_only_what_is_asked_for_is_kept() -> None:
    assert not TokenHistory.is_needed(SamplingParams(max_tokens=1, temperature=1.0, top_k=5))
    assert not make_history([1, 2, 1], no_repeat_ngram_size=2).seen_ids
    assert banned(make_history([1, 2, 1], repetition_penalty=1.1)) == []


@given(
    token_ids=st.lists(st.integers(0, 4), max_size=20),
    steps=st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 4)), max_size=30),
    ngram_size=st.integers(1, 3),
)
def test_copies_go_their_own_ways(token_ids: list[int], steps: list[tuple[int, bool, int]], ngram_size: int) -> None:
    pasts = [token_ids]
    histories = [make_history(token_ids, no_repeat_ngram_size=ngram_size)]
    for place, is_branch, token_id in steps:
        place %= len(pasts)
        if is_branch:
            pasts.append(pasts[place])
            histories.append(histories[place].copy())
        else:
            pasts[place] = [*pasts[place], token_id]
            histories[place].extend([token_id])
    for past, history in zip(pasts, histories, strict=True):
        assert banned(history) == banned(make_history(past, no_repeat_ngram_size=ngram_size))


def test_the_ids_that_may_not_come_again_are_not_gathered_anew_at_each_step() -> None:
    history = make_history(list(range(1000)), no_repeat_ngram_size=1)
    (first,), (second,) = history.banned_ids(), history.banned_ids()
    assert np.shares_memory(first, second)
    assert first.tolist() == list(range(1000))
    shared = history.copy()
    assert np.shares_memory(shared.banned_ids()[0], first), "until one of them goes on"


EVERYTHING: dict[str, Any] = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": ((1, 2, 3), (2, 0)),
    "sequence_bias": (((3,), 1.0), ((0, 1, 3), 2.0), ((1, 3), 4.0)),
}


def told(history: TokenHistory) -> dict[str, Any]:
    ids, values = history.biases()
    return {
        "banned": banned(history),
        "seen": history.seen_ids.tolist(),
        "counts": dict(zip(history.counted_ids.tolist(), history.counts.tolist(), strict=True)),
        "biases": dict(zip(ids.tolist(), values.tolist(), strict=True)),
        "num_output_tokens": history.num_output_tokens,
    }


@given(prompt=st.lists(st.integers(0, 3), max_size=8), parts=st.tuples(*[st.lists(st.integers(0, 3), max_size=6)] * 3))
def test_a_copy_and_its_original_know_each_their_own_past(prompt: list[int], parts: tuple[list[int], ...]) -> None:
    before, one, other = parts
    original = make_history(before, prompt, **EVERYTHING)
    copy = original.copy()
    original.extend(one)
    copy.extend(other)
    assert told(original) == told(make_history(before + one, prompt, **EVERYTHING))
    assert told(copy) == told(make_history(before + other, prompt, **EVERYTHING))
    assert told(copy)["num_output_tokens"] == len(before + other)


def test_phrases_are_found_by_all_but_their_last_id() -> None:
    assert banned(make_history([5, 1, 2], bad_words_ids=((1, 2, 3), (2, 2, 4), (2, 6)))) == [3, 6]
    ids, values = make_history([5, 1, 2], sequence_bias=(((3,), 1.0), ((1, 2, 3), 2.0), ((2, 3), 4.0))).biases()
    assert (ids.tolist(), values.tolist()) == ([3], [7.0]), "all of one id's together"


def test_bad_words_that_end_an_output_are_not_banned() -> None:
    history = make_history([1], bad_words_ids=((2,), (3,)), stop_token_ids=(3,), suppress_tokens=(4,))
    assert history.always_banned.tolist() == [2, 4]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1.1), ("no_repeat_ngram_size", 1), ("min_tokens", 1), ("presence_penalty", -0.1),
        ("frequency_penalty", 0.1), ("encoder_repetition_penalty", 0.9), ("encoder_no_repeat_ngram_size", 1),
        ("bad_words_ids", ((1,),)), ("sequence_bias", (((1,), 1.0),)), ("suppress_tokens", (1,)),
        ("begin_suppress_tokens", (1,)), ("exponential_decay_length_penalty", (0, 1.1)), ("forced_eos_token_id", 0),
        ("forced_bos_token_id", 0),
    ],
)  # fmt: skip
def test_each_edit_alone_needs_a_history(name: str, value: Any) -> None:
    assert TokenHistory.is_needed(SamplingParams(max_tokens=2, **{name: value}))
