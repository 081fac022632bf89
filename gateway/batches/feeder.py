"""One batch, fed into the queue as there is room, by the gateway that has the lease on it.

Nothing here need be remembered: which items have a result is stored, and an item that another feeder has queued is
found again by its idempotency key. So a feeder may be cut off anywhere, and the next one begins where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any, Final, TypeVar

import structlog
from google.protobuf.message import DecodeError, Message

from common import errors
from common.batches import Batches, BatchRecord, BatchState, Lease, LeaseLost, Outcome, Result, has_bit
from common.job_queue import JobQueue
from common.logs import frames_of
from gateway.batches import items as of_items
from gateway.batches.running import Bells, Forgetting, Owners, Runner, RunningItem, erase_job, is_for_now, pause_s
from gateway.identity.caller import Caller
from gateway.status import GenerationEndedError
from torchrelay.v1 import batch_pb2 as pb

log = structlog.get_logger()

_T = TypeVar("_T")

_SUBMITTED_AT_ONCE: Final = 4
_WRITTEN_AT_ONCE: Final = 64
_MAX_WRITTEN_BYTES: Final = 1 << 20
_ENDED_AT_ONCE: Final = 256
_MAX_LOST: Final = 3  # times that the store may lose an item's job
_RETRY_S: Final = 0.5
_LONGEST_S: Final = 7 * 86_400  # as an item's time limit: the queue cuts it to its own


class _Verdict(Enum):
    """Why a batch is fed no longer."""

    DONE = auto()
    LOST = auto()  # another feeds it, or there is nothing to feed
    CANCELLED = auto()
    EXPIRED = auto()
    DELETED = auto()


@dataclass(frozen=True, slots=True)
class FeedSettings:
    """Bounds and times of a feeder."""

    window: int  # most items in the queue at a time
    lease_ms: int
    renew_s: float  # pause between two renewals, well below the lease
    reveal_models: bool = True


@dataclass(frozen=True, slots=True)
class FeedParts:
    """What all feeders of a gateway share."""

    batches: Batches
    queue: JobQueue
    runners: Mapping[str, Runner]  # by kind of request
    owners: Owners
    forgetting: Forgetting
    bells: Bells


class Feeder:
    """Feeds one batch. `run` once."""

    def __init__(
        self,
        lease: Lease,
        parts: FeedParts,
        settings: FeedSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batch: BatchRecord = lease.batch
        self._parts = parts
        self._settings = settings
        self._clock = clock
        self._rng = random.Random()
        self._leased_until = clock() + settings.lease_ms / 1000
        self._is_overdue = lease.remaining_ms <= 0
        self._has_result = [has_bit(lease.done, index) for index in range(lease.batch.total)]
        self._num_left = self._has_result.count(False)
        self._fed_below = lease.batch.fed_below
        self._running: dict[int, str] = {}  # item -> generation id, "" before it is queued
        self._results: asyncio.Queue[tuple[Result, str]] = asyncio.Queue()  # each with its generation id, or ""
        self._submitting = asyncio.Semaphore(_SUBMITTED_AT_ONCE)
        self._slots = asyncio.Semaphore(settings.window)
        self._reserving = asyncio.Lock()
        self._told: set[str] = set()  # reasons for want of room
        self._has_ended = asyncio.Event()  # an item, since somebody began to wait for it

    async def run(self) -> None:
        """Feed until every item has a result, or another gateway has the lease. Raises what is a bug."""
        batch_id = self._batch.batch_id
        log.info("batch.fed", batch_id=batch_id, epoch=self._batch.epoch, results=sum(self._has_result))
        verdict = self._verdict() or await self._feed_until_verdict()
        if verdict in (_Verdict.CANCELLED, _Verdict.EXPIRED, _Verdict.DELETED):
            verdict = await self._end_rest(verdict)
        log.info("batch.left", batch_id=batch_id, epoch=self._batch.epoch, why=verdict.name.lower())
        self._parts.bells.ring(batch_id)

    async def give_up_lease(self) -> None:
        """Let another gateway go on at once. Raises the errors of `Retry`."""
        try:
            await self._renew(lease_ms=0)
        except LeaseLost:
            return

    # -- the lease ------------------------------------------------------------------------------------------------

    def _verdict(self) -> _Verdict | None:
        if self._batch.is_deleted:
            return _Verdict.DELETED
        if self._batch.state is BatchState.CANCELLING:
            return _Verdict.CANCELLED
        return _Verdict.EXPIRED if self._is_overdue else None

    async def _renew(self, *, lease_ms: int | None = None) -> None:
        """Raises LeaseLost."""
        lease_ms = self._settings.lease_ms if lease_ms is None else lease_ms
        asked = self._clock()
        lease = await self._parts.batches.renew(
            self._batch, lease_ms, num_running=len(self._running), fed_below=self._fed_below
        )
        self._batch, self._is_overdue = lease.batch, lease.remaining_ms <= 0
        self._leased_until = asked + lease_ms / 1000

    async def _keep_lease(self) -> _Verdict:
        while True:
            await asyncio.sleep(self._settings.renew_s)
            try:
                await self._renew()
            except LeaseLost:
                return _Verdict.LOST
            except errors.ServingError as error:
                log.warning("batch.store_unavailable", batch_id=self._batch.batch_id, reason=error.reason)
                continue
            verdict = self._verdict()
            if verdict is not None:
                return verdict

    async def _reserve(self, index: int) -> None:
        """Note, before an item is fed, how far items may have been fed: who ends them after us looks no further."""
        async with self._reserving:
            while index >= self._fed_below:
                self._fed_below = index + 1 + 4 * self._settings.window
                await self._patiently(self._renew)

    # -- feeding --------------------------------------------------------------------------------------------------

    async def _feed_until_verdict(self) -> _Verdict:
        keeping = asyncio.create_task(self._keep_lease())
        feeding = asyncio.create_task(self._feed())
        try:
            await asyncio.wait({keeping, feeding}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (keeping, feeding):
                task.cancel()
            await asyncio.gather(keeping, feeding, return_exceptions=True)
        # What ended while it was stopped counts before what stopped it.
        for task in (feeding, keeping):
            if not task.cancelled():
                return task.result()
        raise asyncio.CancelledError

    async def _feed(self) -> _Verdict:
        verdict = _Verdict.DONE
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write())
                async for index, data in self._waiting_items():
                    await self._slots.acquire()
                    await self._reserve(index)
                    self._running[index] = ""
                    group.create_task(self._run_item(index, data))
        except* LeaseLost:
            verdict = _Verdict.LOST
        return verdict

    async def _waiting_items(self) -> AsyncGenerator[tuple[int, bytes | errors.SealBroken]]:
        """Yield index and content of the items without a result, in order. Raises LeaseLost."""
        total, index = self._batch.total, 0
        while index < total:
            if self._has_result[index]:
                index += 1
                continue
            tenant, batch_id, window = self._batch.owner.tenant, self._batch.batch_id, self._settings.window
            page = await self._patiently(partial(self._parts.batches.items, tenant, batch_id, index, window))
            for data in page:
                if index < total and not self._has_result[index]:
                    yield index, data
                index += 1

    async def _patiently(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        """Ask the store until it answers. Raises ServingError for what no waiting helps."""
        while True:
            try:
                return await ask()
            except errors.ServingError as error:
                if not is_for_now(error):
                    raise
                log.warning("batch.store_unavailable", batch_id=self._batch.batch_id, reason=error.reason)
                await asyncio.sleep(_RETRY_S)

    async def _run_item(self, index: int, data: bytes | errors.SealBroken) -> None:
        result = await self._result_of(index, data)
        self._results.put_nowait((result, self._running.pop(index)))
        self._has_ended.set()

    async def _result_of(self, index: int, data: bytes | errors.SealBroken) -> Result:
        item = pb.BatchItem()
        try:
            if isinstance(data, errors.SealBroken):
                raise data
            item.ParseFromString(data)
            return of_items.response_result(index, item, await self._response(index, item))
        except GenerationEndedError as ended:
            return of_items.error_result(index, item, ended.error, ended.usage)
        except errors.ServingError as error:
            return of_items.error_result(index, item, error)
        except DecodeError:
            return of_items.error_result(index, item, errors.SealBroken("the item cannot be read", reason="MALFORMED"))
        except Exception as error:  # noqa: BLE001 - an item's fault must not hold up the others
            log.error("batch.item_failed", batch_id=self._batch.batch_id, index=index, frames=frames_of(error))
            return of_items.error_result(index, item, errors.GenerationFailed("internal error", reason="INTERNAL"))

    async def _response(self, index: int, item: pb.BatchItem) -> Message:
        """Run an item to its end. Raises GenerationEndedError and ServingError."""
        runner, request = self._prepare(index, item)
        num_lost = 0
        while True:
            try:
                running, caller = await self._submit(index, item, runner, request)
                try:
                    return await self._wait(runner, running, caller)
                finally:
                    runner.let_go(running)
            except (errors.GenerationNotFound, errors.Aborted):
                # The store lost it, or somebody else listens: by its key it is found again, or made anew.
                num_lost += 1
                if num_lost > _MAX_LOST:
                    raise
                await asyncio.sleep(_RETRY_S)

    def _prepare(self, index: int, item: pb.BatchItem) -> tuple[Runner, Any]:
        """Return what runs an item, and its request as it is run. Raises InvalidRequest."""
        kind = item.WhichOneof("request") or ""
        runner = self._parts.runners.get(kind)
        if runner is None:
            raise errors.InvalidRequest("is not served in batches", reason="UNSUPPORTED", field=kind)
        given = getattr(item, kind)
        request = type(given)()
        request.CopyFrom(given)
        request.idempotency_key = f"{self._batch.salt}.{index}"
        request.priority = of_items.priority_message(self._batch.priority)
        if not request.HasField("time_limit"):
            request.time_limit.FromSeconds(_LONGEST_S)
        return runner, request

    async def _submit(self, index: int, item: pb.BatchItem, runner: Runner, request: Any) -> tuple[RunningItem, Caller]:
        """Queue an item once there is room. Raises ServingError for what no waiting helps."""
        attempt = 0
        kind = item.WhichOneof("request") or ""
        async with self._submitting:
            while True:
                if self._clock() >= self._leased_until:  # what another feeder does is not to be done here too
                    await asyncio.sleep(_RETRY_S)
                    continue
                try:
                    caller = await self._parts.owners.caller(self._batch.owner)
                    of_items.check_rights(kind, request.model, caller, reveal_models=self._settings.reveal_models)
                    running = await runner.submit(request, caller)
                    self._running[index] = running.generation_id
                    return running, caller
                except errors.ServingError as error:
                    if not is_for_now(error):
                        raise
                    if error.reason not in self._told:  # once: this is the usual state of a large batch
                        self._told.add(error.reason)
                        log.info("batch.no_room", batch_id=self._batch.batch_id, reason=error.reason)
                    attempt += 1
                    if await self._has_room_within(pause_s(attempt, error, self._rng), error):
                        attempt = 0

    async def _has_room_within(self, seconds: float, error: errors.ServingError) -> bool:
        """Wait; return True, and sooner, where the queue is full and an item of ours that ends makes room."""
        if not isinstance(error, errors.QueueFull):
            await asyncio.sleep(seconds)
            return False
        self._has_ended.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_ended.wait(), seconds)
        return self._has_ended.is_set()

    async def _wait(self, runner: Runner, running: RunningItem, caller: Caller) -> Message:
        attempt = 0
        while True:
            try:
                return await runner.response(running, caller)
            except errors.ServingError as error:
                if not is_for_now(error):
                    raise
                await asyncio.sleep(pause_s(attempt, error, self._rng))
                attempt += 1

    # -- results --------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        """Store results as they come, until the batch has ended. Raises LeaseLost."""
        while self._num_left:
            found = [await self._results.get()]
            size = len(found[0][0].body)
            while not self._results.empty() and len(found) < _WRITTEN_AT_ONCE and size < _MAX_WRITTEN_BYTES:
                found.append(self._results.get_nowait())
                size += len(found[-1][0].body)
            await self._store([result for result, _ in found])
            for result, generation_id in found:
                self._slots.release()
                # What failed stays as long as all do: an operator may want to look at it.
                if generation_id and result.outcome is Outcome.SUCCEEDED:
                    self._parts.forgetting.add(self._batch.owner.tenant, generation_id)

    async def _store(self, results: list[Result]) -> None:
        """Raises LeaseLost."""
        await self._patiently(partial(self._parts.batches.finish, self._batch, results))
        for result in results:
            self._has_result[result.item_index] = True
        self._num_left -= len(results)
        self._parts.bells.ring(self._batch.batch_id)

    # -- the end before its time ----------------------------------------------------------------------------------

    async def _end_rest(self, verdict: _Verdict) -> _Verdict:
        """End the jobs of all items without a result; give these one, or erase the batch."""
        try:
            left = []
            while not self._results.empty():
                left.append(self._results.get_nowait()[0])
            if left and verdict is not _Verdict.DELETED:
                await self._store(left)
            await self._end_jobs(verdict)
        except LeaseLost:
            return _Verdict.LOST
        if verdict is _Verdict.DELETED:
            await self._patiently(partial(self._parts.batches.erase, self._batch))
        return verdict

    async def _end_jobs(self, verdict: _Verdict) -> None:
        """Raises LeaseLost."""
        page: list[Result] = []
        async for index, data in self._waiting_items():
            item = pb.BatchItem()
            if isinstance(data, bytes):
                item.ParseFromString(data)
            if index < self._fed_below:
                await self._patiently(partial(self._end_job, index, item))
            if verdict is _Verdict.DELETED:
                if index >= self._fed_below:
                    break
                continue
            page.append(_ended_result(index, item, verdict))
            if len(page) >= _ENDED_AT_ONCE:
                await self._patiently(self._renew)
                await self._store(page)
                page = []
        if page:
            await self._store(page)

    async def _end_job(self, index: int, item: pb.BatchItem) -> None:
        """End and erase the job of an item, if it has one: by this feeder, or one before it."""
        tenant = self._batch.owner.tenant
        try:
            runner, request = self._prepare(index, item)
        except errors.InvalidRequest:
            return  # no gateway could have run it
        generation_id = await runner.find(request, tenant)
        if generation_id is not None:
            await erase_job(self._parts.queue, tenant, generation_id)


def _ended_result(index: int, item: pb.BatchItem, verdict: _Verdict) -> Result:
    if verdict is _Verdict.CANCELLED:
        return of_items.cancelled_result(index, item)
    late = errors.DeadlineExceeded("the batch had run for as long as it may", reason="BATCH_EXPIRED")
    return of_items.error_result(index, item, late)
