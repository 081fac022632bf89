from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import NoRepeatNGramLogitsProcessor

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
