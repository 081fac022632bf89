"""Texts cut and windowed, held to what the tokenizers library does by its own settings."""

from __future__ import annotations

import re
from functools import cache
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gateway.tasks.encoding import Cut, Tokens, WordMarks, cut, windows
from tests.builders_tasks import CORPUS, WORDS, make_tokenizer

_KINDS: Final = ("word_piece", "byte_level")
words = st.lists(st.sampled_from([*WORDS, "zzz", "Ünï", "🙂", "it's"]), min_size=1, max_size=30).map(" ".join)


@cache
def tokenizer(
    kind: str, max_tokens: int = 0, strategy: str = "longest_first", stride: int = 0, direction: str = "right"
) -> Tokenizer:
    found = make_tokenizer(kind)
    if max_tokens:
        found.enable_truncation(max_tokens, strategy=strategy, stride=stride, direction=direction)
    return found


@settings(max_examples=60, deadline=None)
@given(
    text=words,
    pair=st.none() | words,
    max_tokens=st.integers(6, 40),
    kind=st.sampled_from(_KINDS),
    direction=st.sampled_from(["left", "right"]),
)
def test_the_longer_text_gives_way_first(
    text: str, pair: str | None, max_tokens: int, kind: str, direction: str
) -> None:
    expected = tokenizer(kind, max_tokens, direction=direction).encode(text, pair)
    found = cut(Tokens.of(tokenizer(kind).encode(text, pair)), max_tokens, at_start=direction == "left")
    assert (found.ids, found.types, found.offsets) == (expected.ids, expected.type_ids, expected.offsets)


@settings(max_examples=60, deadline=None)
@given(text=words, pair=words, max_tokens=st.integers(6, 60), kind=st.sampled_from(_KINDS))
def test_only_the_second_text_gives_way_where_it_is_to(text: str, pair: str, max_tokens: int, kind: str) -> None:
    tokens = Tokens.of(tokenizer(kind).encode(text, pair))
    found = cut(tokens, max_tokens, Cut.SECOND)
    if len(tokens) - tokens.count(1) >= max_tokens:
        assert found.count(1) == 0
        assert found.count(0) == tokens.count(0)
        return
    expected = tokenizer(kind, max_tokens, "only_second").encode(text, pair)
    assert (found.ids, found.types, found.offsets) == (expected.ids, expected.type_ids, expected.offsets)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), text=words, pair=words, kind=st.sampled_from(_KINDS))
def test_windows_overlap_and_leave_nothing_out(data: st.DataObject, text: str, pair: str, kind: str) -> None:
    tokens = Tokens.of(tokenizer(kind).encode(text, pair))
    num_asked = len(tokens) - tokens.count(1)
    max_tokens = data.draw(st.integers(num_asked + 2, num_asked + 20))
    overlap = data.draw(st.integers(0, max_tokens - num_asked - 1))
    pieces = windows(tokens, max_tokens, overlap)
    expected = tokenizer(kind, max_tokens, "only_second", overlap).encode(text, pair)
    assert [piece.ids for piece in pieces] == [expected.ids, *(more.ids for more in expected.overflowing)]
    assert [piece.offsets for piece in pieces] == [expected.offsets, *(more.offsets for more in expected.overflowing)]


def test_a_pair_is_stored_with_its_types_and_a_single_text_without() -> None:
    single, pair = (Tokens.of(tokenizer("word_piece").encode("the river", other)) for other in (None, "is blue"))
    assert single.encoded().type_ids == b""
    encoded = pair.encoded()
    assert list(encoded.type_ids) == pair.types
    assert encoded.num_tokens == len(pair)
    assert 1 in pair.types


@pytest.mark.parametrize("kind", _KINDS)
def test_words_begin_where_a_text_s_words_do(kind: str) -> None:
    text = f"{CORPUS[0]}\nunbelievable\tgarden"
    tokens = Tokens.of(tokenizer(kind).encode("who?", text))
    spans = WordMarks(tokenizer(kind)).spans(tokens, 1, text)
    begun = [start for flag, (start, _) in zip(spans.is_word_start, tokens.offsets, strict=True) if flag]
    for word in re.finditer(r"\S+", text):
        first, last = word.span()
        assert first in begun
        if word[0].isalnum():
            assert not [start for start in begun if first < start < last]
