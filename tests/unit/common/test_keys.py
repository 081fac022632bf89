from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import keys
from common.errors import GenerationNotFound


@given(st.text(max_size=200), st.text(max_size=80))
def test_every_model_revision_gets_a_shard_that_stays_in_its_hash_tag(name: str, revision: str) -> None:
    shard = keys.shard_name(name, revision)
    assert keys.check_shard(shard) == shard
    assert keys.meta(shard) == "{" + shard + "}:meta"


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_two_revisions_never_share_a_shard(name: str, revision: str, name2: str, revision2: str) -> None:
    if (name, revision) != (name2, revision2):
        assert keys.shard_name(name, revision) != keys.shard_name(name2, revision2)


def test_a_generation_id_begins_with_its_shard_and_is_not_repeated() -> None:
    shard = keys.shard_name("org/Model-1.5", "abc")
    ids = {keys.new_generation_id(shard) for _ in range(1000)}
    assert len(ids) == 1000
    assert {keys.shard_of(generation_id) for generation_id in ids} == {shard}


def test_a_random_id_is_26_letters_of_base32_each_as_likely_at_each_place() -> None:
    ids = [keys.random_id() for _ in range(2000)]
    assert {len(one) for one in ids} == {26}
    for letters in zip(*ids, strict=True):
        assert "".join(sorted(set(letters))) == "234567abcdefghijklmnopqrstuvwxyz"
        assert max(map(letters.count, set(letters))) < 125  # 8 standard deviations above the mean of 62.5


@pytest.mark.parametrize(
    "made_up",
    [
        "",
        ".",
        "m",
        "m.",
        ".aaaaaaaaaaaaaaaaaaaaaaaaaa",
        "m.aaaaaaaaaaaaaaaaaaaaaaaaa",  # 25 characters
        "m.aaaaaaaaaaaaaaaaaaaaaaaaaa\n",
        "m.AAAAAAAAAAAAAAAAAAAAAAAAAA",
        "}:meta.aaaaaaaaaaaaaaaaaaaaaaaaaa",
        "m.x.aaaaaaaaaaaaaaaaaaaaaaaaaa",
        "M.aaaaaaaaaaaaaaaaaaaaaaaaaa",
    ],
)
def test_an_id_that_we_cannot_have_issued_is_answered_like_an_unknown_one(made_up: str) -> None:
    with pytest.raises(GenerationNotFound):
        keys.shard_of(made_up)


@pytest.mark.parametrize("shard", ["", "a}b", "-a", "A", "models", "keys", "a" * 64])
def test_a_shard_that_could_leave_its_tag_or_meet_other_keys_is_refused(shard: str) -> None:
    with pytest.raises(ValueError, match="shard"):
        keys.check_shard(shard)


def test_idempotency_keys_of_two_tenants_never_share_a_name() -> None:
    assert keys.idempotency_digest("a:b", "c") != keys.idempotency_digest("a", "b:c")
    assert keys.idempotency_digest("ab", "c") != keys.idempotency_digest("a", "bc")
