"""The way into the queue: quota is reserved, then the job is queued; what did not get in gives its quota back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

import structlog

from common import errors
from common.job_queue import JobQueue
from common.jobs import Enqueued, NewJob, Settlement
from common.quotas import QuotaMeter, Reservation
from gateway.identity.caller import Caller

log = structlog.get_logger()

# After these nothing was queued. After any other failure it may have been: the job's end then settles the reservation,
# or it lapses.
_NOT_QUEUED: Final = (
    errors.InvalidRequest,
    errors.ResourceExhausted,
    errors.FailedPrecondition,
    errors.DeadlineExceeded,
    errors.BackendRefused,
)


class Admission:
    """Queues jobs on behalf of callers, within their quotas."""

    def __init__(self, queue: JobQueue, quotas: QuotaMeter) -> None:
        self._queue = queue
        self._quotas = quotas

    async def enqueue(self, shard: str, job: NewJob, caller: Caller, *, attach_id: str = "") -> Enqueued:
        """Queue a job whose `generation_id` is set; as `JobQueue.enqueue`, and besides raises what `reserve` raises."""
        if not job.has_reservation:
            return await self._queue.enqueue(shard, job, attach_id=attach_id)
        assert job.generation_id is not None
        sampling = job.body.sampling
        wanted = Reservation(
            job.tenant,
            job.quota_id,
            job.generation_id,
            len(job.body.prompt_token_ids) + sampling.max_tokens * sampling.num_outputs,
        )
        await self._quotas.reserve(wanted, caller.policy.quotas, caller.grants.quotas)
        try:
            enqueued = await self._queue.enqueue(shard, job, attach_id=attach_id)
        except _NOT_QUEUED:
            await self._quotas.release(job.tenant, wanted.reservation_id)
            raise
        if enqueued.duplicate:
            await self._quotas.release(job.tenant, wanted.reservation_id)
        return enqueued

    async def settle(self, shards: Iterable[str]) -> int:
        """Give back what ended generations did not use. Part of every gateway's upkeep; returns how many there were.

        Two gateways may take the same ones: a reservation is settled once.
        """
        return sum(await asyncio.gather(*map(self._settle, shards)))

    async def _settle(self, shard: str) -> int:
        found = await self._queue.settlements(shard)
        by_tenant: dict[str, list[Settlement]] = {}
        for settlement in found:
            by_tenant.setdefault(settlement.tenant, []).append(settlement)
        for tenant, settlements in by_tenant.items():
            await self._quotas.settle(tenant, [(one.generation_id, one.used_tokens) for one in settlements])
            await self._queue.forget_settlements(shard, settlements)
        return len(found)
