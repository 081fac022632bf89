from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from common.api_keys import generate_key, id_of


def test_a_key_has_an_id_a_256_bit_secret_and_a_checksum() -> None:
    key, key_id = generate_key()
    match = re.fullmatch(r"tr_([0-9A-Za-z]{12})_([0-9A-Za-z]{43})_([0-9A-Za-z]{6})", key)
    assert match is not None
    assert match[1] == key_id == id_of(key)


def test_keys_differ() -> None:
    assert len({generate_key()[0] for _ in range(500)}) == 500


@given(st.integers(3, 70), st.characters(min_codepoint=33, max_codepoint=126))
def test_one_wrong_character_is_noticed(at: int, character: str) -> None:
    key, _ = generate_key()
    at %= len(key)
    changed = key[:at] + character + key[at + 1 :]
    assert (id_of(changed) is None) == (changed != key)


@given(st.text(max_size=100))
def test_no_other_text_is_taken_for_a_key(text: str) -> None:
    assert id_of(text) is None
