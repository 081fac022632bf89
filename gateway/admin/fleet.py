"""FleetService: workers, generations in flight and those that failed; the fleet as it goes; draining workers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Container
from typing import Any, Final

import grpc.aio

from common import keys
from common.dead_letters import MAX_LETTERS, DeadLetters, LetterResult, Outcome, mark_of
from common.errors import GenerationNotFound, InvalidRequest, ModelNotFound, Unavailable, WorkerNotFound
from common.job_queue import JobQueue
from common.registry import ModelEntry
from gateway import audit
from gateway import dead_letters as letters
from gateway.admin.fleet_messages import generation_message, worker_message
from gateway.admin.fleet_snapshots import MIN_INTERVAL_S, FleetSnapshots
from gateway.catalog import Catalog
from gateway.identity.caller import current_caller
from gateway.model_servicer import page_size
from gateway.validation import milliseconds
from torchrelay.admin.v1beta1 import fleet_pb2, fleet_pb2_grpc

_MAX_INFLIGHT: Final = 100_000
_INTERVAL_S: Final = 1.0
_MAX_INTERVAL_S: Final = 60.0


class FleetServicer(fleet_pb2_grpc.FleetServiceServicer):
    """Shows workers and generations of all models and tenants, acts on dead letters, and has workers drain.

    `num_streams` tells how many generations' streams this gateway serves now.
    """

    def __init__(
        self, catalog: Catalog, queue: JobQueue, dead_letters: DeadLetters, num_streams: Callable[[], int]
    ) -> None:
        self._catalog = catalog
        self._queue = queue
        self._dead_letters = dead_letters
        self._snapshots = FleetSnapshots(catalog, queue, num_streams)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End the streams of all who watch."""
        self._stopping.set()

    async def ListWorkers(  # noqa: N802
        self, request: fleet_pb2.ListWorkersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> fleet_pb2.ListWorkersResponse:
        entries = self._entries(request.model)
        found = await asyncio.gather(*(self._queue.workers(entry.card.shard) for entry in entries))
        workers = [
            worker_message(entry, worker)
            for entry, live in zip(entries, found, strict=True)
            for worker in sorted(live, key=lambda worker: worker.worker_id)
        ]
        return fleet_pb2.ListWorkersResponse(workers=workers)

    async def ListGenerations(  # noqa: N802
        self, request: fleet_pb2.ListGenerationsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> fleet_pb2.ListGenerationsResponse:
        size = page_size(request.page_size)
        infos: list[fleet_pb2.GenerationInfo] = []
        total = 0
        for entry in self._entries(request.model):
            records = await self._queue.list_inflight(entry.card.shard, _MAX_INFLIGHT)
            total += len(records)
            records.sort(key=lambda record: (record.created_ms, record.generation_id))
            infos += [generation_message(entry, record) for record in records[:size]]
        return fleet_pb2.ListGenerationsResponse(generations=infos, total_size=total)

    async def ListDeadLetters(  # noqa: N802
        self, request: fleet_pb2.ListDeadLettersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> fleet_pb2.ListDeadLettersResponse:
        after = letters.mark_from_token(request.page_token)
        size = page_size(request.page_size)
        entries = {entry.card.shard: entry for entry in self._entries(request.model)}
        found, total = await self._dead_letters.newest(list(entries), size + 1, after)
        page = found[:size]
        return fleet_pb2.ListDeadLettersResponse(
            dead_letters=[
                letters.letter_message(entries[keys.shard_of(record.generation_id)], record) for record in page
            ],
            next_page_token=letters.token_of(mark_of(page[-1])) if len(found) > size else "",
            total_size=total,
        )

    async def RetryDeadLetters(  # noqa: N802
        self, request: fleet_pb2.RetryDeadLettersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> fleet_pb2.RetryDeadLettersResponse:
        letters.check_choice(request)
        ids = list(request.generation_ids) or await self._ids_of_model(request.model)
        # Nobody would end what is queued for a model that is not registered any more: see Upkeep.
        shards = {entry.card.shard for entry in self._entries("")}
        served = [generation_id for generation_id in ids if _is_of(shards, generation_id)]
        results = {result.generation_id: result for result in await self._dead_letters.retry(served)}
        found = [results.get(name, LetterResult(name, Outcome.NOT_FOUND)) for name in dict.fromkeys(ids)]
        audit.note(letters=len(found), retried=sum(one.outcome is Outcome.RETRIED for one in found))
        return fleet_pb2.RetryDeadLettersResponse(results=letters.result_messages(found))

    async def PurgeDeadLetters(  # noqa: N802
        self, request: fleet_pb2.PurgeDeadLettersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> fleet_pb2.PurgeDeadLettersResponse:
        letters.check_choice(request)
        ids = list(request.generation_ids) or await self._ids_of_model(request.model)
        results = await self._dead_letters.purge(ids)
        audit.note(letters=len(results), purged=sum(one.outcome is Outcome.PURGED for one in results))
        return fleet_pb2.PurgeDeadLettersResponse(results=letters.result_messages(results))

    async def WatchFleet(  # noqa: N802
        self, request: fleet_pb2.WatchFleetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[fleet_pb2.WatchFleetResponse]:
        interval_s = _interval_s(request)
        max_generations = page_size(request.page_size) if request.include_generations else 0
        while not self._stopping.is_set():
            snapshot = await self._snapshots.get(request.model, max_generations)
            yield fleet_pb2.WatchFleetResponse(snapshot=snapshot)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), interval_s)
        raise Unavailable("this gateway is stopping; any other one goes on", reason="GATEWAY_STOPPING")

    async def DrainWorker(  # noqa: N802
        self, request: fleet_pb2.DrainWorkerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> fleet_pb2.DrainWorkerResponse:
        if bool(request.worker_id) == bool(request.model):
            raise InvalidRequest(
                "exactly one of worker_id and model is required",
                reason="FIELD_CONFLICT" if request.model else "FIELD_REQUIRED",
                field="worker_id",
            )
        entries = self._entries(request.model)
        if request.model and not entries:
            raise ModelNotFound("no such model")
        requested_by = current_caller().key_id or "local"
        found = await asyncio.gather(*(self._drain(entry, request.worker_id, requested_by) for entry in entries))
        workers = [worker for part in found for worker in part]
        audit.note(drained=" ".join(worker.worker_id for worker in workers))
        if request.worker_id and not workers:
            raise WorkerNotFound("no such worker is alive; one that was started again has another id")
        return fleet_pb2.DrainWorkerResponse(workers=workers)

    async def _drain(self, entry: ModelEntry, worker_id: str, requested_by: str) -> list[fleet_pb2.Worker]:
        """Ask one worker of a model revision, or all if `worker_id` is empty. Returns those that were asked."""
        shard = entry.card.shard
        live = [one for one in await self._queue.workers(shard) if worker_id in ("", one.worker_id)]
        asked = [one.worker_id for one in live if await self._queue.drain(shard, one.worker_id, requested_by)]
        if not asked:
            return []
        return [
            worker_message(entry, worker)
            for worker in sorted(await self._queue.workers(shard), key=lambda worker: worker.worker_id)
            if worker.worker_id in asked
        ]

    async def _ids_of_model(self, model: str) -> list[str]:
        shards = [entry.card.shard for entry in self._entries(model)]
        found, _ = await self._dead_letters.newest(shards, MAX_LETTERS * len(shards))
        return [record.generation_id for record in found]

    def _entries(self, model: str) -> list[ModelEntry]:
        """Return all revisions of one model or of all: an older revision's workers may still be at work.

        Raises BackendUnavailable before the registry was read: nothing is taken for unknown then.
        """
        return [entry for entry in self._catalog.all_entries() if not model or entry.card.name == model]


def _is_of(shards: Container[str], generation_id: str) -> bool:
    try:
        return keys.shard_of(generation_id) in shards
    except GenerationNotFound:
        return False


def _interval_s(request: fleet_pb2.WatchFleetRequest) -> float:
    """Raises InvalidRequest."""
    if not request.HasField("interval"):
        return _INTERVAL_S
    interval_s = milliseconds(request.interval, "interval", minimum=int(MIN_INTERVAL_S * 1000)) / 1000
    if interval_s > _MAX_INTERVAL_S:
        raise InvalidRequest(
            "must be at most 60 s", reason="FIELD_OUT_OF_RANGE", field="interval", limit=_MAX_INTERVAL_S, got=interval_s
        )
    return interval_s
