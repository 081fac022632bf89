"""Between the operators' requests about dead letters and the library's calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from common.dead_letters import LetterMark, LetterResult, Outcome
from common.errors import InvalidRequest
from common.jobs import GenerationRecord, Reason
from common.registry import ModelEntry
from gateway import convert
from torchrelay.admin.v1beta1 import fleet_pb2 as pb

MAX_IDS: Final = 1000
_TOKEN: Final = re.compile(r"(\d{1,15})\.(.{1,256})")
_REASONS: Final = {
    Reason.ATTEMPTS_EXHAUSTED: pb.DEAD_LETTER_REASON_ATTEMPTS_EXHAUSTED,
    Reason.LOG_LIMIT: pb.DEAD_LETTER_REASON_LOG_LIMIT,
    Reason.WORKER_FAILED: pb.DEAD_LETTER_REASON_WORKER_FAILED,
    Reason.ALL_TOKENS_FORBIDDEN: pb.DEAD_LETTER_REASON_WORKER_FAILED,
    **{reason: pb.DEAD_LETTER_REASON_WORKER_FAILED for reason in Reason if reason.is_of_grammar},
}
_OUTCOMES: Final = {
    Outcome.RETRIED: pb.DEAD_LETTER_OUTCOME_RETRIED,
    Outcome.PURGED: pb.DEAD_LETTER_OUTCOME_PURGED,
    Outcome.NOT_FOUND: pb.DEAD_LETTER_OUTCOME_NOT_FOUND,
    Outcome.QUEUE_FULL: pb.DEAD_LETTER_OUTCOME_QUEUE_FULL,
    Outcome.TENANT_QUEUE_FULL: pb.DEAD_LETTER_OUTCOME_TENANT_FULL,
    Outcome.TENANT_CONCURRENCY: pb.DEAD_LETTER_OUTCOME_TENANT_FULL,
    Outcome.UNREADABLE: pb.DEAD_LETTER_OUTCOME_UNREADABLE,
}


def mark_from_token(token: str) -> LetterMark | None:
    """Where a page begins; None for the first. Raises InvalidRequest for a token that is none of ours."""
    if not token:
        return None
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise InvalidRequest("is not a token of this list", reason="FIELD_INVALID", field="page_token")
    return LetterMark(int(match[1]), match[2])


def token_of(mark: LetterMark) -> str:
    return f"{mark.ended_ms}.{mark.generation_id}"


def check_choice(request: pb.RetryDeadLettersRequest | pb.PurgeDeadLettersRequest) -> None:
    """Raise InvalidRequest unless a request names some letters, or a model."""
    if bool(request.generation_ids) == bool(request.model):
        raise InvalidRequest(
            "exactly one of generation_ids and model is required",
            reason="FIELD_CONFLICT" if request.model else "FIELD_REQUIRED",
            field="generation_ids",
        )
    if len(request.generation_ids) > MAX_IDS:
        raise InvalidRequest(
            f"at most {MAX_IDS} at a time",
            reason="FIELD_OUT_OF_RANGE",
            field="generation_ids",
            limit=MAX_IDS,
            got=len(request.generation_ids),
        )


def letter_message(entry: ModelEntry, record: GenerationRecord) -> pb.DeadLetter:
    return pb.DeadLetter(
        generation_id=record.generation_id,
        model=entry.card.name,
        model_revision=entry.card.revision,
        tenant=record.tenant,
        reason=_REASONS.get(record.reason, pb.DEAD_LETTER_REASON_UNSPECIFIED),
        num_attempts=record.attempts,
        num_claims=record.num_claims,
        create_time=convert.timestamp(record.created_ms),
        end_time=convert.timestamp(record.ended_ms),
        prompt_tokens=record.usage.prompt_tokens,
        num_events=record.sequence,
    )


def result_messages(results: Sequence[LetterResult]) -> list[pb.DeadLetterResult]:
    return [
        pb.DeadLetterResult(
            generation_id=result.generation_id,
            outcome=_OUTCOMES[result.outcome],
            new_generation_id=result.new_generation_id,
        )
        for result in results
    ]
