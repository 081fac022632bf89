"""The agent: claims jobs when the KV cache has room, hands them to the engine, commits what its steps produce.

Four tasks share the worker's event loop and one engine thread:

    claim    bell or queue length -> claim -> engine.submit; preemption of lower classes for the highest
    commit   step results -> one commit for all held jobs -> engine.ack      one in flight; later steps join the next
    beat     lease and the worker's figures; ends the process when a step hangs
    tidy     reap and sweep while nothing else is to do

Losing the server is no reason to drop work: the engine pauses at two uncommitted steps, and when the server is back it
answers for each job whether it is still ours. Epochs make that safe, however long it took.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import structlog

from common.errors import ServingError
from common.job_claims import JobClaims
from common.jobs import ClaimedJob, CommitResult, WorkerInfo
from worker.engine.thread import EngineStopped, EngineThread
from worker.engine.types import StepResult
from worker.holdings import Holdings
from worker.preemption import HIGHEST_CLASS, MAX_PREEMPTIONS, choose_victims
from worker.settings import WorkerSettings
from worker.watch import JobWatch

log = structlog.get_logger()

_RETRY_S: Final = 0.5
_TIDY_S: Final = 1.0
_PREEMPT_PAUSE_S: Final = 0.5
_ROOM_PAUSE_S: Final = 0.02


class StepHungError(Exception):
    """A step takes longer than any step may: the process must end, so that its jobs move on."""


class Agent:
    """Runs one worker. `info` describes it without the figures that change."""

    def __init__(
        self,
        claims: JobClaims,
        engine: EngineThread,
        settings: WorkerSettings,
        info: Callable[[], WorkerInfo],
        watch: JobWatch,
        *,
        max_num_seqs: int,
        beat_interval_s: float,
        max_events_per_s: float = math.inf,
    ) -> None:
        self._claims = claims
        self._engine = engine
        self._settings = settings
        self._info = info
        self._watch = watch
        self._max_num_seqs = max_num_seqs
        self._beat_interval_s = beat_interval_s
        self._holdings = Holdings(engine.stats.block_size, max_events_per_s)
        self._may_claim = asyncio.Event()  # something waits in the queue, or may
        self._may_claim.set()
        self._something_waits = False  # in the queue, as far as was told since the last claim
        self._emptied = asyncio.Event()  # nothing is held
        self._emptied.set()
        self._stopping = asyncio.Event()
        self._drained = False
        self._has_unknown_jobs = False
        self._num_urgent = 0  # of the highest class, in the queue
        self._preempts_at = 0.0  # time.monotonic() before which nothing gives way

    def stop(self) -> None:
        """Begin to drain: no new jobs, and at the end of the grace the rest goes back to the queue."""
        self._stopping.set()

    async def run(self) -> None:
        """Run until drained. Raises StepHungError, EngineCrashed, or what else makes going on impossible."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(task()) for task in (self._claim, self._commit, self._beat, self._tidy)]
            await self._stopping.wait()
            log.info("worker.draining", held=len(self._holdings))
            tasks[0].cancel()
            await self._drain()
            # The loops look at the flags too: the Redis client can swallow a cancellation.
            self._drained = True
            for task in tasks:
                task.cancel()

    # -- claim ----------------------------------------------------------------------------------------------------

    async def _claim(self) -> None:
        while not self._stopping.is_set():
            if self._holdings:
                await self._may_claim.wait()
            elif not self._has_room():
                await asyncio.sleep(_ROOM_PAUSE_S)  # what was held last is being freed
            self._may_claim.clear()
            if self._has_room() and not self._stopping.is_set():
                waits = not self._holdings and not self._something_waits
                self._something_waits = False
                await self._guarded(self._claim_once(wait=waits))
                if waits:
                    self._may_claim.clear()  # set by heartbeats meanwhile, when there was nothing else
            if self._must_make_room() and not self._stopping.is_set():
                await self._guarded(self._make_room())

    def _has_room(self) -> bool:
        return self._free_places() > 0 and self._free_kv_tokens() > 0

    def _free_places(self) -> int:
        return min(self._settings.max_jobs, self._max_num_seqs) - len(self._holdings)

    def _total_kv_tokens(self) -> int:
        return self._engine.stats.num_blocks * self._engine.stats.block_size

    def _free_kv_tokens(self) -> int:
        return self._engine.stats.free_kv_tokens - self._holdings.reserved_kv_tokens

    async def _claim_once(self, *, wait: bool = False) -> list[ClaimedJob]:
        room = self._free_places(), self._free_kv_tokens(), self._total_kv_tokens()
        jobs = await self._claims.claim(*room, wait=wait)
        self._take(jobs)
        return jobs

    def _take(self, jobs: Sequence[ClaimedJob]) -> None:
        if not jobs:
            return
        for job in jobs:
            self._stop_computing(job.generation_id, "TAKEN")  # held at an older epoch: what was computed is void
        self._engine.submit(*[self._holdings.add(job, time.monotonic()) for job in jobs])
        self._watch.claimed(jobs)
        self._emptied.clear()

    # -- preemption -----------------------------------------------------------------------------------------------

    def _must_make_room(self) -> bool:
        """Whether the highest class waits, as far as the last commit told, and others may give way to it."""
        return (
            self._settings.preempt
            and self._num_urgent > 0
            and not self._claims.is_paused
            and time.monotonic() >= self._preempts_at
            and any(runner.may_give_way for runner in self._holdings.runners())
        )

    async def _make_room(self) -> None:
        """Give back just enough for the first waiting generation of the highest class, then claim it.

        One round at a time: while its claim has not brought any of that class, or where giving everything back would
        not make room, nothing more gives way for a while.
        """
        self._preempts_at = time.monotonic() + _PREEMPT_PAUSE_S
        wanted = await self._claims.wanted(self._total_kv_tokens())
        victims = self._victims(wanted) if wanted else []
        if not victims:
            return
        await self._claims.preempt(victims, MAX_PREEMPTIONS)
        for generation_id in victims:
            if generation_id in self._holdings:  # else it has ended meanwhile, and its end is on its way
                self._stop_computing(generation_id, "PREEMPTED")
        await self._engine.settled()
        if any(job.priority == HIGHEST_CLASS for job in await self._claim_once()):
            self._preempts_at = 0.0

    def _victims(self, wanted: int) -> list[str]:
        stats = self._engine.stats
        missing = wanted + stats.num_running * stats.block_size - self._free_kv_tokens()  # a block of each stays free
        return choose_victims(self._holdings.runners(), places=1 - self._free_places(), kv_tokens=missing)

    # -- commit ---------------------------------------------------------------------------------------------------

    async def _commit(self) -> None:
        while not self._drained:
            try:
                results = await self._next_results()
            except EngineStopped:
                return
            # A step without tokens is committed too: a cancelled job that only prefills must learn of it.
            events = unsent = self._holdings.events(results, time.monotonic())
            if results:
                asyncio.get_running_loop().call_soon(self._note_steps, results)  # once the commit is on its way
            while not self._drained:
                try:
                    committed = await self._claims.commit(unsent)
                    self._watch.committed(events, committed.lost)
                    log.debug("commit.stored", steps=len(results), events=len(events), lost=len(committed.lost))
                    self._settle(committed)
                    break
                except ServingError as error:
                    log.warning("commit.unavailable", reason=error.reason)
                    unsent = []  # kept by the claims, and sent first next time
                    await asyncio.sleep(_RETRY_S)
            if results:
                self._engine.ack(results[-1].step)
            if self._has_unknown_jobs:
                await self._guarded(self._adopt())

    def _note_steps(self, results: Sequence[StepResult]) -> None:
        for result in results:
            self._watch.stepped(result)

    async def _next_results(self) -> list[StepResult]:
        """Wait for steps; return none once tokens of earlier ones have been held back for long enough."""
        due_in = self._holdings.due_in(time.monotonic())
        if due_in is None:
            return await self._engine.next_results()
        try:
            async with asyncio.timeout(due_in):
                return await self._engine.next_results()
        except TimeoutError:
            return []

    def _settle(self, result: CommitResult) -> None:
        """Stop what was lost, and look for work where some waits."""
        for generation_id, reason in result.lost.items():
            self._stop_computing(generation_id, reason.name)
        self._num_urgent = result.queued[HIGHEST_CLASS]
        if any(result.queued):
            self._something_waits = True
            self._may_claim.set()
        if not self._holdings:
            self._emptied.set()
            self._may_claim.set()
        self._has_unknown_jobs = self._has_unknown_jobs or result.has_unknown_jobs

    def _stop_computing(self, generation_id: str, reason: str) -> None:
        """Free what a generation takes, if it is held."""
        self._watch.dropped(generation_id, reason)
        request_id = self._holdings.drop(generation_id)
        if request_id is not None:
            self._engine.abort(request_id)

    async def _adopt(self) -> None:
        """Take over jobs that the server counts as ours: the reply that handed them out was lost."""
        self._take(await self._claims.owned())
        self._has_unknown_jobs = False

    # -- beat and tidy --------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        while not self._drained:
            age = time.monotonic() - self._engine.last_step_at
            if age > self._settings.hang_s:
                # The lease must end: no loop may renew it, also one whose cancellation the Redis client swallows.
                self._stopping.set()
                self._drained = True
                raise StepHungError(f"a step has taken {age:.0f} s")
            await self._guarded(self._beat_once())
            await asyncio.sleep(self._beat_interval_s)

    async def _beat_once(self) -> None:
        result = await self._claims.heartbeat(self._info())
        self._settle(result)
        if result.drain_requested_by and not self.draining:
            log.info("worker.drain_requested", by=result.drain_requested_by)
            self.stop()
        if self._has_unknown_jobs:
            await self._adopt()

    async def _tidy(self) -> None:
        while not self._drained:
            await asyncio.sleep(min(_TIDY_S, self._beat_interval_s))  # often enough for the shortest lease
            if not self._holdings:
                await self._guarded(self._tidy_once())

    async def _tidy_once(self) -> None:
        self._watch.tidied(await self._claims.reap())
        self._watch.tidied(await self._claims.sweep())

    # -- drain ----------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Let held jobs finish within the grace, then give the rest back."""
        try:
            async with asyncio.timeout(self._settings.drain_s):
                await self._emptied.wait()
        except TimeoutError:
            rest = self._holdings.ids()
            for generation_id in rest:
                self._stop_computing(generation_id, "RELEASED")
            log.info("worker.releasing", jobs=len(rest))
            await self._guarded(self._claims.release(rest))
        self._engine.stop()
        self._drained = True  # a heartbeat behind the farewell would bring the worker back for a lease
        await self._guarded(self._claims.leave())

    @property
    def draining(self) -> bool:
        """Whether no new work is taken."""
        return self._stopping.is_set()

    @staticmethod
    async def _guarded(call: Awaitable[object]) -> None:
        """Await a call to the server; if it fails, say so, and go on a little later."""
        try:
            await call
        except ServingError as error:
            log.warning("server.unavailable", reason=error.reason)
            await asyncio.sleep(_RETRY_S)
