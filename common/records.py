"""Between script replies (arrays of bytes and integers) and the types of `common.jobs`. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeVar, get_args

import msgspec

from common import keys
from common.generation import EarlyStopping, EventBody, GrammarKind, JobBody, SamplingParams, Usage
from common.jobs import (
    ClaimedJob,
    CommitResult,
    GenerationRecord,
    ItemKind,
    JobState,
    LogEvent,
    LostReason,
    QueueShape,
    Reason,
    ReplyItem,
    WaitingClass,
    WaitingTenant,
)
from common.sealing import PLAIN, GenerationSealer
from common.tasks import Task

_T = TypeVar("_T")

_LOG_ENTRY_HEAD: Final = b"\x94"  # msgpack: an array of four follows
_BODY_ENCODER: Final = msgspec.msgpack.Encoder()
_EVENT_DECODER: Final = msgspec.msgpack.Decoder(LogEvent)
_ITEMS_DECODER: Final = msgspec.msgpack.Decoder(list[ReplyItem])
_BODY_DECODER: Final = msgspec.msgpack.Decoder(JobBody)
_EVENT_BODY_DECODER: Final = msgspec.msgpack.Decoder(EventBody)
_TASK_TAGS: Final = frozenset(kind.__struct_config__.tag for kind in get_args(Task))
_PLAIN: Final = PLAIN.of("", "")
_BODY_LABEL: Final = b"body"
_ECHO_LABEL: Final = b"echo"


def decode(decoder: msgspec.msgpack.Decoder[_T], data: bytes) -> _T:
    """Raises msgspec.DecodeError alone: msgspec lets errors of UTF-8 and of too deep nesting through as they are."""
    try:
        return decoder.decode(data)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(f"the record is damaged: {type(error).__name__}") from None


class UnknownParameters(Exception):
    """A job asks for a task, parameters of sampling, or values of them, that only a later version knows; named here."""


class _LaterBody(msgspec.Struct, frozen=True):
    sampling: dict[str, Any]
    task: tuple[Any, ...] | None = None


def _decode_body(data: bytes) -> JobBody:
    """Raises UnknownParameters, and msgspec.DecodeError for a record that is no version's."""
    try:
        return decode(_BODY_DECODER, data)
    except msgspec.ValidationError:
        later = decode(_LATER_BODY_DECODER, data)
        unknown = _unknown_parameters(later.sampling)
        if later.task and later.task[0] not in _TASK_TAGS:
            unknown.append("task")
        if not unknown:
            raise
        raise UnknownParameters(", ".join(unknown)) from None


def _unknown_parameters(sampling: dict[str, Any]) -> list[str]:
    unknown = sorted(sampling.keys() - set(SamplingParams.__struct_fields__))
    match sampling.get("structured_output"):
        case [str(kind), *_] if kind not in set(GrammarKind):
            unknown.append("structured_output.kind")
    match sampling.get("early_stopping"):
        case str(value) if value not in set(EarlyStopping):
            unknown.append("early_stopping")
    return unknown


_LATER_BODY_DECODER: Final = msgspec.msgpack.Decoder(_LaterBody)


def encode_body(body: JobBody, sealer: GenerationSealer = _PLAIN) -> bytes:
    return sealer.seal(_BODY_ENCODER.encode(body), _BODY_LABEL)


def reseal_body(record: bytes, old: GenerationSealer, new: GenerationSealer) -> bytes:
    """A stored job body for another generation. Raises SealBroken."""
    return new.seal(old.open(record, _BODY_LABEL), _BODY_LABEL)


def seal_echo(echo: bytes, sealer: GenerationSealer) -> bytes:
    return sealer.seal(echo, _ECHO_LABEL)


def open_echo(echo: bytes, sealer: GenerationSealer) -> bytes:
    """Raises SealBroken. An empty one is never sealed."""
    return sealer.open(echo, _ECHO_LABEL) if echo else echo


def encode_entry(
    chain_hash: bytes, epoch: int, sequence: int, body: EventBody, sealer: GenerationSealer = _PLAIN
) -> bytes:
    """Field e of a log entry: four msgpack values, without the array around them, so that a script can embed them.

    A sealed body is a bin in the place of the body.
    """
    stored: EventBody | bytes = body
    if sealer.seals:
        stored = sealer.seal(_BODY_ENCODER.encode(body), _event_label(epoch, sequence))
    return _BODY_ENCODER.encode((chain_hash, epoch, sequence, stored))[1:]


def event_from_fields(fields: Sequence[bytes], sealer: GenerationSealer = _PLAIN) -> LogEvent:
    """A log event from the fields of its entry: e and, in markers and terminals, k and y. Later ones are left out.

    Raises SealBroken, and msgspec.DecodeError.
    """
    event = decode(_EVENT_DECODER, _LOG_ENTRY_HEAD + fields[1])
    body = open_event_body(event, sealer)
    has_kind = len(fields) > 2 and fields[2] == b"k"
    if body is event.body and not has_kind:
        return event
    kind, reason = (ItemKind(fields[3].decode()), fields[5].decode()) if has_kind else (ItemKind.EVENT, "")
    return LogEvent(event.chain_hash, event.epoch, event.sequence, body, kind, reason)


def open_event_body(event: LogEvent | ReplyItem, sealer: GenerationSealer) -> EventBody | None:
    """The body of an event, sealed or not. Raises SealBroken.

    Scripts end generations with bodies that say what was used and nothing else: these are never sealed.
    """
    body = event.body
    if isinstance(body, bytes):
        return decode(_EVENT_BODY_DECODER, sealer.open(body, _event_label(event.epoch, event.sequence)))
    if body is not None and (body.deltas or body.result is not None):
        sealer.check_plain()
    return body


def open_item(item: ReplyItem, sealer: GenerationSealer) -> ReplyItem:
    """An item with its body open. Raises SealBroken."""
    body = open_event_body(item, sealer)
    if body is item.body:
        return item
    return ReplyItem(item.generation_id, item.chain_hash, item.epoch, item.sequence, body, item.kind, item.reason)


def _event_label(epoch: int, sequence: int) -> bytes:
    return b"event %d-%d" % (epoch, sequence)


def items_from_entry(packed: bytes) -> list[ReplyItem]:
    """The items of one entry of a reply stream. Raises msgspec.DecodeError for anything else."""
    return decode(_ITEMS_DECODER, packed)


def record_from_reply(reply: Sequence[Any]) -> GenerationRecord:
    """Reads what `describe` of the scripts wrote."""
    (
        generation_id, state, reason, tenant, key_id, priority, epoch, attempts, num_claims, sequence,
        prompt_tokens, cached_prompt_tokens, completion_tokens, place, worker_id, gateway_id,
        created_ms, started_ms, first_token_ms, ended_ms, deadline_ms, disconnect_grace_ms, echo, expected_wait_ms,
    ) = reply  # fmt: skip
    return GenerationRecord(
        generation_id=generation_id.decode(),
        state=JobState(state.decode()),
        reason=Reason(reason.decode()),
        tenant=tenant.decode(),
        key_id=key_id.decode(),
        priority=priority,
        epoch=epoch,
        attempts=attempts,
        num_claims=num_claims,
        sequence=sequence,
        usage=Usage(prompt_tokens, cached_prompt_tokens, completion_tokens),
        place=place,
        worker_id=worker_id.decode(),
        gateway_id=gateway_id.decode(),
        created_ms=created_ms,
        started_ms=started_ms,
        first_token_ms=first_token_ms,
        ended_ms=ended_ms,
        deadline_ms=deadline_ms,
        disconnect_grace_ms=disconnect_grace_ms,
        echo=echo,
        expected_wait_ms=known_ms(expected_wait_ms),
    )


def known_ms(value: int) -> int | None:
    """A time that the scripts give as -1 when it is not known."""
    return None if value < 0 else value


class ClaimHead(msgspec.Struct, frozen=True):
    """What the worker's library needs to go on with a claimed job's log, readable even where its body is not."""

    generation_id: str
    tenant: str
    epoch: int
    sequence: int
    chain_hash: bytes
    log_bytes: int
    progress: bool  # this epoch has already committed progress
    completion_tokens: int


def claim_head(reply: Sequence[Any]) -> ClaimHead:
    """Reads the head of what `pack_claim` of the scripts wrote."""
    generation_id, epoch, sequence, chain_hash, _, _, _, tenant, _, _, completion_tokens, log_bytes, progress = reply[
        :13
    ]
    return ClaimHead(
        generation_id.decode(),
        tenant.decode(),
        epoch,
        sequence,
        chain_hash,
        log_bytes,
        progress == 1,
        completion_tokens,
    )


def job_from_reply(reply: Sequence[Any], sealer: GenerationSealer = _PLAIN) -> ClaimedJob:
    """Reads what `pack_claim` of the scripts wrote. Raises SealBroken, UnknownParameters and msgspec.DecodeError."""
    (
        generation_id, epoch, sequence, chain_hash, remaining_ms, priority, attempts, tenant,
        prompt_tokens, cached_prompt_tokens, completion_tokens, _, _, body, log,
        weight, num_preemptions, by_share, age_ms, num_claims,
    ) = reply  # fmt: skip
    entries = [event_from_fields(fields, sealer) for _, fields in log]
    return ClaimedJob(
        generation_id=generation_id.decode(),
        epoch=epoch,
        sequence=sequence,
        chain_hash=chain_hash,
        remaining_ms=remaining_ms,
        priority=priority,
        attempts=attempts,
        tenant=tenant.decode(),
        usage=Usage(prompt_tokens, cached_prompt_tokens, completion_tokens),
        body=_decode_body(sealer.open(body, _BODY_LABEL)),
        events=tuple(event for event in entries if event.kind is not ItemKind.STARTED),
        weight=float(weight),
        num_preemptions=num_preemptions,
        by_share=by_share == 1,
        age_ms=age_ms,
        num_claims=num_claims,
    )


def commit_from_reply(reply: Sequence[Any]) -> CommitResult:
    """Reads the answer of commit and of a worker's heartbeat."""
    lost, more, *rest = reply
    queued, drain = rest[: keys.PRIORITY_CLASSES], rest[keys.PRIORITY_CLASSES :]
    pairs = zip(lost[::2], lost[1::2], strict=True)
    reasons = {generation_id.decode(): LostReason(why.decode()) for generation_id, why in pairs}
    return CommitResult(reasons, tuple(queued), more == 1, drain[0].decode() if drain else "")


def shape_from_reply(reply: Sequence[Any]) -> QueueShape:
    """Reads the answer of queue_shape."""
    time_ms, num_running, num_dead_letters, more, classes, tenants = reply
    return QueueShape(
        time_ms=time_ms,
        classes=tuple(
            WaitingClass(priority, waiting, known_ms(oldest), known_ms(wait))
            for priority, (waiting, oldest, wait) in enumerate(classes)
        ),
        tenants=tuple(
            WaitingTenant(priority, tenant.decode(), waiting, oldest) for priority, tenant, waiting, oldest in tenants
        ),
        has_more_tenants=more == 1,
        num_running=num_running,
        num_dead_letters=num_dead_letters,
    )
