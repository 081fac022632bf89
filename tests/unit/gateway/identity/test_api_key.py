"""The key of a call's metadata."""

from __future__ import annotations

import pytest

from common.errors import Unauthenticated
from gateway.identity.api_key import api_key_of


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", "Bearer tr_key")],
        [("authorization", "bearer   tr_key ")],
        [("x-api-key", " tr_key ")],
        [("x-api-key", "another"), ("authorization", "Bearer tr_key")],
        [("x-api-key", "tr_key"), ("authorization", "Bearer another.kind.of-token")],
        [("user-agent", "x"), ("trace-bin", b"\x00"), ("x-api-key", "tr_key")],
    ],
)
def test_a_key_is_found(metadata: list[tuple[str, str | bytes]]) -> None:
    assert api_key_of(metadata) == "tr_key"


@pytest.mark.parametrize(
    "metadata", [[], [("x-api-key", "  ")], [("authorization", "Bearer another.kind.of-token")]], ids=repr
)
def test_a_call_without_a_key_has_none(metadata: list[tuple[str, str | bytes]]) -> None:
    assert api_key_of(metadata) == ""


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", "Bearer")],
        [("authorization", "Bearer  ")],
        [("authorization", "tr_key")],
        [("authorization", "Basic dXNlcg=="), ("x-api-key", "tr_key")],
        [("x-api-key", "k" * 513)],
        [("authorization", "Bearer tr_" + "k" * 4000)],
        [("authorization", "Bearer " + "k" * 9000)],
    ],
    ids=range(7),
)
def test_what_is_no_key_is_refused(metadata: list[tuple[str, str | bytes]]) -> None:
    with pytest.raises(Unauthenticated) as raised:
        api_key_of(metadata)
    assert raised.value.reason == "CREDENTIALS_INVALID"
    assert "kkk" not in raised.value.message
