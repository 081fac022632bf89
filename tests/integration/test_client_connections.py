"""Connections that break between a client and its gateway: every event once, in order, whatever the network does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import reference
from tests.builders_calls import idle_fleet
from tests.builders_link import Link
from tests.builders_models import write_tiny_model
from tests.builders_system import System, gateway_and_worker
from torchrelay.client import AsyncClient, Client, RetryPolicy
from torchrelay.client import channel as channels
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"
MAX_TOKENS = 400
PROMPT = [3 + (7 * i) % 250 for i in range(9)]
QUICK = RetryPolicy(initial_delay_s=0.01, max_delay_s=0.1, give_up_after_s=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=2048, eos_token_id=None)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    return reference.generate(reference.load_reference(folder), PROMPT, MAX_TOKENS, [])


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[System]:
    with gateway_and_worker(tmp_path_factory.mktemp("system"), folder, MODEL) as system:
        yield system


@pytest.fixture
def link(system: System) -> Iterator[Link]:
    with Link(system.gateways[0].address) as link:
        yield link


class Received:
    """What a caller got, held to the law on the way."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.kinds: list[str | None] = []
        self.num_resumes = 0
        self.replayed = False

    def take(self, event: pb.GenerationEvent) -> None:
        assert "finished" not in self.kinds, "an event after the end"
        self.kinds.append(event.WhichOneof("event"))
        self.replayed = self.replayed or event.accepted.replayed
        for delta in event.deltas.deltas:
            assert delta.first_token_index == len(self.token_ids), "a gap or a repetition"
            self.token_ids += delta.token_ids


OnEvent = Callable[[Received], None]
Reader = Callable[[System, str, OnEvent], Received]


def read_blocking(system: System, address: str, on_event: OnEvent) -> Received:
    received = Received()
    with Client(address, api_key=system.key, retry=QUICK) as client:
        assert client.models()
        on_event(received)  # connected, nothing asked for yet
        stream = client.stream(PROMPT, model=MODEL, max_tokens=MAX_TOKENS, temperature=0)
        for event in stream:
            received.take(event)
            on_event(received)
        received.num_resumes = stream.position.num_resumes
    return received


def read_async(system: System, address: str, on_event: OnEvent) -> Received:
    async def read() -> Received:
        received = Received()
        async with AsyncClient(address, api_key=system.key, retry=QUICK) as client:
            assert await client.models()
            on_event(received)
            stream = client.stream(PROMPT, model=MODEL, max_tokens=MAX_TOKENS, temperature=0)
            async for event in stream:
                received.take(event)
                await asyncio.to_thread(on_event, received)
            received.num_resumes = stream.position.num_resumes
        return received

    return asyncio.run(read())


BOTH = pytest.mark.parametrize("read", [read_blocking, read_async])


@BOTH
def test_connections_that_are_reset_again_and_again_are_not_seen(
    system: System, link: Link, read: Reader, expected: list[int]
) -> None:
    left = [10, 60, 61, 150, 300]

    def reset(received: Received) -> None:
        if left and len(received.token_ids) >= left[0]:
            left.pop(0)
            link.reset()

    received = read(system, link.address, reset)
    assert received.token_ids == expected
    assert received.kinds.count("accepted") == received.kinds.count("finished") == 1
    assert left == []
    assert received.num_resumes >= 2, "resets that came after the last byte change nothing"


@BOTH
def test_a_connection_that_falls_silent_is_left_for_another(
    system: System, link: Link, read: Reader, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"grpc.keepalive_time_ms": 1000, "grpc.keepalive_timeout_ms": 1000, "grpc.http2.ping_timeout_ms": 1000}
    monkeypatch.setattr(channels, "OPTIONS", tuple({**dict(channels.OPTIONS), **quick}.items()))
    thaw = threading.Timer(8.0, link.thaw)  # after the connection was given up: old bytes come late, to nobody

    def freeze(received: Received) -> None:
        if len(received.token_ids) >= 20 and not thaw.is_alive() and not thaw.finished.is_set():
            link.freeze()
            thaw.start()

    received = read(system, link.address, freeze)
    assert received.token_ids == expected
    assert received.num_resumes >= 1


@BOTH
def test_an_answer_that_is_lost_with_its_connection_makes_no_second_generation(
    system: System, link: Link, read: Reader, expected: list[int]
) -> None:
    before = num_completion_tokens(system)
    cut = threading.Timer(1.0, link.reset)  # long after the request has arrived

    def swallow(received: Received) -> None:
        if not received.kinds:
            link.swallow()
            cut.start()

    received = read(system, link.address, swallow)
    assert received.token_ids == expected
    assert received.replayed, "the same request came twice"
    assert num_completion_tokens(system, before + MAX_TOKENS) - before == MAX_TOKENS


def num_completion_tokens(system: System, least: int = 0) -> int:
    """Of all workers since their start, once they are idle and tell of so many."""

    async def ask() -> int:
        return sum(worker.generated_tokens for worker in await idle_fleet(system, least))

    return asyncio.run(ask())
