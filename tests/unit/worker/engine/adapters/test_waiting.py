"""A request waits for its adapter beside the steps of the others, and lets go of it however it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from common.generation import AdapterRef, SamplingParams, StructuredOutput
from tests.builders_engine import Collected, PaperRunner, make_engine, make_request, paper_tokens
from tests.unit.worker.engine.adapters.test_store import Shelf, ref
from worker.engine.adapters.store import AdapterStore
from worker.engine.thread import EngineThread
from worker.engine.types import GenerationRequest


class Bench:
    """An engine's thread with a store of one place."""

    def __init__(self) -> None:
        self.shelf = Shelf()
        self.store = AdapterStore(self.shelf, max_adapters=1, max_bytes=100)
        self.thread = EngineThread(make_engine(PaperRunner(), max_num_seqs=4), adapters=self.store)
        self.thread.start(asyncio.get_running_loop())
        self.results: dict[str, Collected] = {}

    def submit(self, name: str, adapter: str = "", **fields: object) -> None:
        named = {"adapter": ref(adapter)} if adapter else {"adapter": None}
        request = make_request(name, [1, 2])
        sampling = SamplingParams(max_tokens=4, **named, **fields)  # type: ignore[arg-type]
        request = GenerationRequest(name, request.prompt_token_ids, sampling)
        self.results[name] = Collected.of(request)
        self.thread.submit(request)

    async def collect(self, *names: str) -> None:
        async with asyncio.timeout(20):
            while not all(self.results[name].usage or self.results[name].error for name in names):
                result = await self.thread.next_result()
                for output in result.outputs:
                    collected = self.results[output.request_id]
                    for delta in output.deltas:
                        collected.take(delta)
                    collected.usage, collected.error = output.usage, output.error
                self.thread.ack(result.step)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    bench.shelf.gate.set()
    bench.thread.stop()
    await bench.thread.join(10)


async def test_others_go_on_while_an_adapter_is_loaded(bench: Bench) -> None:
    bench.shelf.gate.clear()
    bench.submit("waits", "a")
    bench.submit("goes on")
    await bench.collect("goes on")
    assert bench.results["waits"].tokens == [[]]
    assert bench.thread.stats.held_request_ids == ()
    bench.shelf.gate.set()
    await bench.collect("waits")
    assert bench.results["waits"].tokens == [paper_tokens([1, 2], 4)]


async def test_adapters_take_turns_in_one_place(bench: Bench) -> None:
    names = ["a", "b", "a", "c"]
    for index, adapter in enumerate(names):
        bench.submit(str(index), adapter)
    await bench.collect(*map(str, range(len(names))))
    assert all(result.error is None for result in bench.results.values())
    assert sorted(set(bench.shelf.loads)) == ["a", "b", "c"]


async def test_one_that_is_aborted_while_it_waits_lets_go_of_its_adapter(bench: Bench) -> None:
    bench.shelf.gate.clear()
    bench.submit("waits", "a")
    bench.thread.abort("waits")
    bench.shelf.gate.set()
    await bench.collect("waits")
    assert bench.results["waits"].tokens == [[]]
    bench.submit("next", "b")  # for which a must have gone
    await bench.collect("next")
    assert bench.store.stats.loaded == ["b"]


async def test_the_same_request_twice_holds_one_place(bench: Bench) -> None:
    bench.submit("r", "a")
    bench.submit("r", "a")
    await bench.collect("r")
    bench.submit("next", "b")
    await bench.collect("next")


async def test_what_cannot_be_had_ends_its_request(bench: Bench) -> None:
    bench.shelf.missing.add("gone")
    bench.submit("r", "gone")
    bench.submit("fine", "a")
    await bench.collect("r", "fine")
    assert bench.results["r"].error == "ADAPTER_NOT_FOUND"
    assert bench.results["fine"].error is None


async def test_a_grammar_that_fails_lets_go_of_the_adapter(bench: Bench) -> None:
    bench.submit("r", "a", structured_output=StructuredOutput("regex", "a"))  # type: ignore[arg-type]
    await bench.collect("r")
    assert bench.results["r"].error == "STRUCTURED_OUTPUT_UNSUPPORTED"
    bench.submit("next", "b")
    await bench.collect("next")


async def test_a_worker_without_adapters_never_computes_without() -> None:
    thread = EngineThread(make_engine(PaperRunner()))
    thread.start(asyncio.get_running_loop())
    sampling = SamplingParams(max_tokens=4, adapter=AdapterRef("a", "1"))
    thread.submit(GenerationRequest("r", (1, 2), sampling))
    async with asyncio.timeout(20):
        (output,) = (await thread.next_result()).outputs
    assert output.error == "ADAPTER_NOT_FOUND"
    thread.stop()
    await thread.join(10)
