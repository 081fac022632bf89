"""The issuer's keys: how often they are fetched, and what serves while nobody answers (row 44 of the fault table)."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import Unavailable
from gateway.identity.fetching import FetchError, discover, fetch_json, source_of_keys
from gateway.identity.jwks import KeySet, KeySetTimes
from tests.builders_identity import Authority, Issuer, KeyServer, running_key_server

ISSUING = Issuer()
TIMES = KeySetTimes(cache_s=600, max_stale_s=3600, refetch_s=30)


class Source:
    """A key server by hand."""

    def __init__(self) -> None:
        self.num_fetches = 0
        self.keys: Any = ISSUING.key_set()
        self.now = 0.0

    def __call__(self) -> Any:
        self.num_fetches += 1
        if isinstance(self.keys, Exception):
            raise self.keys
        return self.keys

    def key_set(self) -> KeySet:
        return KeySet(self, TIMES, monotonic=lambda: self.now)


async def settle() -> None:
    """Let a fetch that runs aside come to its end."""
    own = asyncio.current_task()
    await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not own))


async def test_keys_are_fetched_once_for_all_who_ask_at_the_same_time() -> None:
    source = Source()
    keys = source.key_set()
    found = await asyncio.gather(*(keys.find(key_id) for key_id in ("rsa", "ec", "ed") * 20))
    assert all(key is not None for key in found)
    assert source.num_fetches == 1


async def test_a_fetch_that_runs_ends_with_its_owner_and_none_begins_afterwards() -> None:
    go_on = threading.Event()
    began = threading.Event()

    def hanging() -> Any:
        began.set()
        go_on.wait(20)
        return ISSUING.key_set()

    keys = KeySet(hanging, TIMES)
    asking = asyncio.create_task(keys.find("ec"))
    await asyncio.to_thread(began.wait, 20)
    asking.cancel()  # the fetch goes on, for whoever else asks
    await asyncio.wait([asking])
    assert len(asyncio.all_tasks()) == 2
    await keys.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    with pytest.raises(Unavailable):
        await keys.find("ec")
    assert asyncio.all_tasks() == {asyncio.current_task()}
    go_on.set()


async def test_unknown_ids_cause_at_most_one_fetch_in_30_seconds() -> None:
    source = Source()
    keys = source.key_set()
    await keys.find("ec")
    for second in range(300):
        source.now = float(second)
        assert await asyncio.gather(*(keys.find(f"unknown-{second}-{i}") for i in range(10))) == [None] * 10
    assert source.num_fetches == 10


async def test_a_new_key_is_found_as_soon_as_one_may_ask() -> None:
    source = Source()
    keys = source.key_set()
    await keys.find("ec")
    rotated = Issuer(keys={"new": ISSUING.keys["ec"]})
    source.keys = rotated.key_set()
    source.now = 29.9
    assert await keys.find("new") is None
    source.now = 30
    assert await keys.find("new") is not None
    assert await keys.find("ec") is None, "a key that the issuer took back still counts"


async def test_old_keys_are_fetched_again_beside_the_calls_that_they_serve() -> None:
    source = Source()
    keys = source.key_set()
    await keys.find("ec")
    source.now = TIMES.cache_s
    source.keys = FetchError("down")
    assert await keys.find("ec") is not None
    await settle()
    assert source.num_fetches == 2
    source.now += 29
    assert await keys.find("ec") is not None
    await settle()
    assert source.num_fetches == 2


@pytest.mark.parametrize(
    "broken", [FetchError("down"), RuntimeError("bug"), {"keys": []}, [], {"keys": [{}]}], ids=repr
)
async def test_while_the_issuer_fails_known_keys_serve_until_they_are_too_old(broken: Any) -> None:
    source = Source()
    keys = source.key_set()
    await keys.find("ec")
    source.keys = broken
    for source.now in (601.0, 1800.0, TIMES.max_stale_s - 1):
        assert await keys.find("ec") is not None
        assert await keys.find("other") is None
        await settle()
    source.now = TIMES.max_stale_s
    with pytest.raises(Unavailable):
        await keys.find("ec")
    source.keys = ISSUING.key_set()
    source.now += 30
    assert await keys.find("ec") is not None


async def test_without_any_keys_the_issuer_is_asked_as_rarely() -> None:
    source = Source()
    source.keys = FetchError("down")
    keys = source.key_set()
    for second in range(60):
        source.now = float(second)
        with pytest.raises(Unavailable) as caught:
            await keys.find("ec")
        assert (caught.value.reason, caught.value.retry_after_ms) == ("IDENTITY_UNAVAILABLE", 1000)
    assert source.num_fetches == 2


async def test_a_caller_that_leaves_takes_nobody_s_fetch_along() -> None:
    source = Source()
    keys = source.key_set()
    waiting = [asyncio.create_task(keys.find("ec")) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    assert await waiting[1] is not None
    assert source.num_fetches == 1


@pytest.fixture
def server() -> Iterator[KeyServer]:
    with running_key_server() as running:
        running.documents["/keys"] = ISSUING.key_set()
        yield running


async def test_keys_come_over_http_from_loopback_without_stopping_the_loop(server: KeyServer) -> None:
    keys = KeySet(source_of_keys(issuer="x", url=f"{server.url}/keys"), replace(TIMES, refetch_s=0))
    assert await keys.find("ec") is not None
    server.status = 500
    assert await keys.find("unknown") is None
    assert len(server.paths) == 2
    assert await keys.find("ec") is not None


def test_an_issuer_says_where_its_keys_are(server: KeyServer) -> None:
    where = "/realm/.well-known/openid-configuration"
    server.documents[where] = {"issuer": f"{server.url}/realm", "jwks_uri": f"{server.url}/keys"}
    assert source_of_keys(issuer=f"{server.url}/realm")() == ISSUING.key_set()
    assert server.paths == [where, "/keys"]


@pytest.mark.parametrize(
    "document",
    [
        {"issuer": "https://evil.example", "jwks_uri": "https://evil.example/keys"},
        {"issuer": "SELF"},
        {"issuer": "SELF", "jwks_uri": 7},
        [],
    ],
    ids=range(4),
)
def test_another_issuer_s_discovery_document_is_refused(server: KeyServer, document: Any) -> None:
    if isinstance(document, dict) and document["issuer"] == "SELF":
        document["issuer"] = server.url
    server.documents["/.well-known/openid-configuration"] = document
    with pytest.raises(FetchError):
        discover(server.url, 5)


@pytest.mark.parametrize(
    "uri", ["http://issuer.example/keys", "file:///etc/passwd", "ftp://127.0.0.1/x", "http://u:p@127.0.0.1/"]
)
def test_discovery_leads_nowhere_but_over_tls(server: KeyServer, uri: str) -> None:
    server.documents["/.well-known/openid-configuration"] = {"issuer": server.url, "jwks_uri": uri}
    with pytest.raises(FetchError, match="neither https nor on loopback"):
        source_of_keys(issuer=server.url)()


def test_redirects_are_not_followed(server: KeyServer) -> None:
    server.status, server.headers = 302, {"Location": f"{server.url}/elsewhere"}
    with pytest.raises(FetchError, match="302"):
        fetch_json(f"{server.url}/keys", 5)
    assert server.paths == ["/keys"]


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000, b" " * (1 << 20) + b"{}"], ids=range(4))
def test_a_body_that_is_none_is_an_error(server: KeyServer, body: bytes, tmp_path: Path) -> None:
    server.documents["/keys"] = body
    with pytest.raises(FetchError):
        fetch_json(f"{server.url}/keys", 5)
    (tmp_path / "keys").write_bytes(body)
    with pytest.raises(FetchError):
        source_of_keys(issuer="x", file=tmp_path / "keys")()


def test_nobody_there_is_an_error(tmp_path: Path) -> None:
    with running_key_server() as gone:
        pass
    with pytest.raises(FetchError):
        fetch_json(gone.url, 5)
    with pytest.raises(FetchError):
        source_of_keys(issuer="x", file=tmp_path / "absent")()


def test_keys_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(json.dumps(ISSUING.key_set()))
    assert source_of_keys(issuer="x", file=tmp_path / "keys.json")() == ISSUING.key_set()


def test_keys_come_over_tls_from_whom_the_authority_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    authority = Authority()
    files = authority.issue(hosts=("127.0.0.1",)).write(tmp_path, "server")
    ca_file = authority.write(tmp_path)
    with running_key_server(files) as server:
        server.documents["/keys"] = ISSUING.key_set()
        assert source_of_keys(issuer="x", url=f"{server.url}/keys", ca_file=ca_file)() == ISSUING.key_set()
        with pytest.raises(FetchError):
            fetch_json(f"{server.url}/keys", 5)
        with pytest.raises(FetchError):
            fetch_json(f"{server.url}/keys".replace("127.0.0.1", "localhost"), 5, ca_file)
    capsys.readouterr()  # the server complains of handshakes that were broken off
