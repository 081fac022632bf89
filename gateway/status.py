"""From errors of the domain to gRPC statuses with google.rpc details. The one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from common import errors
from torchrelay.v1 import generation_pb2 as pb

DOMAIN: Final = "torchrelay"
PUSHBACK_METADATA: Final = "grpc-retry-pushback-ms"

# The first type that an error is an instance of decides; anything else is a bug: INTERNAL. Never UNAVAILABLE for work
# that was accepted and failed: a service mesh would send it again. Never CANCELLED, for the same reason.
STATUS_OF: Final[Mapping[type[errors.ServingError], grpc.StatusCode]] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SequenceOutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.Aborted: grpc.StatusCode.ABORTED,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.GenerationFailed: grpc.StatusCode.INTERNAL,
    errors.BackendRefused: grpc.StatusCode.INTERNAL,
    errors.SealBroken: grpc.StatusCode.INTERNAL,
}


class GenerationEndedError(Exception):
    """A generation ended in an error; work may have been done all the same."""

    def __init__(self, error: errors.ServingError, usage: pb.Usage | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.usage = usage


def code_of(error: errors.ServingError) -> grpc.StatusCode:
    """Return the status code of an error."""
    return next((code for kind, code in STATUS_OF.items() if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def status_of(error: errors.ServingError, usage: pb.Usage | None = None) -> grpc.Status:
    """Return the whole status: code, message, ErrorInfo, and what else applies."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata),
    ]
    if isinstance(error, errors.InvalidRequest) and error.violations:
        details.append(_bad_request(error.violations))
    if error.retry_after_ms is not None:
        delay = Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, errors.QueueFull | errors.Limited):
        subject = error.subject if isinstance(error, errors.Limited) else error.reason.lower()
        violation = error_details_pb2.QuotaFailure.Violation(subject=subject, description=error.message)
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    if usage is not None:
        details.append(usage)
    return to_status(code_of(error), error.message, details, pushback_of(error))


def pushback_of(error: errors.ServingError) -> str | None:
    """Return `grpc-retry-pushback-ms` (gRFC A6): how long gRPC's own retries wait; -1: they do not; None: unsaid."""
    if error.retry_after_ms is not None:
        return str(error.retry_after_ms)
    return "-1" if isinstance(error, errors.QuotaExceeded) else None


def to_status(
    code: grpc.StatusCode, message: str, details: Iterable[Message], pushback: str | None = None
) -> grpc.Status:
    """Pack a status for `ServicerContext.abort_with_status`."""
    packed = []
    for detail in details:
        item = AnyMessage()
        item.Pack(detail)
        packed.append(item)
    status = rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=packed))
    if pushback is not None:
        status = status._replace(trailing_metadata=(*status.trailing_metadata, (PUSHBACK_METADATA, pushback)))
    return cast(grpc.Status, status)


def _bad_request(violations: Iterable[errors.FieldViolation]) -> error_details_pb2.BadRequest:
    items = [
        error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description, reason=v.reason)
        for v in violations
    ]
    return error_details_pb2.BadRequest(field_violations=items)
