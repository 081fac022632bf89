"""Generations on behalf of callers, whatever door they came by: queued, followed, read back."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from functools import lru_cache
from typing import Final, Protocol, TypeAlias

import msgspec
import structlog

from common import errors, keys
from common.deltas import merge_deltas, merge_scores
from common.generation import JobBody, OutputDelta, PromptScores
from common.grants import Caps
from common.job_queue import JobQueue
from common.jobs import Attachment, GenerationRecord, NewJob
from common.late_log import late_log
from common.telemetry.tracing import current_trace
from gateway import audit, beams, convert, sources, token_choice
from gateway import validation as check
from gateway.admission import Admission
from gateway.catalog import Catalog
from gateway.identity.caller import Caller
from gateway.new_jobs import new_job
from gateway.places import Places
from gateway.progress import LogPosition
from gateway.rights import check_model, priority_of
from gateway.secret import SharedSecret
from gateway.served_tasks import check_task
from gateway.settings import GatewaySettings
from gateway.stream import EventStream, StreamFactory, accepted_of
from torchrelay.v1 import generation_pb2 as pb

_LEAST_CALL_MS: Final = 5  # no first token comes sooner: a caller with less time has given up before it is queued
_MAX_SALTS: Final = 1024
_REPEAT_GRACE_MS: Final = 30_000  # for a call that is to be repeated
# Answers to an attach by which nothing was attached; any other failure may hide that it took effect.
_NOT_ATTACHED: Final = (errors.NotFound, errors.SequenceOutOfRange, errors.ResultLost)

log = structlog.get_logger()

NewGeneration: TypeAlias = pb.GenerateRequest | pb.StreamGenerateRequest | pb.SubmitGenerationRequest


class Call(Protocol):
    """What a door tells of a call, and is told."""

    def time_remaining(self) -> float | None:
        """Seconds until its deadline; None if it has none."""
        ...

    async def announce(self, generation_id: str) -> None:
        """Tell the caller at once that its generation exists: from here on the call can be resumed."""
        ...


class Generations:
    """Generations of every model in the catalog. Methods raise ServingError besides what they name."""

    def __init__(
        self,
        queue: JobQueue,
        admission: Admission,
        streams: StreamFactory,
        catalog: Catalog,
        settings: GatewaySettings,
        secret: SharedSecret,
    ) -> None:
        """`secret` keys digests and salts the prefix cache per tenant; all gateways of a deployment share it."""
        self._queue = queue
        self._admission = admission
        self._streams = streams
        self._catalog = catalog
        self._settings = settings
        self._secret = secret
        self._places = Places(settings.max_calls, settings.max_calls_per_tenant_share)

    @asynccontextmanager
    async def open(
        self, request: pb.GenerateRequest | pb.StreamGenerateRequest, caller: Caller, call: Call, part: int = 0
    ) -> AsyncIterator[tuple[EventStream, pb.Accepted]]:
        """Queue a generation and listen to it; at the end let go of it, however the call ended.

        `part` counts the generations of one call, which share its idempotency key. The call is announced once the
        generation is queued. Raises what `_job` and `Admission.enqueue` raise.
        """
        with self.place(caller):
            check_time_left(call)
            job, accepted = await self._job(request, caller, call.time_remaining(), part)
            check_time_left(call)  # what came before may have taken long, as a prompt of a megabyte does
            async with self.open_job(job, accepted, caller, call) as opened:
                yield opened

    @asynccontextmanager
    async def open_job(
        self, job: NewJob, accepted: pb.Accepted, caller: Caller, call: Call
    ) -> AsyncIterator[tuple[EventStream, pb.Accepted]]:
        """As `open`, of a job that is made already."""
        known = await self._known(accepted.model, job)
        subscription = self._streams.listen(known or accepted.generation_id, caller.tenant)
        stream: EventStream | None = None
        least_grace_ms = 0
        try:
            attachment: Attachment | None = None
            if known is None:
                shard = keys.shard_of(accepted.generation_id)
                try:
                    enqueued = await self._admission.enqueue(shard, job, caller, attach_id=subscription.attach_id)
                except errors.ReplicationUnconfirmed:
                    if job.idempotency_key is not None:
                        # The caller is told to repeat the call: what it then finds must not be a cancelled one.
                        least_grace_ms = _REPEAT_GRACE_MS
                    raise
                _note_accepted(enqueued.generation_id, job, accepted, is_repeat=enqueued.duplicate)
                if enqueued.duplicate:
                    known = enqueued.generation_id
                    await self._streams.close(subscription, ended=True)
                    subscription = self._streams.listen(known, caller.tenant)
                accepted.place = max(0, enqueued.place - 1)
                convert.set_wait(accepted, enqueued.expected_wait_ms)
            else:
                _note_accepted(known, job, accepted, is_repeat=True)
            if known is not None:
                attachment = await self._queue.attach(known, caller.tenant, attach_id=subscription.attach_id)
                accepted = accepted_of(attachment.record)
                accepted.replayed = True
            await call.announce(accepted.generation_id)
            stream = self._streams.open(subscription, caller.tenant, accepted, LogPosition(), attachment)
            attachment = None  # up to a page of the log, which the stream keeps only until it is sent
            yield stream, accepted
        finally:
            # An enqueue whose reply never came may have taken effect all the same: it is let go of too.
            ended = stream is not None and stream.ended
            await self._streams.close(subscription, ended=ended, least_grace_ms=least_grace_ms)

    async def submit(self, request: pb.SubmitGenerationRequest, caller: Caller, call: Call) -> pb.Accepted:
        """Queue a generation that nobody listens to."""
        check_time_left(call)
        job, accepted = await self._job(request, caller, None)
        check_time_left(call)
        return await self.submit_job(job, accepted, caller)

    async def submit_job(self, job: NewJob, accepted: pb.Accepted, caller: Caller) -> pb.Accepted:
        """As `submit`, of a job that is made already."""
        enqueued = await self._admission.enqueue(keys.shard_of(accepted.generation_id), job, caller)
        _note_accepted(enqueued.generation_id, job, accepted, is_repeat=enqueued.duplicate)
        if enqueued.duplicate:
            record = await self._queue.get(enqueued.generation_id, job.tenant)
            accepted = accepted_of(record)
            accepted.replayed = True
        else:
            await self._queue.detach(enqueued.generation_id)
            accepted.place = max(0, enqueued.place - 1)
            convert.set_wait(accepted, enqueued.expected_wait_ms)
        return accepted

    async def unattended(self, request: pb.SubmitGenerationRequest, caller: Caller) -> tuple[NewJob, pb.Accepted]:
        """Return the job of a generation that nobody listens to, for others to queue. Raises what `_job` raises."""
        return await self._job(request, caller, None)

    @asynccontextmanager
    async def resume(
        self, generation_id: str, caller: Caller, call: Call, position: LogPosition, chain_hash: bytes = b""
    ) -> AsyncIterator[tuple[EventStream, pb.Accepted]]:
        """Listen to a generation after a position, which moves with the stream; at the end let go of it.

        Raises ResultLost where the log does not continue `chain_hash`, unless that is empty.
        """
        with self.place(caller):
            subscription = self._streams.listen(generation_id, caller.tenant)
            stream: EventStream | None = None
            held = True
            try:
                try:
                    attachment = await self._queue.attach(
                        generation_id,
                        caller.tenant,
                        position.sequence,
                        chain_hash,
                        attach_id=subscription.attach_id,
                    )
                except _NOT_ATTACHED:
                    held = False
                    raise
                accepted = accepted_of(attachment.record)
                await call.announce(generation_id)
                stream = self._streams.open(subscription, caller.tenant, accepted, position, attachment)
                del attachment  # up to a page of the log, which the stream keeps only until it is sent
                yield stream, accepted
            finally:
                # An attach whose reply never came may have taken effect all the same: it is let go of too.
                await self._streams.close(subscription, ended=stream.ended if stream is not None else not held)

    async def _job(
        self, request: NewGeneration, caller: Caller, call_remaining_s: float | None, part: int = 0
    ) -> tuple[NewJob, pb.Accepted]:
        """Validate and tokenize a request. Raises InvalidRequest, NotFound and FailedPrecondition."""
        settings, grants = self._settings, caller.grants
        check_model(caller, check.check_model_name(request.model), reveal=settings.reveal_models)
        priority_of(request.priority, grants.priorities)  # what is not allowed is refused before anything takes long
        model = await self._catalog.get(request.model)
        check_task(model.card, sources.task_of(request.input))
        adapter = model.adapter(request.adapter)
        encoded = await model.encode(request.input, caller.tenant)
        prompt, num_source = encoded.token_ids, len(encoded.source_token_ids)
        card = model.card
        asked = sources.with_forced(request.config, encoded.forced_bos_token_id)
        if num_source:
            sources.check_config(asked, num_source, grants.caps)
        limits = check.ConfigLimits(
            card.context_tokens,
            card.vocab_size,
            settings.max_outputs,
            settings.max_stop_strings,
            has_eos=bool(card.eos_token_ids),
            max_sequences=card.max_sequences or None,
            max_log_bytes=self._queue.max_log_bytes,
        ).within(grants.caps)
        secret = await self._secret.get()
        config = check.resolve_config(
            asked,
            model.defaults,
            len(prompt),
            limits,
            seed=secrets.randbits(64),
            is_chat=request.input.HasField("chat"),
        )
        constraint = await model.constraint_of(config, encoded, caller.tenant)
        if not request.config.HasField("num_beams") and (
            constraint or not model.has_room_for_beams(len(prompt), config, num_source)
        ):
            beams.give_up(config)  # the model's default refuses no request
        beams.check_constraint(config, constraint)
        token_choice.settle_constraint(config, asked, constraint)
        bad_words_ids = await model.bad_words_ids(config.bad_words, caller.tenant)
        sampling = check.sampling_params(config, card.eos_token_ids, bad_words_ids, constraint)
        if adapter is not None:
            sampling = msgspec.structs.replace(sampling, adapter=adapter)
        grace_ms = self._grace_ms(request, grants.caps)
        salt = self._salt(secret, caller, check.check_cache_salt(request.cache_salt))
        accepted = pb.Accepted(
            generation_id=keys.new_generation_id(card.shard),
            model=card.name,
            model_revision=card.revision,
            config=config,
            prompt_tokens=encoded.num_tokens,
            adapter="" if adapter is None else adapter.name,
            adapter_revision="" if adapter is None else adapter.revision,
        )
        body = JobBody(
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            cache_salt=salt,
            chat=encoded.chat,
            echo_text=await model.text_of(request.input, caller.tenant) if config.echo else "",
            source_token_ids=tuple(encoded.source_token_ids),
            trace=current_trace(),
        )
        job = new_job(
            request,
            caller,
            accepted,
            body,
            kv_tokens=model.kv_tokens(len(prompt), sampling, num_source),
            # Only a key's next use is compared with it: what is not needed before a job is queued is left out, since
            # hardly a line of it is in a cache where calls are rare.
            digest=self._digest(secret, request) if request.idempotency_key or audit.is_kept() else b"",
            part=part,
            grace_ms=grace_ms,
            call_remaining_s=call_remaining_s,
            attended=not isinstance(request, pb.SubmitGenerationRequest),
        )
        return job, accepted

    @staticmethod
    def _grace_ms(request: NewGeneration, caps: Caps) -> int:
        """Return how long the generation may go on alone, cut to the caller's cap; the queue has one of its own."""
        if isinstance(request, pb.SubmitGenerationRequest) or not request.HasField("disconnect_grace"):
            return 0
        return check.milliseconds(
            request.disconnect_grace, "disconnect_grace", minimum=0, maximum=caps.max_disconnect_grace_ms
        )

    async def _known(self, model: str, job: NewJob) -> str | None:
        """Return the generation that this request's idempotency key made under another revision of the model."""
        if job.idempotency_key is None:
            return None
        shards = self._catalog.earlier_shards(model)
        if not shards:
            return None
        return await self._queue.lookup_idempotency(shards, job.tenant, job.idempotency_key, job.request_digest)

    async def cancel(self, generation_id: str, caller: Caller) -> pb.GenerationState.ValueType:
        """End a generation; return the state that it is in. Raises GenerationNotFound."""
        return convert.state_of(await self._queue.cancel(generation_id, caller.tenant))

    async def delete(self, generation_id: str, caller: Caller) -> None:
        """End a generation if it runs, and erase all that is stored of it. Raises GenerationNotFound."""
        await self._queue.delete(generation_id, caller.tenant)

    def check_access(self, generation_id: str, caller: Caller) -> None:
        """Refuse an empty id, and ids of models that the caller may not use: existing or not, and whosever they are."""
        if not generation_id:
            raise errors.InvalidRequest("generation_id is required", reason="FIELD_REQUIRED", field="generation_id")
        shard = keys.shard_of(generation_id)  # anything that is no id of ours is not found, and not noted
        audit.note(generation_id=generation_id)
        if not caller.grants.models:
            return
        model = self._catalog.name_of(shard)
        if model is None or not caller.grants.allows_model(model):
            raise errors.GenerationNotFound

    async def whole(self, generation_id: str, caller: Caller) -> pb.Generation:
        """Return a generation with everything in its log. Raises GenerationNotFound."""
        message, record = await self.read_whole(generation_id, caller)
        failure = convert.failure_of(record)
        if failure is not None:
            message.error_reason = failure.reason
        return message

    async def read_whole(self, generation_id: str, caller: Caller) -> tuple[pb.Generation, GenerationRecord]:
        """As `whole`, with what is stored of it beside; the message does not say why it failed."""
        position = LogPosition()
        deltas: list[OutputDelta] = []
        scores: list[PromptScores | None] = []
        while True:
            part = await self._queue.read_log(
                generation_id, caller.tenant, position.sequence, position.chain_hash or b""
            )
            for entry in part.events:
                body = position.advance(entry)
                deltas += body.deltas
                scores.append(body.prompt_scores)
            if not part.more or not part.events:
                break
        message = convert.generation_message(
            part.record, accepted_of(part.record), merge_deltas(deltas), position, merge_scores(scores)
        )
        return message, part.record

    @staticmethod
    def _salt(secret: bytes, caller: Caller, given: bytes) -> bytes:
        """Return what keeps tenants' (or trust groups') blocks apart in the prefix cache.

        What a caller gives narrows that further, and can never lead into another tenant's blocks.
        """
        group = caller.policy.trust_group
        owner = f"group:{group}" if group else f"tenant:{caller.tenant}"  # neither holds a NUL
        return _keyed(secret, b"prefix-cache\0" + owner.encode() + b"\0" + given)

    @staticmethod
    def _digest(secret: bytes, request: NewGeneration) -> bytes:
        """Return what must be equal when an idempotency key is used again: model, adapter, input and config.

        Keyed, so that what is stored says nothing about a guessed prompt.
        """
        body = pb.StreamGenerateRequest(
            model=request.model, input=request.input, config=request.config, adapter=request.adapter
        )
        return hmac.digest(secret, body.SerializeToString(deterministic=True), "sha256")

    def place(self, caller: Caller) -> AbstractContextManager[None]:
        """Count a call while it lasts. Raises ResourceExhausted."""
        return self._places.take(caller.tenant)


@lru_cache(_MAX_SALTS)
def _keyed(secret: bytes, name: bytes) -> bytes:
    """Remembered, since a tenant's calls ask for the same one, and OpenSSL takes its time to begin."""
    return hmac.digest(secret, name, "sha256")


def check_time_left(call: Call) -> None:
    """Refuse a call that ends before it could be answered. Raises DeadlineExceeded."""
    remaining_s = call.time_remaining()
    if remaining_s is not None and remaining_s * 1000 < _LEAST_CALL_MS:
        message = f"the call's deadline leaves less than {_LEAST_CALL_MS} ms"
        raise errors.DeadlineExceeded(message, reason="DEADLINE_TOO_SHORT")


def _note_accepted(generation_id: str, job: NewJob, accepted: pb.Accepted, *, is_repeat: bool) -> None:
    audit.note(
        generation_id=generation_id,
        model=accepted.model,
        prompt_tokens=accepted.prompt_tokens,
        max_tokens=accepted.config.max_tokens,
        num_outputs=accepted.config.num_outputs,
        priority=job.priority,
        request_digest=job.request_digest[:16].hex(),
    )
    audit.mark("generation.repeated" if is_repeat else "generation.accepted")
    late_log.info(
        log,
        "generation.repeated" if is_repeat else "generation.accepted",
        generation_id=generation_id,
        model=accepted.model,
        tenant=job.tenant,
        priority=job.priority,
        prompt_tokens=accepted.prompt_tokens,
    )
