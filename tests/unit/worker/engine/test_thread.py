from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest
import structlog
import torch

from common.generation import FinishReason
from tests.builders_engine import Collected, PaperRunner, make_engine, make_request, paper_tokens
from worker.engine.batch import TokensInFlight
from worker.engine.scheduler import Plan
from worker.engine.thread import EngineCrashed, EngineStopped, EngineThread, StepStart
from worker.engine.types import Part, StepResult

StartThread = Callable[..., EngineThread]


class GatedRunner(PaperRunner):
    """Runs a step only when it is let; may be told to crash."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Semaphore(0)
        self.is_in_step = threading.Event()
        self.crash = False

    def execute(self, plan: Plan, in_flight: TokensInFlight | None = None) -> torch.Tensor:
        self.is_in_step.set()
        assert self.gate.acquire(timeout=10)
        if self.crash:
            raise RuntimeError("the device is gone")
        return super().execute(plan, in_flight)


@pytest.fixture
async def start() -> AsyncIterator[StartThread]:
    threads: list[EngineThread] = []

    def start_thread(runner: PaperRunner | None = None, head_start_s: float = 0, **settings: int) -> EngineThread:
        thread = EngineThread(make_engine(runner or PaperRunner(), **settings), head_start_s=head_start_s)
        threads.append(thread)
        thread.start(asyncio.get_running_loop())
        return thread

    yield start_thread
    for thread in threads:
        thread.stop()
        await thread.join(timeout=10)


async def test_settled_is_when_commands_have_taken_effect(start: StartThread) -> None:
    runner = GatedRunner()
    thread = start(runner)
    thread.submit(make_request("a", max_tokens=5))
    await asyncio.to_thread(runner.is_in_step.wait, 10)
    thread.abort("a")
    settled = asyncio.create_task(thread.settled())
    await asyncio.sleep(0.05)
    assert not settled.done(), "a step is in progress"
    assert thread.stats.held_request_ids == ("a",)
    runner.gate.release(10)
    await asyncio.wait_for(settled, 10)
    assert thread.stats.held_request_ids == ()
    assert thread.stats.num_free_blocks == thread.stats.num_blocks


async def collect(thread: EngineThread, *requests_left: str) -> dict[str, Collected]:
    """Take and acknowledge results until these requests are over."""
    results = {request_id: Collected.of(make_request(request_id)) for request_id in requests_left}
    async with asyncio.timeout(10):
        while not all(c.usage or c.error for c in results.values()):
            result = await thread.next_result()
            for output in result.outputs:
                for delta in output.deltas:
                    results[output.request_id].take(delta)
                results[output.request_id].usage, results[output.request_id].error = output.usage, output.error
            thread.ack(result.step)
    return results


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # the other thread sets no event
            await asyncio.sleep(0.001)


async def test_requests_from_the_event_loop_come_back_as_results(start: StartThread) -> None:
    thread = start()
    thread.submit(make_request("a", [1, 2]))
    thread.submit(make_request("b", [3, 4]))
    results = await collect(thread, "a", "b")
    assert results["a"].tokens == [paper_tokens([1, 2], 8)]
    assert results["b"].tokens == [paper_tokens([3, 4], 8)]
    assert thread.stats.generated_tokens == 16


async def test_who_was_busy_gets_the_results_of_all_steps_since_and_then_the_end(start: StartThread) -> None:
    thread = start()
    thread.submit(make_request("a", [1, 2], max_tokens=30))
    (first,) = await thread.next_results()
    thread.ack(first.step)
    await until(lambda: thread.stats.num_steps == 3)
    await asyncio.sleep(0.01)
    thread.stop()
    await thread.join(timeout=10)
    await asyncio.sleep(0.01)
    assert [result.step for result in await thread.next_results()] == [2, 3]
    for _ in range(2):
        with pytest.raises(EngineStopped):
            await thread.next_results()


async def test_the_engine_pauses_at_two_steps_that_are_not_acknowledged(start: StartThread) -> None:
    thread = start()
    thread.submit(make_request("a", [1, 2], max_tokens=30))
    thread.ack((await thread.next_result()).step)
    second = await thread.next_result()
    third = await thread.next_result()
    await asyncio.sleep(0.05)
    assert thread.stats.num_steps == 3
    thread.ack(second.step)
    await thread.next_result()
    await asyncio.sleep(0.05)
    assert thread.stats.num_steps == 4
    thread.ack(third.step + 1)  # one acknowledgement covers all steps before
    await until(lambda: thread.stats.num_steps == 6)


async def test_the_first_token_of_a_lone_request_is_out_before_the_next_step(start: StartThread) -> None:
    thread = start()
    thread.submit(make_request("a", [1, 2], max_tokens=30))
    await thread.next_result()
    await asyncio.sleep(0.05)
    assert thread.stats.num_steps == 1
    thread.ack(1)
    await until(lambda: thread.stats.num_steps == 3)  # not of later tokens
    # Beside another request nobody waits for a first token.
    thread.submit(make_request("b", [3, 4], max_tokens=30))
    await until(lambda: len(thread.stats.held_request_ids) == 2)
    thread.ack(3)
    await until(lambda: thread.stats.num_steps == 5)


async def test_a_request_that_is_alone_no_longer_does_not_wait_for_its_commit(
    start: StartThread,
) -> None:
    thread = start()
    thread.submit(make_request("a", [1, 2], max_tokens=30))
    first = await thread.next_result()
    await asyncio.sleep(0.05)
    assert thread.stats.num_steps == 1
    thread.submit(make_request("b", [3, 4], max_tokens=30))
    async with asyncio.timeout(10):
        second = await thread.next_result()
    assert (first.step, second.step) == (1, 2)


async def test_the_first_token_of_a_lone_request_has_a_head_start_once_it_is_committed(start: StartThread) -> None:
    thread = start(head_start_s=0.3)
    thread.submit(make_request("a", [1, 2], max_tokens=30))
    await thread.next_result()
    began = time.monotonic()
    thread.ack(1)
    await asyncio.sleep(0.05)
    assert thread.stats.num_steps == 1
    await until(lambda: thread.stats.num_steps == 3)
    assert time.monotonic() - began >= 0.3
    async with asyncio.timeout(5):  # later tokens have none
        for _ in range(2, 30):
            thread.ack((await thread.next_result()).step)


@pytest.mark.parametrize("is_committed", [False, True])
async def test_who_comes_meanwhile_ends_the_head_start(start: StartThread, is_committed: bool) -> None:
    thread = start(head_start_s=1000)
    thread.submit(make_request("a", [1, 2], max_tokens=30))
    await thread.next_result()
    if is_committed:
        thread.ack(1)
    thread.submit(make_request("b", [3, 4], max_tokens=30))
    await until(lambda: len(thread.stats.held_request_ids) == 2)
    thread.ack(1)
    await until(lambda: thread.stats.num_steps == 3)


async def test_a_head_start_does_not_outlast_its_request(start: StartThread) -> None:
    thread = start(head_start_s=1000)
    thread.submit(make_request("a", [1, 2], max_tokens=30))
    await thread.next_result()
    thread.ack(1)
    thread.abort("a")
    await until(lambda: not thread.stats.held_request_ids)
    thread.submit(make_request("b", [3, 4], max_tokens=1))
    thread.ack(2)
    await until(lambda: thread.stats.num_steps == 3)


async def test_steps_that_only_prefill_count_too(start: StartThread) -> None:
    thread = start(token_budget=4)
    thread.submit(make_request("a", range(40)))  # ten steps of prefill
    assert [(await thread.next_result()).outputs for _ in range(2)] == [(), ()]
    await asyncio.sleep(0.05)
    assert thread.stats.num_steps == 2
    thread.ack(2)
    await collect(thread, "a")
    assert thread.stats.num_steps == 17


async def test_an_abort_is_applied_while_the_engine_is_paused(start: StartThread) -> None:
    thread = start()
    thread.submit(make_request("a", [1, 2], max_tokens=30))
    await thread.next_result()
    thread.abort("a")
    await until(lambda: thread.stats.num_free_blocks == thread.stats.num_blocks)
    assert thread.stats.held_request_ids == ()
    thread.ack(1)
    result = await thread.next_result()
    assert result.outputs[0].deltas[0].finish_reason == FinishReason.CANCELLED


async def test_there_is_one_wake_up_of_the_event_loop_per_step(
    start: StartThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, calls = asyncio.get_running_loop(), []
    original = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: (calls.append(args), original(*args))[1])
    thread = start()
    for name in "abc":
        thread.submit(make_request(name, [1, 2], max_tokens=4))
    await collect(thread, "a", "b", "c")
    assert len(calls) == thread.stats.num_steps


async def test_an_idle_engine_does_not_spin_and_does_not_look_hung(start: StartThread) -> None:
    thread = start()
    thread.submit(make_request("a", [1, 2]))
    await collect(thread, "a")
    cpu_before = time.process_time()
    await asyncio.sleep(0.2)
    assert time.process_time() - cpu_before < 0.1
    assert time.monotonic() - thread.last_step_at < 0.1


async def test_a_step_that_hangs_shows_by_the_age_of_the_last_one(start: StartThread) -> None:
    runner = GatedRunner()
    thread = start(runner)
    thread.submit(make_request("a", [1, 2], max_tokens=2))
    await asyncio.sleep(0.15)
    assert time.monotonic() - thread.last_step_at > 0.1
    runner.gate.release(10)
    await collect(thread, "a")


async def test_an_engine_that_waits_for_acknowledgement_does_not_look_hung(start: StartThread) -> None:
    thread = start()
    thread.submit(make_request("a", [1, 2], max_tokens=30))
    await thread.next_result()
    await asyncio.sleep(0.15)
    assert time.monotonic() - thread.last_step_at < 0.1


async def test_a_crash_is_reported_to_whoever_waits_for_results(start: StartThread) -> None:
    runner = GatedRunner()
    runner.crash = True
    thread = start(runner)
    with structlog.testing.capture_logs() as logs:
        thread.submit(make_request("a", [1, 2]))
        runner.gate.release()
        for _ in range(2):
            with pytest.raises(EngineCrashed, match="RuntimeError") as error:
                await thread.next_result()
            assert isinstance(error.value.__cause__, RuntimeError)
        await thread.join(timeout=10)
    assert [(entry["event"], entry["held_request_ids"]) for entry in logs] == [("engine.crashed", ("a",))]


async def test_a_request_submitted_twice_runs_once(start: StartThread) -> None:
    thread = start()
    with structlog.testing.capture_logs() as logs:
        thread.submit(make_request("a", [1, 2]))
        thread.submit(make_request("a", [1, 2]))
        results = await collect(thread, "a")
    assert results["a"].tokens == [paper_tokens([1, 2], 8)]
    assert [(entry["event"], entry["request_id"]) for entry in logs] == [("engine.duplicate_request", "a")]


async def test_stop_ends_the_results_even_with_work_left(start: StartThread) -> None:
    thread = start()
    thread.submit(make_request("a", [1, 2], max_tokens=30))
    await thread.next_result()
    thread.stop()
    for _ in range(2):
        with pytest.raises(EngineStopped):
            await thread.next_result()


async def test_join_does_not_wait_for_ever_for_a_step_that_hangs(start: StartThread) -> None:
    runner = GatedRunner()
    thread = start(runner)
    thread.submit(make_request("a", [1, 2]))
    await until(runner.is_in_step.is_set)
    thread.stop()
    with pytest.raises(TimeoutError, match=r"did not end within 0.05 s"):
        await thread.join(timeout=0.05)
    runner.gate.release()
    await thread.join(timeout=10)


class Telling(PaperRunner):
    """Tells of its forward passes, each of which takes a while, and what each had to compute."""

    def __init__(self, start: StepStart | None = None, takes_s: float = 0.0) -> None:
        super().__init__()
        self.start = start
        self.takes_s = takes_s
        self.batches: list[list[str]] = []

    def execute(self, plan: Plan, in_flight: TokensInFlight | None = None) -> torch.Tensor:
        self.batches.append([chunk.sequence.request_id for chunk in plan.chunks])
        if self.start is not None:
            self.start.on_part("forward")
        time.sleep(self.takes_s)
        return super().execute(plan, in_flight)


async def test_requests_that_are_given_together_begin_together(start: StartThread) -> None:
    runner = Telling()
    thread = start(runner)
    thread.submit(*[make_request(name, [number]) for number, name in enumerate("abc")])
    await collect(thread, "a", "b", "c")
    assert runner.batches[0] == ["a", "b", "c"]


async def test_who_gives_an_idle_engine_work_goes_on_once_it_computes() -> None:
    """Not before: its thread would wait for the interpreter's lock. And not after the step, which may take long."""
    beginning = StepStart()
    runner = Telling(beginning, takes_s=0.3)
    thread = EngineThread(make_engine(runner), step_start=beginning)
    thread.start(asyncio.get_running_loop())
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("worker.engine.thread._LONGEST_START_S", 10.0)
            for name in ("a", "b"):
                num_batches = len(runner.batches)
                thread.submit(make_request(name, max_tokens=1))
                assert len(runner.batches) == num_batches + 1
                assert thread.stats.num_steps == num_batches, "the step is not over"
                await collect(thread, name)
                await until(lambda: thread._is_idle)
    finally:
        thread.stop()
        await thread.join(timeout=10)


async def test_an_engine_that_does_not_begin_is_not_waited_for_long() -> None:
    beginning = StepStart()
    thread = EngineThread(make_engine(PaperRunner()), step_start=beginning)  # whose runner tells nothing
    thread.start(asyncio.get_running_loop())
    try:
        thread.submit(make_request("a", max_tokens=1))
        await collect(thread, "a")
    finally:
        thread.stop()
        await thread.join(timeout=10)
    assert not beginning.wait(0)


def test_the_beginning_of_a_step_is_told_once_it_is_expected_and_every_part_is_passed_on() -> None:
    parts: list[Part] = []
    beginning = StepStart(parts.append)
    for part in ("plan", "batch"):
        beginning.on_part(part)  # type: ignore[arg-type]
    assert not beginning.wait(0)
    beginning.on_part("forward")
    assert beginning.wait(0)
    beginning.expect()
    assert not beginning.wait(0)
    assert parts == ["plan", "batch", "forward"]


class Noting(EngineThread):
    """Notes in order what it delivers and what its runner does."""

    def __init__(self, *, results_wait: bool, crashes_at: int = 0, takes_s: float = 0.1) -> None:
        self.noted: list[str] = []
        start, noted = StepStart(), self.noted

        class Runner(PaperRunner):
            def execute(self, plan: Plan, in_flight: TokensInFlight | None = None) -> torch.Tensor:
                noted.append("lays out")
                if noted.count("lays out") == crashes_at:
                    raise RuntimeError("the device is gone")
                start.on_part("forward")
                noted.append("computes")
                time.sleep(takes_s)
                return super().execute(plan, in_flight)

        super().__init__(make_engine(Runner()), step_start=start, results_wait=results_wait)

    def _deliver(self, result: StepResult | None) -> None:
        self.noted.append("the end" if result is None else str(result.step))
        super()._deliver(result)


async def run_two(thread: Noting) -> None:
    thread.start(asyncio.get_running_loop())
    thread.submit(make_request("a", [1], max_tokens=3), make_request("b", [2], max_tokens=3))
    await collect(thread, "a", "b")
    thread.stop()
    await thread.join(timeout=10)


async def test_results_wait_until_the_next_step_computes_and_the_last_ones_do_not() -> None:
    thread = Noting(results_wait=True)
    await run_two(thread)
    step = ["lays out", "computes"]
    assert thread.noted == [*step, "lays out", "1", "computes", "lays out", "2", "computes", "3", "the end"]


async def test_elsewhere_results_come_at_once() -> None:
    thread = Noting(results_wait=False)
    await run_two(thread)
    step = ["lays out", "computes"]
    assert thread.noted == [*step, "1", *step, "2", *step, "3", "the end"]


async def test_results_that_wait_come_though_nobody_acknowledges() -> None:
    thread = Noting(results_wait=True, takes_s=0)
    thread.start(asyncio.get_running_loop())
    thread.submit(make_request("a", [1]), make_request("b", [2]))
    async with asyncio.timeout(10):
        assert [(await thread.next_result()).step for _ in range(2)] == [1, 2]
    thread.stop()
    await thread.join(timeout=10)


async def test_what_was_computed_before_a_crash_is_delivered() -> None:
    thread = Noting(results_wait=True, crashes_at=2)
    thread.start(asyncio.get_running_loop())
    thread.submit(make_request("a", [1]), make_request("b", [2]))
    async with asyncio.timeout(10):
        assert (await thread.next_result()).step == 1
        with pytest.raises(EngineCrashed):
            await thread.next_result()
    await thread.join(timeout=10)
