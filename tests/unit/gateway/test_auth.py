"""The key of a call's metadata."""

from __future__ import annotations

import pytest

from common.errors import Unauthenticated
from gateway.auth import api_key_of


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", "Bearer tr_key")],
        [("authorization", "bearer   tr_key ")],
        [("x-api-key", " tr_key ")],
        [("x-api-key", "another"), ("authorization", "Bearer tr_key")],
        [("user-agent", "x"), ("trace-bin", b"\x00"), ("x-api-key", "tr_key")],
    ],
)
def test_a_key_is_found(metadata: list[tuple[str, str | bytes]]) -> None:
    assert api_key_of(metadata) == "tr_key"


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ([], "CREDENTIALS_MISSING"),
        ([("x-api-key", "  ")], "CREDENTIALS_MISSING"),
        ([("authorization", "Bearer")], "CREDENTIALS_INVALID"),
        ([("authorization", "Bearer  ")], "CREDENTIALS_INVALID"),
        ([("authorization", "tr_key")], "CREDENTIALS_INVALID"),
        ([("authorization", "Basic dXNlcg=="), ("x-api-key", "tr_key")], "CREDENTIALS_INVALID"),
        ([("x-api-key", "k" * 513)], "CREDENTIALS_INVALID"),
        ([("authorization", "Bearer " + "k" * 4000)], "CREDENTIALS_INVALID"),
    ],
)
def test_anything_else_is_refused(metadata: list[tuple[str, str | bytes]], reason: str) -> None:
    with pytest.raises(Unauthenticated) as raised:
        api_key_of(metadata)
    assert raised.value.reason == reason
    assert "kkk" not in raised.value.message
