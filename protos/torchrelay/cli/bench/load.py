"""Two ways to load a gateway: callers that wait for their answer, and arrivals that wait for nobody."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Self

from torchrelay.cli.bench.samples import Failure, Level, Run, Sample
from torchrelay.cli.bench.workload import Request
from torchrelay.client import AsyncClient, RelayError

_PROBE_S = 0.02
_MOST_CALLS = 200  # on one connection; gateways take 256 (TORCHRELAY_GATEWAY_MAX_CONCURRENT_STREAMS) and reset others


class Connections:
    """Clients of as many connections as the calls in flight need: a gateway takes only so many on each."""

    def __init__(self, connect: Callable[[int], AsyncClient], most_calls: int = _MOST_CALLS) -> None:
        """`connect` gets the number of the connection, from 0."""
        self._connect = connect
        self._most_calls = most_calls
        self._clients: list[AsyncClient] = []
        self._num_calls: list[int] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            await client.close()

    def __len__(self) -> int:
        return len(self._clients)

    @contextmanager
    def call(self) -> Iterator[AsyncClient]:
        """Give a client for one call, and count the call until it has ended."""
        number = next((i for i, num_calls in enumerate(self._num_calls) if num_calls < self._most_calls), None)
        if number is None:
            number = len(self._clients)
            self._clients.append(self._connect(number))
            self._num_calls.append(0)
        self._num_calls[number] += 1
        try:
            yield self._clients[number]
        finally:
            self._num_calls[number] -= 1


@dataclass(slots=True)
class Caller:
    """Sends requests of one level, and takes their times."""

    connections: Connections
    model: str
    ignore_eos: bool = False
    on_end: Callable[[], None] = lambda: None
    # One for a level: its requests find each other's prefixes in the cache, but not those of levels and runs before.
    salt: bytes = field(default_factory=lambda: os.urandom(16))

    async def closed(self, concurrency: int, requests: Iterable[Request], duration_s: float | None = None) -> Run:
        """Keep `concurrency` requests in flight until they have run out, or none is begun any more after `duration_s`.

        A service that stalls is asked less meanwhile: what that hides, `open` shows.
        """
        run = Run(Level(concurrency))
        waiting = iter(requests)
        async with _timed(run) as started:
            end = started + duration_s if duration_s is not None else None

            async def caller() -> None:
                for request in waiting:
                    await self._one(run, request, started, time.perf_counter())
                    if end is not None and time.perf_counter() >= end:
                        return

            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(caller())
        return run

    async def open(self, rate: float, arrivals: Iterable[float], requests: Iterator[Request]) -> Run:
        """Send a request at each of `arrivals`, in seconds from the beginning, whatever has become of those before.

        Latencies count from the arrival and not from when the request went out. So neither a service that stalls nor a
        generator that is late makes its own load lighter (coordinated omission).
        """
        run = Run(Level(rate, is_open=True))
        async with _timed(run) as started, asyncio.TaskGroup() as group:
            for arrival in arrivals:
                intended = started + arrival
                if (pause := intended - time.perf_counter()) > 0:
                    await asyncio.sleep(pause)
                group.create_task(self._one(run, next(requests), started, intended))
        return run

    async def _one(self, run: Run, request: Request, started: float, intended: float) -> None:
        run.num_in_flight += 1
        run.peak_in_flight = max(run.peak_in_flight, run.num_in_flight)
        sent = time.perf_counter()
        try:
            with self.connections.call() as client:
                run.samples.append(await self._sample(client, request, started, intended, sent))
        except RelayError as error:
            total = time.perf_counter() - intended
            reason = error.reason or error.code.name
            run.failures.append(Failure(intended - started, sent - intended, total, reason))
        finally:
            run.num_in_flight -= 1
            self.on_end()

    async def _sample(
        self, client: AsyncClient, request: Request, started: float, intended: float, sent: float
    ) -> Sample:
        stream = client.stream(
            request.prompt,
            model=self.model,
            max_tokens=request.max_tokens,
            temperature=0,
            cache_salt=self.salt,
            ignore_eos=self.ignore_eos,
        )
        sample = Sample(
            intended - started, sent - intended, first_token_s=0.0, total_s=0.0, first_tokens=0, messages=[]
        )
        last = intended
        async for event in stream:
            now = time.perf_counter()
            if event.HasField("deltas"):
                # Text that was held back may come without a token: what it took belongs to the next one.
                if tokens := sum(len(delta.token_ids) for delta in event.deltas.deltas):
                    if sample.first_tokens:
                        sample.messages.append((now - last, tokens))
                    else:
                        sample.first_token_s, sample.first_tokens = now - intended, tokens
                    last = now
            elif event.HasField("finished"):
                usage, timings = event.finished.usage, event.finished.timings
                sample.input_tokens = usage.prompt_tokens
                sample.cached_input_tokens = usage.cached_prompt_tokens
                sample.num_takeovers = timings.num_takeovers
                if timings.HasField("queue_time"):
                    sample.queue_s = timings.queue_time.ToTimedelta().total_seconds()
        sample.total_s = time.perf_counter() - intended
        if not sample.first_tokens:
            sample.first_token_s = sample.total_s
        sample.num_resumes = stream.position.num_resumes
        return sample


@asynccontextmanager
async def _timed(run: Run) -> AsyncIterator[float]:
    """Take the time of a level and what its generator used of it; yields when it began."""
    probe = asyncio.create_task(_probe(run.loop_lags_s))
    cpu, started = time.process_time(), time.perf_counter()
    try:
        yield started
    finally:
        run.elapsed_s, run.cpu_s = time.perf_counter() - started, time.process_time() - cpu
        probe.cancel()
        with suppress(asyncio.CancelledError):
            await probe


async def _probe(lags_s: list[float]) -> None:
    """Note how much later than asked for the event loop comes back to a task that sleeps."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(_PROBE_S)
        lags_s.append(time.perf_counter() - before - _PROBE_S)
