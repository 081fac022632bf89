"""Both clients, over a socket: wherever a stream breaks, the caller gets every event once."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.torchrelay.toy import GENERATION_ID, KEY, Break, Failure, Toy, digest, serving, words
from torchrelay.client import AsyncClient, Client, RelayError, RetryPolicy
from torchrelay.v1 import generation_pb2 as pb

FAST = RetryPolicy(initial_delay_s=0.0005, max_delay_s=0.001)
STUBBORN = RetryPolicy(initial_delay_s=0.02, max_delay_s=0.02)
IMPATIENT = RetryPolicy(initial_delay_s=0.001, max_delay_s=0.01, give_up_after_s=0.1, first_contact_s=0.1)

# What a dying gateway, a proxy or a broken connection looks like to a client.
_BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
)
breaks = st.lists(st.builds(Break, st.integers(0, 8), st.none() | st.sampled_from(_BROKEN).map(Failure)), max_size=8)

Reader = Callable[[Toy, RetryPolicy], list[pb.GenerationEvent]]


def read_blocking(toy: Toy, policy: RetryPolicy) -> list[pb.GenerationEvent]:
    with Client(toy.address, api_key=KEY, retry=policy) as client:
        return list(client.stream("hi", model="tiny", max_tokens=5))


def read_async(toy: Toy, policy: RetryPolicy) -> list[pb.GenerationEvent]:
    async def read() -> list[pb.GenerationEvent]:
        async with AsyncClient(toy.address, api_key=KEY, retry=policy) as client:
            return [event async for event in client.stream("hi", model="tiny", max_tokens=5)]

    return asyncio.run(read())


def check_requests(toy: Toy) -> None:
    """The first request is repeated with its key until it is accepted; later ones go on where the last call ended."""
    first = toy.requests[0]
    assert first.model == "tiny"
    assert first.config.max_tokens == 5
    assert first.idempotency_key
    assert toy.keys == [f"Bearer {KEY}"] * len(toy.requests)
    kinds = [type(request).__name__ for request in toy.requests]
    num_starts = kinds.count("StreamGenerateRequest")
    assert kinds == ["StreamGenerateRequest"] * num_starts + ["ResumeGenerationRequest"] * (len(kinds) - num_starts)
    assert all(request == first for request in toy.requests[:num_starts])
    position = 0
    for request in toy.requests[num_starts:]:
        assert request.generation_id == GENERATION_ID
        assert request.after_sequence >= position
        assert request.chain_hash == digest(request.after_sequence)
        position = request.after_sequence


@pytest.mark.parametrize("read", [read_blocking, read_async])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(broken=breaks, num_events=st.integers(0, 6))
def test_a_stream_that_breaks_anywhere_is_delivered_once(
    toy: Toy, read: Reader, broken: list[Break], num_events: int
) -> None:
    toy.reset()
    toy.log, toy.breaks = words(num_events), list(broken)
    events = read(toy, FAST)
    assert [event.WhichOneof("event") for event in events] == ["accepted", *["deltas"] * num_events, "finished"]
    assert events[1:] == toy.log
    check_requests(toy)


@pytest.mark.parametrize("read", [read_blocking, read_async])
@pytest.mark.parametrize(
    "failure",
    [
        Failure(grpc.StatusCode.INTERNAL, "WORKER_FAILED"),
        Failure(grpc.StatusCode.ABORTED, "SUPERSEDED"),
        Failure(grpc.StatusCode.ABORTED, "RESULT_LOST"),
        Failure(grpc.StatusCode.INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE"),
        Failure(grpc.StatusCode.DEADLINE_EXCEEDED),
        Failure(grpc.StatusCode.RESOURCE_EXHAUSTED),
        Failure(grpc.StatusCode.PERMISSION_DENIED),
    ],
    ids=lambda failure: f"{failure.code.name}-{failure.reason}",
)
@pytest.mark.parametrize("after", [0, 3])
def test_what_the_server_refuses_is_not_tried_again(toy: Toy, read: Reader, failure: Failure, after: int) -> None:
    toy.breaks = [Break(after, failure)]
    with pytest.raises(RelayError) as raised:
        read(toy, FAST)
    assert (raised.value.code, raised.value.reason) == (failure.code, failure.reason)
    assert raised.value.generation_id == (GENERATION_ID if after else "")
    assert len(toy.requests) == 1


@pytest.mark.parametrize("read", [read_blocking, read_async])
def test_a_server_that_always_breaks_is_given_up(toy: Toy, read: Reader) -> None:
    toy.breaks = [Break(0)] * 100_000
    with pytest.raises(RelayError) as raised:
        read(toy, IMPATIENT)
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE
    assert len(toy.requests) > 3


@pytest.mark.parametrize("read", [read_blocking, read_async])
def test_a_server_that_accepts_and_always_breaks_is_given_up(toy: Toy, read: Reader) -> None:
    toy.breaks = [Break(1)] * 100_000
    with pytest.raises(RelayError) as raised:
        read(toy, IMPATIENT)
    assert raised.value.generation_id == GENERATION_ID


def test_a_server_that_is_not_there_is_an_error_in_time(toy: Toy) -> None:
    with Client("127.0.0.1:1", retry=IMPATIENT) as client, pytest.raises(RelayError) as raised:
        client.models()
    assert raised.value.is_connection_loss


def test_a_stream_is_read_as_text_and_can_be_left(toy: Toy) -> None:
    with Client(toy.address, retry=FAST) as client:
        assert "".join(client.stream("hi", model="tiny").text()) == "w0 w1 w2 w3 w4 "
        toy.reset()
        stream = client.stream("hi", model="tiny")
        for piece in stream.text():
            assert piece == "w0 "
            break
        assert (stream.generation_id, stream.position.sequence) == (GENERATION_ID, 1)
        rest = client.resume(GENERATION_ID, 1, digest(1))
        assert "".join(rest.text()) == "w1 w2 w3 w4 "
        assert "".join(client.resume(GENERATION_ID).text(output_index=1)) == ""


async def test_the_asynchronous_client_reads_text_and_resumes(toy: Toy) -> None:
    toy.breaks = [Break(3)]
    async with AsyncClient(toy.address, retry=FAST) as client:
        assert "".join([piece async for piece in client.stream("hi", model="tiny").text()]) == "w0 w1 w2 w3 w4 "
        assert [event.sequence async for event in client.resume(GENERATION_ID, 4, digest(4))] == [5, 6]


async def test_unary_calls_are_repeated_after_broken_connections_alone(toy: Toy) -> None:
    toy.models.append(toy.models[0])
    toy.failures = [Failure(grpc.StatusCode.UNAVAILABLE), Failure(grpc.StatusCode.UNAVAILABLE, "BACKEND_UNAVAILABLE")]
    with Client(toy.address, retry=FAST) as client:
        assert [model.name for model in client.models()] == ["tiny", "tiny"]
        assert client.get("g").generation_id == "g"
        assert client.cancel("g") == pb.GENERATION_STATE_CANCELLED
        toy.failures = [Failure(grpc.StatusCode.NOT_FOUND, "REQUEST_NOT_FOUND")]
        with pytest.raises(RelayError, match="REQUEST_NOT_FOUND: what happened"):
            client.get("g")
    toy.failures = [Failure(grpc.StatusCode.UNAVAILABLE)]
    async with AsyncClient(toy.address, retry=FAST) as client_aio:
        assert len(await client_aio.models()) == 2
        assert (await client_aio.get("g")).generation_id == "g"
        assert await client_aio.cancel("g") == pb.GENERATION_STATE_CANCELLED


@pytest.mark.parametrize("read", [read_blocking, read_async])
def test_a_full_queue_is_waited_for(toy: Toy, read: Reader) -> None:
    delay = Duration()
    delay.FromMilliseconds(20)
    info = error_details_pb2.RetryInfo(retry_delay=delay)
    full = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", details=[info])
    toy.breaks = [Break(0, full), Break(0, full)]
    assert [event.WhichOneof("event") for event in read(toy, FAST)] == ["accepted", *["deltas"] * 5, "finished"]
    assert len({request.idempotency_key for request in toy.requests}) == 1
    assert len(toy.requests) == 3


@pytest.mark.parametrize("read", [read_blocking, read_async])
def test_another_address_is_called_when_one_breaks(toy: Toy, read: Reader) -> None:
    """The second knows the generation too: both would read it from one log."""
    with serving() as second:
        address = toy.address
        toy.always = Failure(grpc.StatusCode.UNAVAILABLE)
        toy.address = f"ipv4:127.0.0.1:1,{address},{second.address}"
        events = read(toy, FAST)
        toy.address = address
    assert [event.WhichOneof("event") for event in events] == ["accepted", *["deltas"] * 5, "finished"]


@pytest.fixture
def hanging(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    """A toy whose streams say nothing after Accepted."""
    released = threading.Event()

    def hang(after: int, context: Any, *, replayed: bool) -> Iterator[pb.GenerationEvent]:
        yield pb.GenerationEvent(accepted=pb.Accepted(generation_id=GENERATION_ID))
        released.wait(10)

    monkeypatch.setattr(toy, "_stream", hang)
    yield toy
    released.set()


def read_until_closed(address: str) -> RelayError:
    client = Client(address, retry=STUBBORN)
    events = iter(client.stream("hi", model="tiny"))
    assert next(events).HasField("accepted")
    threading.Timer(0.1, client.close).start()
    with pytest.raises(RelayError) as raised:
        list(events)
    with pytest.raises(RelayError, match="the client was closed"):
        client.models()
    return raised.value


def read_until_closed_async(address: str) -> RelayError:
    async def run() -> RelayError:
        client = AsyncClient(address, retry=STUBBORN)

        async def read() -> None:
            async for _ in client.stream("hi", model="tiny"):
                pass

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        await client.close()
        with pytest.raises(RelayError) as raised:
            await asyncio.wait_for(reading, 5)
        with pytest.raises(RelayError, match="the client was closed"):
            await client.models()
        return raised.value

    return asyncio.run(run())


@pytest.mark.parametrize("read", [read_until_closed, read_until_closed_async])
def test_a_closed_client_tries_nothing_again(toy: Toy, read: Callable[[str], RelayError]) -> None:
    toy.breaks = [Break(2), *[Break(0)] * 1000]
    assert read(toy.address).code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


@pytest.mark.parametrize("read", [read_until_closed, read_until_closed_async])
def test_a_client_that_is_closed_while_it_reads_says_so(hanging: Toy, read: Callable[[str], RelayError]) -> None:
    assert read(hanging.address).code is grpc.StatusCode.CANCELLED


async def test_generate_waits_for_the_end_and_returns_the_whole(toy: Toy) -> None:
    toy.breaks = [Break(2), Break(3)]
    with Client(toy.address, retry=FAST) as client:
        assert client.generate("hi", model="tiny").generation_id == GENERATION_ID
    toy.reset()
    async with AsyncClient(toy.address, retry=FAST) as client_aio:
        assert (await client_aio.generate("hi", model="tiny")).generation_id == GENERATION_ID


def test_a_call_goes_on_for_half_a_minute_without_its_client(toy: Toy) -> None:
    with Client(toy.address, retry=FAST) as client:
        list(client.stream("hi", model="tiny", time_limit_s=1.5, idempotency_key="mine", temperature=0, stop=["x"]))
    (request,) = toy.requests
    assert request.disconnect_grace.ToSeconds() == 30
    assert request.time_limit.ToMilliseconds() == 1500
    assert request.idempotency_key == "mine"
    assert request.config == pb.GenerationConfig(temperature=0, stop=["x"])


def test_random_breaks_far_apart_do_not_wear_the_client_out(toy: Toy) -> None:
    """Each new event gives the full patience again."""
    rng = random.Random(3)
    toy.log = words(60)
    toy.breaks = [Break(rng.choice((2, 3))) for _ in range(50)]
    with Client(toy.address, retry=IMPATIENT) as client:
        stream = client.stream("hi", model="tiny")
        assert [event.sequence for event in stream] == list(range(62))
    assert stream.position.num_resumes == len(toy.requests) - 1
