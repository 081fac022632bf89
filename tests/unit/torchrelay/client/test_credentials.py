"""What calls bear: a key or a token, fresh at each call; and certificates that come whole."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.unit.torchrelay.toy import KEY, Break, Toy
from torchrelay.client import AsyncClient, Client, RetryPolicy, Tls

FAST = RetryPolicy(initial_delay_s=0.0005, max_delay_s=0.001)


class Tokens:
    """A new token for every call."""

    def __init__(self) -> None:
        self._numbers: Iterator[int] = count(1)

    def __call__(self) -> str:
        return f"token-{next(self._numbers)}"


def call_blocking(toy: Toy, **credentials: Any) -> None:
    with Client(toy.address, retry=FAST, **credentials) as client:
        list(client.stream("hi", model="tiny", max_tokens=5))
        client.models()


def call_async(toy: Toy, **credentials: Any) -> None:
    async def call() -> None:
        async with AsyncClient(toy.address, retry=FAST, **credentials) as client:
            async for _ in client.stream("hi", model="tiny", max_tokens=5):
                pass
            await client.models()

    asyncio.run(call())


@pytest.mark.parametrize("call", [call_blocking, call_async])
def test_a_token_is_asked_for_at_every_call_and_every_resume(toy: Toy, call: Any) -> None:
    toy.breaks = [Break(0), Break(3)]
    call(toy, token=Tokens())
    assert toy.keys == [f"Bearer token-{number}" for number in (1, 2, 3, 4)]


@pytest.mark.parametrize("call", [call_blocking, call_async])
@pytest.mark.parametrize(
    ("credentials", "sent"),
    [
        ({"token": "a.b.c"}, "Bearer a.b.c"),
        ({"api_key": KEY}, f"Bearer {KEY}"),
        ({}, ""),
        ({"token": lambda: ""}, ""),
    ],
    ids=range(4),
)
def test_what_is_sent(toy: Toy, call: Any, credentials: dict[str, Any], sent: str) -> None:
    call(toy, **credentials)
    assert toy.keys == [sent, sent]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_key_and_a_token_are_one_too_many(kind: Any) -> None:
    with pytest.raises(ValueError, match="not both"):
        kind("127.0.0.1:1", api_key=KEY, token="a.b.c")


def test_what_a_token_s_function_raises_reaches_the_caller(toy: Toy) -> None:
    def broken() -> str:
        raise LookupError("no token")

    with Client(toy.address, retry=FAST, token=broken) as client, pytest.raises(LookupError, match="no token"):
        client.models()
    assert toy.requests == []


@pytest.mark.parametrize("files", [{"cert_file": "x"}, {"key_file": "x"}], ids=range(2))
def test_half_a_pair_is_refused(files: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="belong together"):
        Tls(**files).credentials()


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        Tls(ca_file=str(tmp_path / "absent")).credentials()


def test_a_whole_pair_makes_credentials(tmp_path: Path) -> None:
    for name in ("cert", "key"):
        (tmp_path / name).write_text("")
    made = Tls(cert_file=str(tmp_path / "cert"), key_file=str(tmp_path / "key")).credentials()
    assert isinstance(made, grpc.ChannelCredentials)
