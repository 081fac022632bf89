"""Jobs that run without a call: queued, listened to, found again by their idempotency keys, read when they end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, TypeAlias

from google.protobuf.message import Message

from common import errors, keys
from common.generation import EventBody
from common.job_queue import JobQueue
from common.jobs import GenerationRecord, NewJob, ReplyItem
from gateway import convert
from gateway.admission import Admission
from gateway.catalog import Catalog
from gateway.delivery import Subscription
from gateway.generations import Generations
from gateway.identity.caller import Caller
from gateway.status import GenerationEndedError
from gateway.stream import StreamFactory, accepted_of
from gateway.tasks.core import Tasks, answer
from torchrelay.v1 import generation_pb2 as pb

_LISTEN_S: Final = 15.0  # silence after which a job is looked at

Prepare: TypeAlias = Callable[[Any, Caller], Awaitable[tuple[NewJob, pb.Accepted]]]
Read: TypeAlias = Callable[[str, Caller], Awaitable[tuple[Callable[[], Message], GenerationRecord]]]


class JobRunner:
    """Runs requests of some kinds as jobs; a `Runner`. Methods raise ServingError."""

    def __init__(
        self,
        queue: JobQueue,
        admission: Admission,
        streams: StreamFactory,
        catalog: Catalog,
        prepare: Prepare,
        read: Read,
    ) -> None:
        """`prepare` makes a job of a request; `read` returns what makes the response of a job, and its record."""
        self._queue = queue
        self._admission = admission
        self._streams = streams
        self._catalog = catalog
        self._prepare = prepare
        self._read = read

    async def submit(self, request: Any, caller: Caller) -> Subscription:
        """Queue a request, or find the job that its idempotency key made; listen to it until `let_go`."""
        job, accepted = await self._prepare(request, caller)
        assert job.idempotency_key is not None
        earlier = self._catalog.earlier_shards(accepted.model)
        known = await self._queue.lookup_idempotency(earlier, job.tenant, job.idempotency_key, job.request_digest)
        while True:
            subscription = self._streams.listen(known or accepted.generation_id, caller.tenant, in_background=True)
            try:
                if known is not None:
                    await self._queue.attach(known, caller.tenant, attach_id=subscription.attach_id)
                    subscription.look()  # what it did before is not told again
                    return subscription
                shard = keys.shard_of(accepted.generation_id)
                enqueued = await self._admission.enqueue(shard, job, caller, attach_id=subscription.attach_id)
                if not enqueued.duplicate:
                    return subscription
                known = enqueued.generation_id
            except BaseException:
                self._streams.let_go(subscription)
                raise
            self._streams.let_go(subscription)

    async def response(self, running: Subscription, caller: Caller) -> Message:
        """Wait for a job's end; return its response. Raises GenerationEndedError, and Superseded."""
        generation_id = running.generation_id
        while True:
            items: tuple[ReplyItem, ...] | None = ()
            while items is not None and not any(item.kind.is_terminal for item in items):
                await running.wait(_LISTEN_S)
                items = running.take()
            make, record = await self._read(generation_id, caller)
            if record.state.is_final:
                break
            if record.gateway_id != self._queue.gateway_id:  # our lease had ended: what happens is not told here
                await self._queue.attach(generation_id, caller.tenant, attach_id=running.attach_id)
                running.look()
        failure = convert.failure_of(record)
        if failure is not None:
            raise GenerationEndedError(failure, convert.usage_message(record.usage) if record.started else None)
        return make()

    def let_go(self, running: Subscription) -> None:
        """Listen no longer; the job goes on."""
        self._streams.let_go(running)

    async def find(self, request: Any, tenant: str) -> str | None:
        """Return the job that the key of a request made, of any revision of its model that is still known."""
        try:
            shards = [self._catalog.entry(request.model).card.shard, *self._catalog.earlier_shards(request.model)]
        except errors.NotFound:
            return None
        return await self._queue.find_by_key(shards, tenant, request.idempotency_key)


class GenerationJobs:
    """GenerateRequests as jobs."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations

    async def prepare(self, request: pb.GenerateRequest, caller: Caller) -> tuple[NewJob, pb.Accepted]:
        # All that is set, none by name: a field that only one of the two has is an error, and not lost.
        submission = pb.SubmitGenerationRequest(**{field.name: value for field, value in request.ListFields()})
        return await self._generations.unattended(submission, caller)

    async def read(self, generation_id: str, caller: Caller) -> tuple[Callable[[], Message], GenerationRecord]:
        generation, record = await self._generations.read_whole(generation_id, caller)
        return lambda: pb.GenerateResponse(generation=generation), record


class TaskJobs:
    """Requests of tasks as jobs."""

    def __init__(self, tasks: Tasks, queue: JobQueue) -> None:
        self._tasks = tasks
        self._queue = queue

    async def prepare(self, request: Any, caller: Caller) -> tuple[NewJob, pb.Accepted]:
        return await self._tasks.unattended(request, caller)

    async def read(self, generation_id: str, caller: Caller) -> tuple[Callable[[], Message], GenerationRecord]:
        result, sequence = None, 0
        while True:
            part = await self._queue.read_log(generation_id, caller.tenant, sequence)
            for event in part.events:
                sequence = event.sequence
                if isinstance(event.body, EventBody) and event.body.result is not None:
                    result = event.body.result
            if not part.more or not part.events:
                return partial(answer, result, part.record, accepted_of(part.record)), part.record
