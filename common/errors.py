"""Errors of the domain: what went wrong, for a machine (`reason`) and for a reader. Knows nothing of gRPC.

Whoever answers a caller maps the *type* to a status code and passes `reason`, `metadata` and `retry_after_ms` on.
Messages are fixed text plus names and limits of our own: they never repeat what the caller wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


class ServingError(Exception):
    """Base of every expected failure. `reason` is UPPER_SNAKE and stable; `metadata` holds short strings."""

    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata: dict[str, str] = dict(metadata or {})
        self.retry_after_ms = retry_after_ms


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field of a request: its path (`config.temperature`), what is wrong with it, and the reason's name."""

    field: str
    description: str
    reason: str


class InvalidRequest(ServingError):
    """The request can never succeed as it stands."""

    default_reason = "FIELD_INVALID"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str | None = None,
        limit: float | str | None = None,
        got: float | str | None = None,
        violations: tuple[FieldViolation, ...] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        details = dict(metadata or {})
        for name, value in (("field", field), ("limit", limit), ("got", got)):
            if value is not None:
                details[name] = str(value)
        super().__init__(message, reason=reason, metadata=details)
        if not violations and field is not None:
            violations = (FieldViolation(field, message, self.reason),)
        self.violations = violations


class Unauthenticated(ServingError):
    """No credentials (CREDENTIALS_MISSING) or credentials that are not accepted (CREDENTIALS_INVALID)."""

    default_reason = "CREDENTIALS_INVALID"


class PermissionDenied(ServingError):
    """The caller is known but may not do this."""

    default_reason = "METHOD_NOT_ALLOWED"


class NotFound(ServingError):
    """Base of what does not exist, or does not exist for this caller: both answers are the same."""

    default_reason = "NOT_FOUND"


class ModelNotFound(NotFound):
    default_reason = "MODEL_NOT_FOUND"


class AdapterNotFound(NotFound):
    """The model has no such adapter, or not any more."""

    default_reason = "ADAPTER_NOT_FOUND"


class GenerationNotFound(NotFound):
    """No such generation, or another tenant's, or one whose result has expired: one text for all three."""

    default_reason = "REQUEST_NOT_FOUND"

    def __init__(self) -> None:
        super().__init__("no such generation, or its result has expired")


class BatchNotFound(NotFound):
    """No such batch, or another tenant's, or one that was erased: one text for all three."""

    default_reason = "BATCH_NOT_FOUND"

    def __init__(self) -> None:
        super().__init__("no such batch, or its results have expired")


class ApiKeyNotFound(NotFound):
    default_reason = "API_KEY_NOT_FOUND"


class TenantNotFound(NotFound):
    default_reason = "TENANT_NOT_FOUND"


class WorkerNotFound(NotFound):
    """No such worker, or it has ended: a worker that was started again has another id."""

    default_reason = "WORKER_NOT_FOUND"


class FailedPrecondition(ServingError):
    """The request is well formed but contradicts what is stored."""

    default_reason = "FAILED_PRECONDITION"


class IdempotencyKeyReused(FailedPrecondition):
    """The idempotency key belongs to a generation with another body."""

    default_reason = "IDEMPOTENCY_KEY_REUSED"

    def __init__(self) -> None:
        super().__init__("the idempotency key was used with a different request")


class SequenceOutOfRange(ServingError):
    """A resume names an event (or, by another `field`, a result) that the log does not hold."""

    default_reason = "INDEX_OUT_OF_RANGE"

    def __init__(self, after_sequence: int, last_sequence: int, *, field: str = "after_sequence") -> None:
        super().__init__(
            f"{field} is beyond the last {'event' if field == 'after_sequence' else 'result'}",
            metadata={"field": field, "limit": str(last_sequence), "got": str(after_sequence)},
        )


class Aborted(ServingError):
    """The stream cannot go on as it is; what to do is in the reason."""

    default_reason = "ABORTED"


class ResultLost(Aborted):
    """What the caller has already seen is not a prefix of the log any more: the server lost its tail in a failover."""

    default_reason = "RESULT_LOST"

    def __init__(self) -> None:
        super().__init__("the events received so far are not part of the stored result")


class Superseded(Aborted):
    """A later attach took the stream over."""

    default_reason = "SUPERSEDED"

    def __init__(self) -> None:
        super().__init__("another stream was attached to this generation")


class ClientTooSlow(Aborted):
    """The client left a message unread for too long. Its generation goes on for the disconnect grace, to be resumed."""

    default_reason = "CLIENT_TOO_SLOW"

    def __init__(self) -> None:
        super().__init__("a message was not read in time; resume after the last event that was")


class ResourceExhausted(ServingError):
    """A bound was reached; a later try may succeed."""

    default_reason = "RESOURCE_EXHAUSTED"


class QueueFull(ResourceExhausted):
    """The model's queue (QUEUE_FULL), or what a tenant (TENANT_QUEUE_FULL, TENANT_CONCURRENCY) or a credential
    (KEY_QUEUE_FULL, KEY_CONCURRENCY) may have in it, is full.
    """

    default_reason = "QUEUE_FULL"


class Limited(ResourceExhausted):
    """A quota over time; `subject` is whose and which: `tenant:tokens_per_minute`."""

    def __init__(self, message: str, *, subject: str, limit: int, retry_after_ms: int | None = None) -> None:
        metadata = {"subject": subject, "limit": str(limit)}
        super().__init__(message, metadata=metadata, retry_after_ms=retry_after_ms)
        self.subject = subject


class RateLimited(Limited):
    """A rate is used up for now; `retry_after_ms` is exact if nobody else asks meanwhile."""

    default_reason = "RATE_LIMITED"


class QuotaExceeded(Limited):
    """The day's quota is spent: waiting a little does not help."""

    default_reason = "QUOTA_EXCEEDED"


class BackendFull(ResourceExhausted):
    """The server is out of memory: it refuses new work and lets the running work finish."""

    default_reason = "BACKEND_FULL"


class Unavailable(ServingError):
    """Nothing was done, or it is unknown whether it was, and the reason says so; the same call may be sent again."""

    default_reason = "UNAVAILABLE"


class BackendUnavailable(Unavailable):
    """The server did not answer in time. Whether the last attempt took effect is unknown: repeat the same call."""

    default_reason = "BACKEND_UNAVAILABLE"


class ReplicationUnconfirmed(BackendUnavailable):
    """Too few replicas confirmed a write in time: whether it is kept, should the primary be lost, is unknown.

    The same request with the same idempotency key repeats safely.
    """

    default_reason = "REPLICATION_UNCONFIRMED"


class ModelNotReady(Unavailable):
    default_reason = "MODEL_NOT_READY"


class DeadlineExceeded(ServingError):
    """The time limit passed before the generation started (QUEUE_DEADLINE), or was too short (DEADLINE_TOO_SHORT)."""

    default_reason = "QUEUE_DEADLINE"


class GenerationFailed(ServingError):
    """The generation ended in an error that a repeat would probably meet again."""

    default_reason = "WORKER_FAILED"


class WorkerFailed(GenerationFailed):
    """Every attempt ended without progress (the dead letter), or a worker gave the generation up."""

    default_reason = "WORKER_FAILED"


class LogLimitExceeded(GenerationFailed):
    """The generation's events outgrew the bound on stored bytes."""

    default_reason = "LOG_LIMIT"


class BackendRefused(ServingError):
    """The server refuses our commands (no permission, wrong password or type, other schema): a fault of deployment."""

    default_reason = "BACKEND_REFUSED"


class SealBroken(ServingError):
    """A stored record cannot be read: changed, moved, sealed with another key, or not sealed where it must be."""

    default_reason = "SEAL_BROKEN"
