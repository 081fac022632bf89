"""Tasks on behalf of callers, whatever door they came by: queued, waited for, read back."""

from __future__ import annotations

import hmac
from typing import Final

from common import errors, keys
from common.generation import JobBody, SamplingParams
from common.jobs import GenerationRecord, JobState, NewJob
from common.tasks import TaskResult, num_tokens
from common.telemetry.tracing import current_trace
from gateway import audit
from gateway import validation as check
from gateway.catalog import Catalog, ServedModel
from gateway.generations import Call, Generations, check_time_left
from gateway.identity.caller import Caller
from gateway.new_jobs import new_job
from gateway.progress import LogPosition
from gateway.rights import check_model
from gateway.secret import SharedSecret
from gateway.served_tasks import check_task
from gateway.settings import GatewaySettings
from gateway.status import GenerationEndedError
from gateway.stream import EventStream
from gateway.tasks.requests import TaskReader, TaskRequest, check_fields, name_of, num_chars
from gateway.tasks.responses import TaskResponse, response_of
from gateway.tokenization import MAX_INLINE_CHARS
from torchrelay.v1 import embedding_pb2 as epb
from torchrelay.v1 import generation_pb2 as pb

_REPEAT_GRACE_MS: Final = 30_000  # how long a job with an idempotency key goes on without its caller, who may repeat it
_BYTES_PER_NUMBER: Final = 4
_NOT_OF_THE_BODY: Final = ("idempotency_key", "time_limit", "priority")


class Tasks:
    """Tasks of every model in the catalog. Methods raise ServingError besides what they name."""

    def __init__(
        self,
        generations: Generations,
        catalog: Catalog,
        settings: GatewaySettings,
        secret: SharedSecret,
        max_log_bytes: int,
    ) -> None:
        """`max_log_bytes` is the most that a job's answer may take in the queue."""
        self._generations = generations
        self._catalog = catalog
        self._settings = settings
        self._secret = secret
        self._max_log_bytes = max_log_bytes
        self._readers: dict[str, TaskReader] = {}  # by shard

    async def run(self, request: TaskRequest, caller: Caller, call: Call) -> TaskResponse:
        """Queue a request and wait for its answer. The call is announced once it is queued.

        With an idempotency key it outlives its call for half a minute, in which a repeat finds it. Raises
        GenerationEndedError for one that ended in an error.
        """
        with self._generations.place(caller):
            check_time_left(call)
            grace_ms = _REPEAT_GRACE_MS if request.idempotency_key else 0
            job, accepted = await self._job(request, caller, call.time_remaining(), grace_ms)
            check_time_left(call)
            async with self._generations.open_job(job, accepted, caller, call) as (stream, accepted):
                return await _response(stream, accepted)

    async def submit(self, request: TaskRequest, caller: Caller, call: Call) -> pb.Accepted:
        """Queue a request that nobody waits for. A repeat with its idempotency key finds the same one."""
        check_time_left(call)
        job, accepted = await self._job(request, caller, None, attended=False)
        check_time_left(call)
        return await self._generations.submit_job(job, accepted, caller)

    async def response(self, generation_id: str, caller: Caller, call: Call) -> TaskResponse:
        """Wait for the answer to a request that was submitted. Raises GenerationNotFound, GenerationEndedError."""
        async with self._generations.resume(generation_id, caller, call, LogPosition()) as (stream, accepted):
            return await _response(stream, accepted)

    async def unattended(self, request: TaskRequest, caller: Caller) -> tuple[NewJob, pb.Accepted]:
        """Return the job of a request that nobody waits for, for others to queue. Raises what `_job` raises."""
        return await self._job(request, caller, None, attended=False)

    async def _job(
        self,
        request: TaskRequest,
        caller: Caller,
        call_remaining_s: float | None,
        grace_ms: int = 0,
        *,
        attended: bool = True,
    ) -> tuple[NewJob, pb.Accepted]:
        """Validate and tokenize. Raises InvalidRequest, NotFound and FailedPrecondition."""
        check_model(caller, check.check_model_name(request.model), reveal=self._settings.reveal_models)
        model = await self._catalog.get(request.model)
        card = model.card
        check_task(card, name_of(request))
        check_fields(request, card)
        self._check_answer_size(request, model)
        reader = self._reader(model)
        if num_chars(request) <= MAX_INLINE_CHARS:
            task = reader.read(request)
        else:
            task = await model.turns.run(caller.tenant, lambda: reader.read(request))
        tokens = num_tokens(task)
        most = min(card.kv_tokens or tokens, caller.grants.caps.max_context_tokens or tokens)
        if tokens > most:
            raise errors.InvalidRequest(
                f"the texts have {tokens} tokens together; at most {most} are taken in one request",
                reason="REQUEST_TOO_LARGE",
                limit=most,
                got=tokens,
            )
        accepted = pb.Accepted(
            generation_id=keys.new_generation_id(card.shard),
            model=card.name,
            model_revision=card.revision,
            prompt_tokens=tokens,
        )
        job = new_job(
            request,
            caller,
            accepted,
            JobBody(prompt_token_ids=(), sampling=SamplingParams(max_tokens=0), task=task, trace=current_trace()),
            kv_tokens=(tokens, tokens),
            digest=await self._digest(request) if request.idempotency_key or audit.is_kept() else b"",
            grace_ms=grace_ms,
            call_remaining_s=call_remaining_s,
            attended=attended,
        )
        return job, accepted

    def _check_answer_size(self, request: TaskRequest, model: ServedModel) -> None:
        """Refuse vectors that could not be stored, before they are computed."""
        encoder = model.card.encoder
        if not isinstance(request, epb.EmbedRequest) or encoder is None:
            return
        each = _BYTES_PER_NUMBER * (request.dimensions or encoder.embedding_dimensions)
        most = self._max_log_bytes // (each + 64)
        if len(request.texts) > most:
            raise errors.InvalidRequest(
                f"vectors of so many texts exceed the limit on stored bytes; at most {most} are taken",
                reason="FIELD_OUT_OF_RANGE",
                field="texts",
                limit=most,
                got=len(request.texts),
            )

    def _reader(self, model: ServedModel) -> TaskReader:
        shard = model.card.shard
        reader = self._readers.get(shard)
        if reader is None or reader.codec is not model.codec:
            known = self._catalog.shards()
            self._readers = {name: one for name, one in self._readers.items() if name in known}
            reader = self._readers[shard] = TaskReader(model.codec, model.card.context_tokens)
        return reader

    async def _digest(self, request: TaskRequest) -> bytes:
        """Return what must be equal when an idempotency key is used again; keyed, so that it says nothing of a text."""
        body = type(request)()
        body.CopyFrom(request)  # type: ignore[arg-type]  # of its own type
        for name in _NOT_OF_THE_BODY:
            body.ClearField(name)
        kind = request.DESCRIPTOR.full_name.encode()
        return hmac.digest(
            await self._secret.get(), kind + b"\0" + body.SerializeToString(deterministic=True), "sha256"
        )


async def _response(stream: EventStream, accepted: pb.Accepted) -> TaskResponse:
    """Wait for a job's end. Raises GenerationEndedError."""
    async for _ in stream.events():
        pass
    assert stream.record is not None, "the stream has not ended"
    return answer(stream.result, stream.record, accepted)


def answer(result: TaskResult | None, record: GenerationRecord, accepted: pb.Accepted) -> TaskResponse:
    """Return the answer of a job that has ended, and not failed. Raises GenerationEndedError and ResultLost."""
    usage = pb.Usage(prompt_tokens=record.usage.prompt_tokens)
    if result is not None:
        return response_of(result, accepted, usage)
    if record.state is JobState.CANCELLED:
        raise GenerationEndedError(errors.Aborted("the request was cancelled", reason="CANCELLED"), usage)
    if record.state is JobState.EXPIRED:
        late = errors.DeadlineExceeded("the time limit passed before there was an answer", reason="TIME_LIMIT")
        raise GenerationEndedError(late, usage)
    raise errors.ResultLost  # it ended well, and what it came to is gone
