from __future__ import annotations

from hashlib import sha256
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.chain import GENESIS, HASH_BYTES, next_hash
from common.generation import OutputDelta

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=8)


def delta(*token_ids: int, text: str = "") -> OutputDelta:
    return OutputDelta(0, 0, token_ids, text)


def test_the_hash_is_over_the_previous_one_and_little_endian_ids() -> None:
    expected = sha256(GENESIS + bytes([1, 0, 0, 0, 0x39, 0x30, 0, 0])).digest()[:8]
    assert next_hash(GENESIS, [delta(1), delta(12345)]) == expected
    assert len(expected) == HASH_BYTES


def test_an_event_without_tokens_keeps_the_hash() -> None:
    assert next_hash(b"12345678", []) == b"12345678"
    assert next_hash(b"12345678", [delta(text="held back until now")]) == b"12345678"


@given(st.lists(TOKENS, min_size=2, max_size=6), st.data())
def test_another_past_gives_another_hash_for_ever_after(events: list[list[int]], data: st.DataObject) -> None:
    changed = [list(event) for event in events]
    at = data.draw(st.integers(0, len(events) - 1))
    changed[at].append(7)
    one = two = GENESIS
    for index, (event, other) in enumerate(zip(events, changed, strict=True)):
        one, two = next_hash(one, [delta(*event)]), next_hash(two, [delta(*other)])
        assert (one == two) == (index < at)


@given(st.lists(TOKENS, max_size=6))
def test_the_chain_moves_exactly_when_there_are_tokens(events: list[list[int]]) -> None:
    hashes = [GENESIS]
    for event in events:
        hashes.append(next_hash(hashes[-1], [delta(*event)]))
    assert [old != new for old, new in pairwise(hashes)] == [bool(event) for event in events]


def test_an_id_that_does_not_fit_is_refused() -> None:
    with pytest.raises(OverflowError):
        next_hash(GENESIS, [delta(2**32)])
