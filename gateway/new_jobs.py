"""What a caller's rights, quotas and clock make of a request that is ready to be queued. Pure."""

from __future__ import annotations

from typing import Final, Protocol

from google.protobuf.duration_pb2 import Duration

from common.generation import JobBody
from common.jobs import NewJob
from gateway import validation as check
from gateway.identity.caller import Caller
from gateway.rights import priority_of
from gateway.stream import stored_body
from torchrelay.v1 import generation_pb2 as pb

_MIN_TIME_LIMIT_MS: Final = 1
_DEADLINE_SLACK_MS: Final = 100  # so that the call's own deadline is what its caller hears of


class Timed(Protocol):
    """What requests of all kinds have."""

    idempotency_key: str
    priority: pb.Priority.ValueType

    @property
    def time_limit(self) -> Duration: ...


def new_job(
    request: Timed,
    caller: Caller,
    accepted: pb.Accepted,
    body: JobBody,
    *,
    kv_tokens: tuple[int, int],
    digest: bytes,
    part: int = 0,
    grace_ms: int = 0,
    call_remaining_s: float | None = None,
    attended: bool = True,
) -> NewJob:
    """Return the job of an accepted request. Raises InvalidRequest, and PermissionDenied for its priority.

    `kv_tokens` are what it needs to begin, and at most; `digest` is what must be equal when its idempotency key is used
    again; `part` counts the jobs of one call, which share its key; it lives for `grace_ms` without its caller.
    """
    grants, policy = caller.grants, caller.policy
    return NewJob(
        tenant=caller.tenant,
        key_id=caller.key_id,
        body=body,
        priority=priority_of(request.priority, grants.priorities),
        weight=policy.weight,
        time_limit_ms=time_limit_ms(request, grace_ms, call_remaining_s),
        disconnect_grace_ms=grace_ms,
        attended=attended,
        kv_tokens=kv_tokens[0],
        peak_kv_tokens=kv_tokens[1],
        idempotency_key=check.idempotency_key_of(request.idempotency_key, part),
        request_digest=digest,
        echo=stored_body(accepted),
        generation_id=accepted.generation_id,
        retention_ms=policy.retention_ms,
        max_queued=policy.quotas.max_queued,
        max_live=policy.quotas.max_live,
        quota_id=caller.quota_id or caller.key_id,
        max_queued_of_key=grants.quotas.max_queued,
        max_live_of_key=grants.quotas.max_live,
        has_reservation=policy.quotas.are_metered or grants.quotas.are_metered,
    )


def time_limit_ms(request: Timed, grace_ms: int, call_remaining_s: float | None) -> int | None:
    """Return how long a job may live, None for the queue's default. Raises InvalidRequest.

    Without a grace it need not outlive its call: a worker is then never given one whose caller has stopped waiting.
    """
    limits = []
    if request.HasField("time_limit"):  # type: ignore[attr-defined]  # of every message with the field
        limits.append(check.milliseconds(request.time_limit, "time_limit", minimum=_MIN_TIME_LIMIT_MS))
    if call_remaining_s is not None and not grace_ms:
        limits.append(max(_MIN_TIME_LIMIT_MS, int(call_remaining_s * 1000) + _DEADLINE_SLACK_MS))
    return min(limits, default=None)
