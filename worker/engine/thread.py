"""The engine's thread: steps run here, beside the asyncio loop that claims jobs and commits results.

Commands go in through a lock-protected list, results come out with one wake-up of the event loop per step. The thread
pauses while two steps are not acknowledged: that is the back-pressure of the whole worker, and it bounds how many steps
a cancelled request still takes part in, also while it only prefills. After the first token of a request that is alone
it pauses at one, and gives that token a head start besides: where a step takes all cores, it would else share them with
the next step all the way to its caller. The thread sleeps on a condition when there is nothing to do, and applies
commands at once even while paused.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, Protocol

import structlog

from common.logs import describe_exception
from worker.engine.adapters.store import AdapterStore
from worker.engine.grammar import GrammarFailure
from worker.engine.turns import TakingTurns
from worker.engine.types import (
    DuplicateRequest,
    EngineStats,
    GenerationRequest,
    OnPart,
    Part,
    StepResult,
    ignore_part,
)

log = structlog.get_logger(__name__)

MAX_UNACKNOWLEDGED_STEPS: Final = 2
_LONGEST_START_S: Final = 0.002


class EngineCrashed(Exception):
    """The engine's thread ended with the exception that caused this one. What it held must be decoded elsewhere."""


class EngineStopped(Exception):
    """The engine was stopped, and there are no more results."""


class StepEngine(Protocol):
    """What the thread needs of an engine; see `loop.Engine` for what its methods do."""

    @property
    def has_work(self) -> bool: ...
    def prepare(self, request: GenerationRequest) -> GenerationRequest: ...
    def add(self, request: GenerationRequest) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self, now: float) -> StepResult: ...
    def stats(self) -> EngineStats: ...


class StepStart:
    """Tells that a step computes, and no longer wants the interpreter's lock: others may take it at no cost to it."""

    def __init__(self, on_part: OnPart = ignore_part) -> None:
        """`on_part` is told of every part as well."""
        self._on_part = on_part
        self._computes = threading.Event()
        self._on_start: Callable[[], None] = lambda: None

    def on_part(self, part: Part) -> None:
        """To be told of the parts of each step, on the engine's thread."""
        self._on_part(part)
        if part == "forward":
            self._on_start()
            self._computes.set()

    def listen(self, on_start: Callable[[], None]) -> None:
        """Have this called on the engine's thread whenever a step begins to compute."""
        self._on_start = on_start

    def expect(self) -> None:
        """Forget the steps so far."""
        self._computes.clear()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the next step to compute; return whether one does."""
        return self._computes.wait(timeout_s)


class EngineThread:
    """Runs an engine. All methods but `next_results` and `next_result` may be called from any thread."""

    def __init__(
        self,
        engine: StepEngine,
        clock: Callable[[], float] = time.monotonic,
        adapters: AdapterStore | None = None,
        *,
        head_start_s: float = 0.0,
        step_start: StepStart | None = None,
        results_wait: bool = False,
    ) -> None:
        """Requests that name an adapter take it from `adapters`; without, they end with an error.

        The first token of a request that is alone gets `head_start_s` to its caller, once it is committed. `step_start`
        is told of the parts of this engine's steps; with `results_wait`, results come when the next step computes.
        """
        self._engine = engine
        self._adapters = adapters
        self._clock = clock
        self._head_start_s = head_start_s
        self._step_start = step_start
        self._results_wait = results_wait and step_start is not None
        if step_start is not None:
            step_start.listen(self._deliver_held)
        self._changed = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()  # guarded by _changed, as the next five
        self._preparing: dict[str, bool] = {}  # requests that wait for grammar or adapter; whether they were aborted
        self._unacknowledged: deque[int] = deque()
        self._lone_start: int | None = None  # the step that gave a lone request's first token, until the next step
        self._not_before = 0.0  # by the clock: when the next step may begin
        self._is_stopping = False
        self._held_result: StepResult | None = None  # not delivered yet
        self._results: asyncio.Queue[StepResult | None] = asyncio.Queue()  # two steps at most; None is the end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._compiling = TakingTurns("grammars")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._crash: BaseException | None = None
        self._stats = engine.stats()
        self._last_step_at = clock()
        self._is_idle = True  # waits for a command or an acknowledgement

    # -- commands -------------------------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin; results are delivered to this event loop."""
        self._loop = loop
        self._thread.start()

    def submit(self, *requests: GenerationRequest) -> None:
        """Decode requests, beginning with all of them in one step; every outcome, a refusal too, comes as a result.

        A request whose id is in the engine is dropped: the results of that id are those of the first. One with a
        grammar comes in once that is compiled, one with an adapter once that is loaded, beside the steps of the others.
        """
        ready = [one for one in requests if one.sampling.structured_output is None and one.sampling.adapter is None]
        if ready:
            self._begin(ready)
        for request in requests:
            if request.sampling.structured_output is None and request.sampling.adapter is None:
                continue
            with self._changed:
                self._preparing[request.request_id] = False
            if request.sampling.structured_output is None:
                self._take_adapter(request)
            else:
                self._compiling.submit(request.tenant, partial(self._prepare_and_take_adapter, request))

    def _begin(self, requests: Sequence[GenerationRequest]) -> None:
        start = self._step_start if self._is_idle else None
        if start is not None:
            start.expect()
        self._command(lambda: self._add_all(requests))
        if start is not None:
            # Until the step computes, its thread wants the interpreter's lock again and again, and would find it taken
            # by what this one has yet to do about the requests, which can wait better.
            start.wait(_LONGEST_START_S)

    def _prepare_and_take_adapter(self, request: GenerationRequest) -> None:
        self._take_adapter(self._prepare(request))

    def _prepare(self, request: GenerationRequest) -> GenerationRequest:
        try:
            return self._engine.prepare(request)
        except Exception:  # else nobody would hear of the request again
            log.exception("engine.grammar_failed", request_id=request.request_id)
            return replace(request, grammar=GrammarFailure("GRAMMAR_INVALID"))

    def _take_adapter(self, request: GenerationRequest) -> None:
        ref = request.sampling.adapter
        if ref is None or self._adapters is None:
            self._command(lambda: self._add_prepared(request))
            return
        self._adapters.acquire(
            ref, lambda adapter: self._command(lambda: self._add_prepared(replace(request, adapter=adapter)))
        )

    def _add_prepared(self, request: GenerationRequest) -> None:
        with self._changed:
            aborted = self._preparing.pop(request.request_id, False)
        self._add(request)
        if aborted:
            self._engine.abort(request.request_id)

    def abort(self, request_id: str) -> None:
        """Cancel a request; does nothing when it is over already."""
        with self._changed:
            if request_id in self._preparing:
                self._preparing[request_id] = True
                return
        self._command(lambda: self._engine.abort(request_id))

    async def settled(self) -> None:
        """Wait until every command so far has taken effect, and `stats` shows it: at most until the step's end.

        For the event loop that `start` was given. Never returns once the engine has ended.
        """
        assert self._loop is not None, "not started"
        loop, done = self._loop, asyncio.Event()

        def tell() -> None:
            self._stats = self._engine.stats()
            loop.call_soon_threadsafe(done.set)

        self._command(tell)
        await done.wait()

    def ack(self, step: int) -> None:
        """Results up to this step are committed."""
        with self._changed:
            while self._unacknowledged and self._unacknowledged[0] <= step:
                if self._unacknowledged.popleft() == self._lone_start:
                    self._not_before = self._clock() + self._head_start_s
            self._changed.notify()

    def stop(self) -> None:
        """End after the step in progress, whatever is left to do."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._adapters is not None:
            self._adapters.stop()

    async def join(self, timeout: float) -> None:
        """Wait for the thread's end after `stop`. Raises TimeoutError, with `timeout` in seconds."""
        await asyncio.to_thread(self._thread.join, timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the engine did not end within {timeout} s")

    def _command(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    # -- results --------------------------------------------------------------------------------------------------

    async def next_results(self) -> list[StepResult]:
        """Wait for a step, and return the results of all that have ended by then, in order.

        Raises EngineCrashed or EngineStopped after the last one.
        """
        results = [await self.next_result()]
        while not self._results.empty():
            result = self._results.get_nowait()
            if result is None:
                self._results.put_nowait(None)
                break
            results.append(result)
        return results

    async def next_result(self) -> StepResult:
        """As `next_results`, of one step."""
        result = await self._results.get()
        if result is None:
            self._results.put_nowait(None)  # for whoever asks again
            if self._crash is not None:
                raise EngineCrashed(describe_exception(self._crash)) from self._crash
            raise EngineStopped
        return result

    @property
    def stats(self) -> EngineStats:
        """As of the latest step or command."""
        return self._stats

    @property
    def last_step_at(self) -> float:
        """When the thread last ended a step or had nothing to do, by the clock: a watchdog sees a hang by its age."""
        if self._is_idle:
            return self._clock()
        return self._last_step_at

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
        except BaseException as error:  # reported to the event loop, which ends the worker
            self._crash = error
            log.exception("engine.crashed", held_request_ids=self._stats.held_request_ids)
        finally:
            self._deliver_held()
            self._deliver(None)

    def _wait_for_work(self) -> bool:
        """Apply commands until there is a step to run. False when asked to stop."""
        while True:
            if not (self._results_wait and self._may_step()):
                self._deliver_held()
            with self._changed:
                self._is_idle = not self._is_stopping and not self._commands and not self._may_step()
                while not (self._is_stopping or self._commands or self._may_step()):
                    self._changed.wait(self._head_start_left())
                if self._is_idle:
                    self._last_step_at, self._is_idle = self._clock(), False
                if self._is_stopping:
                    return False
                commands, self._commands = self._commands, deque()
            for command in commands:
                command()
            if commands:
                self._stats = self._engine.stats()
                if len(self._stats.held_request_ids) != 1:  # it is alone no longer, or over
                    self._lone_start, self._not_before = None, 0.0
            if self._may_step():
                return True

    def _add_all(self, requests: Sequence[GenerationRequest]) -> None:
        for request in requests:
            self._add(request)

    def _add(self, request: GenerationRequest) -> None:
        try:
            self._engine.add(request)
        except DuplicateRequest:
            log.warning("engine.duplicate_request", request_id=request.request_id)

    def _may_step(self) -> bool:
        return (
            self._engine.has_work
            and len(self._unacknowledged) < (MAX_UNACKNOWLEDGED_STEPS if self._lone_start is None else 1)
            and self._head_start_left() is None
        )

    def _head_start_left(self) -> float | None:
        """Seconds of a first token's head start that are left; None if there are none."""
        left_s = self._not_before - self._clock() if self._not_before else 0.0
        return left_s if left_s > 0 else None

    def _step(self) -> None:
        result = self._engine.step(self._clock())
        self._deliver_held()  # of the step before, if this one computed nothing
        self._stats = self._engine.stats()
        self._last_step_at = self._clock()
        with self._changed:
            self._unacknowledged.append(result.step)
            is_lone_start = len(self._stats.held_request_ids) == 1 and _has_first_token(result)
            self._lone_start, self._not_before = result.step if is_lone_start else None, 0.0
        self._held_result = result

    def _deliver_held(self) -> None:
        """Deliver what the latest step gave.

        Where the next one follows at once and is laid out by this thread, that is better not done before it computes:
        the event loop would take the interpreter's lock from it again and again, and the device would wait.
        """
        if self._held_result is not None:
            result, self._held_result = self._held_result, None
            self._deliver(result)

    def _deliver(self, result: StepResult | None) -> None:
        assert self._loop is not None, "not started"
        try:
            self._loop.call_soon_threadsafe(self._results.put_nowait, result)
        except RuntimeError:  # the event loop is closed, so nobody is left to listen
            with self._changed:
                self._is_stopping = True


def _has_first_token(result: StepResult) -> bool:
    return any(delta.first_token_index == 0 and delta.token_ids for out in result.outputs for delta in out.deltas)
