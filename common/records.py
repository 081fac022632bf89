"""Between script replies (arrays of bytes and integers) and the types of `common.jobs`. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeVar

import msgspec

from common.generation import EventBody, JobBody, Usage
from common.jobs import (
    ClaimedJob,
    CommitResult,
    GenerationRecord,
    ItemKind,
    JobState,
    LogEvent,
    LostReason,
    Reason,
    ReplyItem,
)

_T = TypeVar("_T")

_LOG_ENTRY_HEAD: Final = b"\x94"  # msgpack: an array of four follows
_BODY_ENCODER: Final = msgspec.msgpack.Encoder()
_EVENT_DECODER: Final = msgspec.msgpack.Decoder(LogEvent)
_ITEMS_DECODER: Final = msgspec.msgpack.Decoder(list[ReplyItem])
_BODY_DECODER: Final = msgspec.msgpack.Decoder(JobBody)


def decode(decoder: msgspec.msgpack.Decoder[_T], data: bytes) -> _T:
    """Raises msgspec.DecodeError alone: msgspec lets errors of UTF-8 and of too deep nesting through as they are."""
    try:
        return decoder.decode(data)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(f"the record is damaged: {type(error).__name__}") from None


def encode_body(body: JobBody) -> bytes:
    return _BODY_ENCODER.encode(body)


def encode_entry(chain_hash: bytes, epoch: int, sequence: int, body: EventBody) -> bytes:
    """Field e of a log entry: four msgpack values, without the array around them, so that a script can embed them."""
    return _BODY_ENCODER.encode((chain_hash, epoch, sequence, body))[1:]


def event_from_fields(fields: Sequence[bytes]) -> LogEvent:
    """A log event from the fields of its entry: e and, in markers and terminals, k and y. Later ones are left out.

    Raises msgspec.DecodeError.
    """
    event = decode(_EVENT_DECODER, _LOG_ENTRY_HEAD + fields[1])
    if len(fields) == 2 or fields[2] != b"k":
        return event
    return LogEvent(
        event.chain_hash, event.epoch, event.sequence, event.body, ItemKind(fields[3].decode()), fields[5].decode()
    )


def items_from_entry(packed: bytes) -> list[ReplyItem]:
    """The items of one entry of a reply stream. Raises msgspec.DecodeError for anything else."""
    return decode(_ITEMS_DECODER, packed)


def record_from_reply(reply: Sequence[Any]) -> GenerationRecord:
    """Reads what `describe` of the scripts wrote."""
    (
        generation_id, state, reason, tenant, key_id, priority, epoch, attempts, num_claims, sequence,
        prompt_tokens, cached_prompt_tokens, completion_tokens, place, worker_id, gateway_id,
        created_ms, started_ms, first_token_ms, ended_ms, deadline_ms, disconnect_grace_ms, echo,
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
    )


class ClaimRecord(msgspec.Struct, frozen=True):
    """A claimed job, and what the worker's library needs to go on with its log."""

    job: ClaimedJob
    log_bytes: int
    progress: bool  # this epoch has already committed progress


def claim_from_reply(reply: Sequence[Any]) -> ClaimRecord:
    """Reads what `pack_claim` of the scripts wrote. Raises msgspec.DecodeError for a body or log entry that is none."""
    (
        generation_id, epoch, sequence, chain_hash, remaining_ms, priority, attempts, tenant,
        prompt_tokens, cached_prompt_tokens, completion_tokens, log_bytes, progress, body, log,
    ) = reply  # fmt: skip
    entries = [event_from_fields(fields) for _, fields in log]
    job = ClaimedJob(
        generation_id=generation_id.decode(),
        epoch=epoch,
        sequence=sequence,
        chain_hash=chain_hash,
        remaining_ms=remaining_ms,
        priority=priority,
        attempts=attempts,
        tenant=tenant.decode(),
        usage=Usage(prompt_tokens, cached_prompt_tokens, completion_tokens),
        body=decode(_BODY_DECODER, body),
        events=tuple(event for event in entries if event.kind is not ItemKind.STARTED),
    )
    return ClaimRecord(job, log_bytes, progress == 1)


def commit_from_reply(reply: Sequence[Any]) -> CommitResult:
    """Reads the answer of commit and of a worker's heartbeat."""
    lost, more, *queued = reply
    pairs = zip(lost[::2], lost[1::2], strict=True)
    reasons = {generation_id.decode(): LostReason(why.decode()) for generation_id, why in pairs}
    return CommitResult(reasons, tuple(queued), more == 1)
