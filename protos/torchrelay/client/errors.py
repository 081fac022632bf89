"""What a call can fail with, read from the status and its google.rpc details."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from torchrelay.v1 import generation_pb2

DOMAIN = "torchrelay"
# What a broken connection, a proxy or a dying server looks like. The server itself explains each of its errors.
_BROKEN = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED}
)
_TOO_SLOW = "CLIENT_TOO_SLOW"
_M = TypeVar("_M", bound=Message)


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of the request that the server refused."""

    field: str
    description: str


@dataclass(eq=False)
class RelayError(Exception):
    """A call failed.

    `reason` is the server's stable reason, such as QUEUE_FULL; empty if no server explained the failure. `usage` is set
    where work was done all the same.
    """

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: tuple[FieldViolation, ...] = ()
    retry_delay_s: float | None = None
    usage: generation_pb2.Usage | None = None
    generation_id: str = ""

    def __str__(self) -> str:
        named = f"{self.code.name} {self.reason}".strip()
        fields = "".join(f"; {v.field}: {v.description}" for v in self.violations)
        return f"{named}: {self.message}{fields}"

    @property
    def is_connection_loss(self) -> bool:
        """Whether the call broke rather than was refused: no server explained it."""
        return not self.reason and self.code in _BROKEN

    @property
    def is_retryable(self) -> bool:
        """Whether the same request may be sent again: nothing was done, or its idempotency key makes it safe."""
        if self.is_connection_loss or self.code is grpc.StatusCode.UNAVAILABLE:
            return True
        return self.code is grpc.StatusCode.RESOURCE_EXHAUSTED and self.retry_delay_s is not None

    @property
    def is_resumable(self) -> bool:
        """Whether a stream that was accepted may be picked up after its last event.

        That is so as well when the server only let go of a caller that had not read for too long: it reads again now.
        """
        return self.is_retryable or self.reason == _TOO_SLOW


def from_rpc_error(error: Any, generation_id: str = "") -> RelayError:
    """Read a failed call of grpc or grpc.aio: both have code(), details() and trailing_metadata()."""
    result = RelayError(code=error.code(), message=error.details() or "", generation_id=generation_id)
    for detail in _details(error):
        if (info := _unpack(detail, error_details_pb2.ErrorInfo)) is not None and info.domain == DOMAIN:
            result.reason, result.metadata = info.reason, dict(info.metadata)
        elif (retry := _unpack(detail, error_details_pb2.RetryInfo)) is not None:
            result.retry_delay_s = retry.retry_delay.ToTimedelta().total_seconds()
        elif (bad := _unpack(detail, error_details_pb2.BadRequest)) is not None:
            result.violations = tuple(FieldViolation(v.field, v.description) for v in bad.field_violations)
        elif (usage := _unpack(detail, generation_pb2.Usage)) is not None:
            result.usage = usage
    return result


def _details(error: Any) -> Iterable[AnyMessage]:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            return list(status_pb2.Status.FromString(value).details)
    return ()


def _unpack(detail: AnyMessage, kind: type[_M]) -> _M | None:
    message = kind()
    return message if detail.Unpack(message) else None
