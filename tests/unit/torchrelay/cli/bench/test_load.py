"""The loops against a gateway on a socket, which answers, stalls and fails as it is told."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from itertools import islice, repeat
from typing import Any

import grpc
import pytest

from tests.unit.torchrelay.toy import Break, Failure, Toy, serving
from torchrelay.cli.bench.load import Caller, Connections
from torchrelay.cli.bench.workload import Request
from torchrelay.client import AsyncClient, RetryPolicy
from torchrelay.v1 import generation_pb2 as pb

REQUEST = Request("hello", 9)


def connections_to(toy: Toy, most_calls: int = 200) -> Connections:
    """Connections whose clients take a refusal for one, and come back to a broken stream soon."""
    retry = RetryPolicy(initial_delay_s=0.001, first_contact_s=0.0)
    return Connections(lambda number: AsyncClient(toy.address, retry=retry, options=[("n", number)]), most_calls)


@pytest.fixture
async def connections(toy: Toy) -> AsyncIterator[Connections]:
    async with connections_to(toy) as pool:
        yield pool


class StallingToy(Toy):
    """Answers nobody before so many have asked."""

    def __init__(self, num_waiting: int) -> None:
        super().__init__()
        self._all_there = threading.Barrier(num_waiting, timeout=30)

    def StreamGenerate(self, request: Any, context: Any) -> Iterator[pb.StreamGenerateResponse]:  # noqa: N802
        self._all_there.wait()
        yield from super().StreamGenerate(request, context)


async def test_callers_take_turns_until_all_is_asked(toy: Toy, connections: Connections) -> None:
    ended: list[int] = []
    caller = Caller(connections, "tiny", ignore_eos=True, on_end=lambda: ended.append(1))
    run = await caller.closed(3, repeat(REQUEST, 7))
    assert (len(run.samples), len(ended), len(toy.requests)) == (7, 7, 7)
    assert run.peak_in_flight <= 3
    assert {(request.model, request.config.max_tokens, request.config.ignore_eos) for request in toy.requests} == {
        ("tiny", 9, True)
    }
    assert len({request.cache_salt for request in toy.requests}) == 1
    for sample in run.samples:
        assert (sample.num_tokens, sample.input_tokens, sample.cached_input_tokens) == (5, 3, 1)
        assert (sample.queue_s, sample.num_resumes, sample.lag_s) == (0.002, 0, pytest.approx(0, abs=1))
        assert 0 <= sample.first_token_s <= sample.total_s <= run.elapsed_s
        assert sum(gap for gap, _ in sample.messages) <= sample.total_s


async def test_levels_do_not_find_each_other_s_prefixes(toy: Toy, connections: Connections) -> None:
    for _ in range(2):
        await Caller(connections, "tiny").closed(1, [REQUEST])
    first, second = toy.requests
    assert len(first.cache_salt) == len(second.cache_salt) == 16
    assert first.cache_salt != second.cache_salt


async def test_callers_begin_nothing_after_their_time(toy: Toy, connections: Connections) -> None:
    run = await Caller(connections, "tiny").closed(2, repeat(REQUEST), duration_s=0.0)
    assert len(run.samples) == 2
    assert len(toy.requests) == 2


async def test_arrivals_do_not_wait_for_a_service_that_stalls() -> None:
    """A closed loop of one caller would ask once and then wait for ever."""
    arrivals = [0.0, 0.05, 0.1, 0.15, 0.2, 0.25]
    with serving(StallingToy(len(arrivals))) as toy:
        async with connections_to(toy) as pool:
            run = await Caller(pool, "tiny").open(20.0, arrivals, repeat(REQUEST))
    assert (len(run.samples), run.peak_in_flight) == (6, 6)
    by_arrival = sorted(run.samples, key=lambda sample: sample.intended_s)
    assert [sample.intended_s for sample in by_arrival] == pytest.approx(arrivals)
    for sample, arrival in zip(by_arrival, arrivals, strict=True):
        # The stall ended with the last arrival: each waited at least until then, and the first longest.
        assert sample.first_token_s >= arrivals[-1] - arrival
        assert sample.total_s >= sample.first_token_s


async def test_latency_counts_from_the_moment_that_was_meant(toy: Toy, connections: Connections) -> None:
    """A generator that is seconds late does not make its requests look fast: coordinated omission."""
    run = await Caller(connections, "tiny").open(2.0, [-5.0, -3.0], repeat(REQUEST))
    early, late = sorted(run.samples, key=lambda sample: sample.intended_s)
    for sample, delay in ((early, 5.0), (late, 3.0)):
        assert sample.lag_s >= delay
        assert sample.first_token_s >= delay
        assert sample.total_s >= sample.first_token_s
    assert run.is_generator_bound()
    assert run.report()["generator"]["late_send_ms"]["p99"] >= 5000


async def test_tokens_that_come_together_are_one_message(toy: Toy, connections: Connections) -> None:
    def event(sequence: int, *counts: int) -> pb.GenerationEvent:
        deltas = [pb.Delta(token_ids=range(count), text="x") for count in counts]
        return pb.GenerationEvent(sequence=sequence, chain_hash=b"x" * 8, deltas=pb.Deltas(deltas=deltas))

    # A piece of text alone is no message of tokens, and its time belongs to the tokens behind it.
    toy.log = [event(2, 2), event(3, 0), event(4, 1, 3), event(5, 1), *toy.log[-1:]]
    (sample,) = (await Caller(connections, "tiny").closed(1, [REQUEST])).samples
    assert sample.first_tokens == 2
    assert [tokens for _, tokens in sample.messages] == [4, 1]
    assert sample.num_tokens == 7


async def test_an_answer_without_tokens_has_its_end_as_its_first(toy: Toy, connections: Connections) -> None:
    toy.log = toy.log[-1:]
    (sample,) = (await Caller(connections, "tiny").closed(1, [REQUEST])).samples
    assert (sample.num_tokens, sample.first_token_s) == (0, sample.total_s)


async def test_refusals_are_counted_and_broken_streams_resumed(toy: Toy, connections: Connections) -> None:
    full = Failure(grpc.StatusCode.UNAVAILABLE, "BACKEND_UNAVAILABLE")
    toy.breaks = [Break(0, full), Break(3), Break(2)]
    run = await Caller(connections, "tiny").open(100.0, [0.0, 0.0], repeat(REQUEST))
    closed = await Caller(connections, "tiny").closed(1, islice(repeat(REQUEST), 1))
    (failure,) = run.failures
    assert failure.reason == "BACKEND_UNAVAILABLE"
    assert [sample.num_tokens for sample in (*run.samples, *closed.samples)] == [5, 5]
    assert sum(sample.num_resumes for sample in (*run.samples, *closed.samples)) == 2


async def test_no_connection_has_more_calls_than_a_gateway_takes() -> None:
    peers: set[str] = set()

    class Peers(StallingToy):
        def StreamGenerate(self, request: Any, context: Any) -> Iterator[pb.StreamGenerateResponse]:  # noqa: N802
            peers.add(context.peer())
            yield from super().StreamGenerate(request, context)

    with serving(Peers(6)) as toy:
        async with connections_to(toy, most_calls=2) as pool:
            run = await Caller(pool, "tiny").closed(6, repeat(REQUEST, 6))
            assert (len(run.samples), len(pool), len(peers)) == (6, 3, 3)
            with pool.call(), pool.call(), pool.call():
                assert len(pool) == 3  # those that ended make room
