"""Clients that stop reading cost next to nothing, hinder nobody, are let go of, and find the rest when they return."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from common.errors import ClientTooSlow
from tests.builders_calls import Outcome, ended, events_of, idle_fleet, refused
from tests.builders_link import Link
from tests.builders_models import write_tiny_model
from tests.builders_system import Gateway, System, running_system, until
from torchrelay.client import AsyncClient
from torchrelay.client import channel as channels
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import generation_pb2_grpc as pb_grpc

MODEL = "tiny"
MAX_TOKENS = 600
ENDLESS = 16_000  # longer than any test
PROMPT = [3 + (7 * i) % 250 for i in range(20)]
# So little is taken in advance that the gateway's next write waits for the client.
SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
SEND_TIMEOUT_S = 1.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=1 << 14, eos_token_id=None
    )


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[System]:
    """An impatient gateway and one as it comes, whose connections are asked every second whether they live."""
    with running_system(tmp_path_factory.mktemp("system")) as system:
        system.add_gateway(TORCHRELAY_GATEWAY_SEND_TIMEOUT_S=str(SEND_TIMEOUT_S))
        system.add_gateway(TORCHRELAY_GATEWAY_KEEPALIVE_S="1", TORCHRELAY_GATEWAY_KEEPALIVE_TIMEOUT_S="1")
        system.add_worker(folder, MODEL)
        asyncio.run(system.ready(MODEL))
        yield system


@pytest.fixture
async def client(system: System) -> AsyncIterator[AsyncClient]:
    async with system.client(system.gateways[0]) as client:
        yield client


def stream_request(seed: int, grace_s: int = 0, max_tokens: int = MAX_TOKENS) -> pb.StreamGenerateRequest:
    request = pb.StreamGenerateRequest(
        model=MODEL,
        input=pb.GenerationInput(token_ids=pb.TokenIds(ids=PROMPT)),
        config=pb.GenerationConfig(max_tokens=max_tokens, temperature=1.0, seed=seed, logprobs=True),
    )
    request.disconnect_grace.FromSeconds(grace_s)
    return request


class SlowCaller:
    """A bare stub's stream over a connection with a small window, and what was read of it so far."""

    def __init__(self, channel: grpc.aio.Channel, client: AsyncClient, request: pb.StreamGenerateRequest) -> None:
        stub: Any = pb_grpc.GenerationServiceStub(channel)
        self.call = stub.StreamGenerate(request, metadata=client.metadata)
        self.outcome = Outcome(events_of(self.call))

    async def begin(self) -> None:
        """Read up to the first token, and stop reading; the call stays open."""
        async for event in self.outcome._events:
            self.outcome._take(event)
            if self.outcome.token_ids:
                return


async def has_been_let_go(gateway: Gateway, times: int) -> None:
    async def is_in_the_log() -> bool:
        return gateway.log().count('"call.too_slow"') >= times

    await until(is_in_the_log, what="the end of the slow call")


async def test_a_client_that_stops_reading_is_ended_and_finds_the_rest_in_the_log(
    system: System, client: AsyncClient
) -> None:
    gateway = system.gateways[0]
    before = gateway.log().count('"call.too_slow"')
    async with grpc.aio.insecure_channel(gateway.address, SMALL_WINDOW) as channel:
        slow = SlowCaller(channel, client, stream_request(1, grace_s=60))
        await slow.begin()
        # Neighbours are undisturbed: one on the same connection, one on another, with the worker's full attention.
        stub: Any = pb_grpc.GenerationServiceStub(channel)
        on_same = Outcome(events_of(stub.StreamGenerate(stream_request(2), metadata=client.metadata)))
        elsewhere = Outcome(events_of(client.generation.StreamGenerate(stream_request(3), metadata=client.metadata)))
        await asyncio.wait_for(asyncio.gather(on_same.read(), elsewhere.read()), 60)
        assert len(on_same.token_ids) == len(elsewhere.token_ids) == MAX_TOKENS
        await has_been_let_go(gateway, before + 1)
        # Now it reads on, and finds what was on its way, then why there is no more.
        with refused() as refusal:
            await slow.outcome.read()
    assert refusal.summary == (grpc.StatusCode.ABORTED, "CLIENT_TOO_SLOW", ClientTooSlow().message)
    assert 0 < len(slow.outcome.token_ids) < MAX_TOKENS
    behind = client.resume(slow.outcome.generation_id, slow.outcome.sequence, slow.outcome.chain_hash)
    rest = await Outcome.resumed(behind, slow.outcome).read()
    whole = await client.get(slow.outcome.generation_id)
    assert rest.token_ids == list(whole.outputs[0].token_ids)
    assert len(rest.token_ids) == MAX_TOKENS
    assert rest.output.text == whole.outputs[0].text
    assert rest.output.logprobs == list(whole.outputs[0].logprobs)


async def test_without_a_grace_the_generation_of_a_client_that_does_not_read_is_cancelled(
    system: System, client: AsyncClient
) -> None:
    gateway = system.gateways[0]
    before = gateway.log().count('"call.too_slow"')
    async with grpc.aio.insecure_channel(gateway.address, SMALL_WINDOW) as channel:
        slow = SlowCaller(channel, client, stream_request(4, max_tokens=ENDLESS))
        await slow.begin()
        generation_id = slow.outcome.generation_id
        await has_been_let_go(gateway, before + 1)
        assert (await ended(client, generation_id)).state == pb.GENERATION_STATE_CANCELLED
        await idle_fleet(system)


async def test_a_client_far_behind_reads_everything_once_in_few_messages(system: System, client: AsyncClient) -> None:
    gateway = system.gateways[1]
    async with grpc.aio.insecure_channel(gateway.address, SMALL_WINDOW) as channel:
        slow = SlowCaller(channel, client, stream_request(9))
        await slow.begin()

        async def is_far_behind() -> bool:
            found = await client.get(slow.outcome.generation_id)
            return found.state == pb.GENERATION_STATE_FINISHED

        await until(is_far_behind, 60, "the generation's end")
        num_before = len(slow.outcome.token_ids)
        num_messages = 0
        async for event in slow.outcome._events:
            slow.outcome._take(event)
            num_messages += 1
        whole = await client.get(slow.outcome.generation_id)
    assert slow.outcome.token_ids == list(whole.outputs[0].token_ids)
    assert slow.outcome.finished is not None
    assert len(slow.outcome.token_ids) == MAX_TOKENS
    assert num_messages < (MAX_TOKENS - num_before) / 10, "what waits comes in pages of the log"


async def test_a_connection_that_only_one_side_believes_in_ends_the_generation(
    system: System, client: AsyncClient
) -> None:
    gateway = system.gateways[1]
    with Link(gateway.address) as link:
        async with grpc.aio.insecure_channel(link.address) as channel:
            caller = SlowCaller(channel, client, stream_request(11, max_tokens=ENDLESS))
            await caller.begin()
            link.freeze()
            generation = await ended(client, caller.outcome.generation_id)
            await idle_fleet(system)
            link.thaw()
    assert generation.state == pb.GENERATION_STATE_CANCELLED


async def test_our_client_goes_on_by_itself_when_its_caller_was_too_slow(
    system: System, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = system.gateways[0]
    before = gateway.log().count('"call.too_slow"')
    monkeypatch.setattr(channels, "OPTIONS", (*channels.OPTIONS, *SMALL_WINDOW))
    async with system.client(gateway) as slow:
        stream = slow.stream(PROMPT, model=MODEL, max_tokens=MAX_TOKENS, temperature=1.0, seed=12)
        outcome = Outcome(stream)
        async for event in outcome._events:
            outcome._take(event)
            if len(outcome.token_ids) in range(1, 20):
                await has_been_let_go(gateway, before + 1)  # the caller does something else for so long
        whole = await client.get(outcome.generation_id)
    assert outcome.token_ids == list(whole.outputs[0].token_ids)
    assert len(outcome.token_ids) == MAX_TOKENS
    assert stream.position.num_resumes == 1
