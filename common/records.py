"""Between script replies (arrays of bytes and integers) and the types of `common.jobs`. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

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

_LOG_ENTRY_HEAD: Final = b"\x94"  # msgpack: an array of four follows
_BODY_ENCODER: Final = msgspec.msgpack.Encoder()
_EVENT_DECODER: Final = msgspec.msgpack.Decoder(LogEvent)
_ITEMS_DECODER: Final = msgspec.msgpack.Decoder(list[ReplyItem])
_BODY_DECODER: Final = msgspec.msgpack.Decoder(JobBody)


def encode_body(body: JobBody) -> bytes:
    return _BODY_ENCODER.encode(body)


def encode_entry(chain_hash: bytes, epoch: int, sequence: int, body: EventBody) -> bytes:
    """Field e of a log entry: four msgpack values, without the array around them, so that a script can embed them."""
    return _BODY_ENCODER.encode((chain_hash, epoch, sequence, body))[1:]


def event_from_fields(fields: Sequence[bytes]) -> LogEvent:
    """A log event from the fields of its entry: e and, in markers and terminals, k and y. Later ones are left out."""
    event = _EVENT_DECODER.decode(_LOG_ENTRY_HEAD + fields[1])
    if len(fields) == 2 or fields[2] != b"k":
        return event
    return LogEvent(
        event.chain_hash, event.epoch, event.sequence, event.body, ItemKind(fields[3].decode()), fields[5].decode()
    )


def items_from_entry(packed: bytes) -> list[ReplyItem]:
    """The items of one entry of a reply stream. Raises msgspec.DecodeError for anything else."""
    return _ITEMS_DECODER.decode(packed)


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


class ClaimRecord(msgspec.Struct, frozen=True):
    """A claimed job, and what the worker's library needs to go on with its log."""

    job: ClaimedJob
    log_bytes: int
    progress: bool  # this epoch has already committed progress


def claim_from_reply(reply: Sequence[Any]) -> ClaimRecord:
    """Reads what `pack_claim` of the scripts wrote."""
    (
        generation_id, epoch, sequence, chain_hash, remaining_ms, priority, attempts, tenant,
        prompt_tokens, cached_prompt_tokens, completion_tokens, log_bytes, progress, body, log,
        weight, num_preemptions, by_share,
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
        body=_BODY_DECODER.decode(body),
        events=tuple(event for event in entries if event.kind is not ItemKind.STARTED),
        weight=float(weight),
        num_preemptions=num_preemptions,
        by_share=by_share == 1,
    )
    return ClaimRecord(job, log_bytes, progress == 1)


def commit_from_reply(reply: Sequence[Any]) -> CommitResult:
    """Reads the answer of commit and of a worker's heartbeat."""
    lost, more, *queued = reply
    pairs = zip(lost[::2], lost[1::2], strict=True)
    reasons = {generation_id.decode(): LostReason(why.decode()) for generation_id, why in pairs}
    return CommitResult(reasons, tuple(queued), more == 1)
