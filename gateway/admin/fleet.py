"""FleetService: workers, generations in flight and those that failed."""

from __future__ import annotations

import asyncio
from collections.abc import Container
from typing import Any, Final

import grpc.aio

from common import keys
from common.dead_letters import MAX_LETTERS, DeadLetters, LetterResult, Outcome, mark_of
from common.errors import GenerationNotFound
from common.job_queue import JobQueue
from common.jobs import GenerationRecord, JobState, LiveWorker
from common.registry import ModelEntry
from gateway import audit, convert
from gateway import dead_letters as letters
from gateway.catalog import Catalog
from gateway.model_servicer import page_size
from torchrelay.admin.v1beta1 import fleet_pb2, fleet_pb2_grpc

_MAX_INFLIGHT: Final = 100_000


class FleetServicer(fleet_pb2_grpc.FleetServiceServicer):
    """Shows workers and generations of all models and tenants, and acts on dead letters."""

    def __init__(self, catalog: Catalog, queue: JobQueue, dead_letters: DeadLetters) -> None:
        self._catalog = catalog
        self._queue = queue
        self._dead_letters = dead_letters

    async def ListWorkers(  # noqa: N802
        self, request: fleet_pb2.ListWorkersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> fleet_pb2.ListWorkersResponse:
        entries = self._entries(request.model)
        found = await asyncio.gather(*(self._queue.workers(entry.card.shard) for entry in entries))
        workers = [
            _worker(entry, worker)
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
            infos += [_generation(entry, record) for record in records[:size]]
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


def _worker(entry: ModelEntry, worker: LiveWorker) -> fleet_pb2.Worker:
    message = fleet_pb2.Worker(worker_id=worker.worker_id, model=entry.card.name, model_revision=entry.card.revision)
    info = worker.info
    if info is None:
        return message
    stats = info.stats
    message.host = info.host
    message.device = info.device
    message.version = info.versions.get("torchrelay", "")
    message.num_running = info.num_running
    message.num_waiting = info.num_waiting
    message.draining = info.draining
    message.num_blocks = int(stats.get("num_blocks", 0))
    message.num_free_blocks = int(stats.get("num_free_blocks", 0))
    message.block_size = int(stats.get("block_size", 0))
    message.num_steps = int(stats.get("num_steps", 0))
    message.num_preemptions = int(stats.get("num_preemptions", 0))
    message.generated_tokens = int(stats.get("generated_tokens", 0))
    message.prompt_tokens = int(stats.get("prompt_tokens", 0))
    message.cached_prompt_tokens = int(stats.get("cached_prompt_tokens", 0))
    message.last_step_time.FromMicroseconds(int(stats.get("last_step_ms", 0) * 1000))
    return message


def _generation(entry: ModelEntry, record: GenerationRecord) -> fleet_pb2.GenerationInfo:
    info = fleet_pb2.GenerationInfo(
        generation_id=record.generation_id,
        model=entry.card.name,
        tenant=record.tenant,
        state=convert.state_of(record),
        worker_id=record.worker_id,
        create_time=convert.timestamp(record.created_ms),
        usage=convert.usage_message(record.usage),
        num_claims=record.num_claims,
    )
    if record.state is JobState.QUEUED:
        info.place = max(0, record.place - 1)
    return info
