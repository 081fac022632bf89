"""The way into the queue: quota is reserved, then the job is queued; what did not get in gives its quota back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final

from common import errors
from common.job_queue import JobQueue
from common.jobs import Enqueued, JobState, NewJob, Settlement
from common.quotas import QuotaMeter, Reservation
from gateway.identity.caller import Caller

# After these nothing was queued. After any other failure it may have been: then the job's end settles the reservation,
# or a later look finds that there is no such job.
_NOT_QUEUED: Final = (
    errors.InvalidRequest,
    errors.ResourceExhausted,
    errors.FailedPrecondition,
    errors.DeadlineExceeded,
    errors.BackendRefused,
)


_SETTLED_AT_ONCE: Final = 200  # by one script, which must not hold the server for long
_MAX_ROUNDS: Final = 50
_MAX_UNKNOWN: Final = 10_000


class Admission:
    """Queues jobs on behalf of callers, within their quotas."""

    def __init__(
        self,
        queue: JobQueue,
        quotas: QuotaMeter,
        *,
        unknown_s: float = 30,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`unknown_s`: after so long, a call to the store has taken effect or never will."""
        self._queue = queue
        self._quotas = quotas
        self._unknown_s = unknown_s
        self._clock = clock
        self._unknown: dict[str, tuple[str, float]] = {}  # reservations whose job may not exist: tenant, since when

    async def enqueue(self, shard: str, job: NewJob, caller: Caller, *, attach_id: str = "") -> Enqueued:
        """Queue a job whose `generation_id` is set; as `JobQueue.enqueue`, and besides raises what `reserve` raises.

        A repeat of an idempotency key finds its generation whatever is left of the quota.
        """
        if not job.has_reservation:
            return await self._queue.enqueue(shard, job, attach_id=attach_id)
        assert job.generation_id is not None
        sampling = job.body.sampling
        wanted = Reservation(
            job.tenant,
            job.quota_id,
            job.generation_id,
            job.body.num_prompt_tokens + sampling.max_tokens * sampling.num_sequences,
        )
        is_known = False
        try:
            try:
                await self._quotas.reserve(wanted, caller.policy.quotas, caller.grants.quotas)
            except (errors.Limited, errors.InvalidRequest):
                is_known = True  # nothing was reserved
                earlier = await self._earlier(shard, job)
                if earlier is None:
                    raise
                return Enqueued(earlier, True, 0, JobState.QUEUED)
            try:
                enqueued = await self._queue.enqueue(shard, job, attach_id=attach_id)
            except _NOT_QUEUED:
                await self._quotas.release(job.tenant, wanted.reservation_id)
                is_known = True
                raise
            if enqueued.duplicate:
                await self._quotas.release(job.tenant, wanted.reservation_id)
            is_known = True
            return enqueued
        finally:
            if not is_known and len(self._unknown) < _MAX_UNKNOWN:
                self._unknown[wanted.reservation_id] = (job.tenant, self._clock())

    async def _earlier(self, shard: str, job: NewJob) -> str | None:
        if job.idempotency_key is None:
            return None
        return await self._queue.lookup_idempotency([shard], job.tenant, job.idempotency_key, job.request_digest)

    async def settle(self, shards: Iterable[str]) -> int:
        """Give back what ended generations did not use, and what was reserved for jobs that do not exist.

        Part of every gateway's upkeep; returns how many generations there were. Two gateways may take the same ones: a
        reservation is settled once.
        """
        num_settled = sum(await asyncio.gather(*map(self._settle, shards)))
        await self._release_unknown()
        return num_settled

    async def _release_unknown(self) -> None:
        """A call that ended, or lost the store, between reserving and queueing: its job may have come into being."""
        due = self._clock() - self._unknown_s
        for generation_id, (tenant, since) in list(self._unknown.items()):
            if since > due:
                break  # the rest is younger
            try:
                await self._queue.get(generation_id, tenant)
            except errors.GenerationNotFound:
                await self._quotas.release(tenant, generation_id)
            except errors.SealBroken:
                pass  # it exists; what it says is of no interest here
            self._unknown.pop(generation_id, None)

    async def _settle(self, shard: str) -> int:
        num_settled = 0
        for _ in range(_MAX_ROUNDS):
            found = await self._queue.settlements(shard, _SETTLED_AT_ONCE)
            by_tenant: dict[str, list[Settlement]] = {}
            for settlement in found:
                by_tenant.setdefault(settlement.tenant, []).append(settlement)
            for tenant, settlements in by_tenant.items():
                await self._quotas.settle(tenant, [(one.generation_id, one.used_tokens) for one in settlements])
                await self._queue.forget_settlements(shard, settlements)
            num_settled += len(found)
            if len(found) < _SETTLED_AT_ONCE:
                break
        return num_settled
