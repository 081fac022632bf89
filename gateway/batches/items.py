"""What an item of a batch may be, and what its result looks like. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import Message
from grpc_status import rpc_status

from common import errors
from common.batches import BatchRecord, BatchState, Outcome, Result
from common.grants import PRIORITY_HIGH, PRIORITY_LOW, PRIORITY_NORMAL, Scope
from gateway import convert
from gateway import validation as check
from gateway.identity.caller import Caller
from gateway.rights import check_model
from gateway.rights import priority_of as allowed_priority
from gateway.status import status_of
from torchrelay.v1 import batch_pb2 as pb
from torchrelay.v1 import generation_pb2

MAX_NAME_BYTES: Final = 128  # of custom_id and display_name
_ONEOF: Final = "request"
_OF_BATCH: Final = ("idempotency_key", "priority", "disconnect_grace")  # not to be set of an item
_SCOPES: Final[Mapping[str, Scope]] = {"generate": Scope.GENERATE}  # of the others: TASKS
_STATES: Final = {
    BatchState.RUNNING: pb.BATCH_STATE_RUNNING,
    BatchState.CANCELLING: pb.BATCH_STATE_CANCELLING,
    BatchState.DONE: pb.BATCH_STATE_DONE,
    BatchState.CANCELLED: pb.BATCH_STATE_CANCELLED,
}
_PRIORITIES: Final = {
    PRIORITY_HIGH: generation_pb2.PRIORITY_HIGH,
    PRIORITY_NORMAL: generation_pb2.PRIORITY_NORMAL,
    PRIORITY_LOW: generation_pb2.PRIORITY_LOW,
}


@dataclass(frozen=True, slots=True)
class ItemRules:
    """What holds for the items of a call: `kinds` are those that this gateway can run."""

    kinds: frozenset[str]
    reveal_models: bool


def scope_of(kind: str) -> Scope:
    """Return the scope that a kind of request asks for, besides that of batches."""
    return _SCOPES.get(kind, Scope.TASKS)


def check_item(item: pb.BatchItem, index: int, caller: Caller, rules: ItemRules) -> None:
    """Refuse what no item may be, or not of this caller. Raises InvalidRequest, PermissionDenied and ModelNotFound."""
    path = f"items[{index}]"
    check_name(item.custom_id, f"{path}.custom_id")
    kind = item.WhichOneof(_ONEOF)
    if kind is None:
        raise errors.InvalidRequest("a request is required", reason="FIELD_REQUIRED", field=path)
    if kind not in rules.kinds:
        raise errors.InvalidRequest("is not served in batches", reason="UNSUPPORTED", field=f"{path}.{kind}")
    request = getattr(item, kind)
    for name in _OF_BATCH:
        if _is_set(request, name):
            message = "must not be set in a batch, which has its own"
            raise errors.InvalidRequest(message, reason="FIELD_CONFLICT", field=f"{path}.{kind}.{name}")
    if not request.model:
        raise errors.InvalidRequest("model is required", reason="FIELD_REQUIRED", field=f"{path}.{kind}.model")
    try:
        check_rights(kind, request.model, caller, reveal_models=rules.reveal_models)
    except errors.ServingError as error:
        error.metadata.setdefault("field", f"{path}.{kind}")
        raise


def check_rights(kind: str, model: str, caller: Caller, *, reveal_models: bool) -> None:
    """Raise PermissionDenied for a kind or model that the caller may not use; ModelNotFound where it is not to know."""
    scope = scope_of(kind)
    if scope.value not in caller.grants.scopes:
        raise errors.PermissionDenied("this key may not call this method", metadata={"scope": scope.value})
    check_model(caller, model, reveal=reveal_models)


def check_name(name: str, path: str) -> None:
    """Raise InvalidRequest for a name that is too long or holds control characters."""
    size = len(name.encode())
    if size > MAX_NAME_BYTES or any(c < " " or c == "\x7f" for c in name):
        raise errors.InvalidRequest(
            f"must be at most {MAX_NAME_BYTES} bytes without control characters",
            reason="FIELD_INVALID",
            field=path,
            limit=MAX_NAME_BYTES,
            got=size,
        )


def _is_set(request: Message, name: str) -> bool:
    field = request.DESCRIPTOR.fields_by_name.get(name)
    if field is None:
        return False
    return request.HasField(name) if field.message_type is not None else bool(getattr(request, name))


def priority_of(wanted: int, caller: Caller) -> int:
    """Return the queue's class for a batch. Raises InvalidRequest and PermissionDenied, as `rights.priority_of`."""
    if wanted == generation_pb2.PRIORITY_UNSPECIFIED and caller.grants.priorities:
        return max(caller.grants.priorities)
    try:
        return allowed_priority(wanted, caller.grants.priorities)
    except errors.InvalidRequest as error:
        raise errors.InvalidRequest(error.message, reason=error.reason, field="header.priority") from None


def priority_message(priority: int) -> generation_pb2.Priority.ValueType:
    """Return the contract's name of a class."""
    return _PRIORITIES[priority]


def batch_message(record: BatchRecord) -> pb.Batch:
    """Return a batch as callers see it."""
    running = 0 if record.state.is_final else min(record.num_running, record.total - record.num_results)
    message = pb.Batch(
        batch_id=record.batch_id,
        state=_STATES[record.state],
        counts=pb.BatchCounts(
            total=record.total,
            waiting=record.total - record.num_results - running,
            running=running,
            succeeded=record.num_succeeded,
            failed=record.num_failed,
            cancelled=record.num_cancelled,
        ),
        display_name=record.display_name,
        priority=priority_message(record.priority),
        create_time=convert.timestamp(record.created_ms),
        expire_time=convert.timestamp(record.expires_ms),
    )
    if record.ended_ms:
        message.end_time.CopyFrom(convert.timestamp(record.ended_ms))
    return message


def response_result(index: int, item: pb.BatchItem, response: Message) -> Result:
    """Return what is stored of an item that has a response."""
    message = pb.BatchResult(item_index=index, custom_id=_id_of(item, index))
    getattr(message, item.WhichOneof(_ONEOF) or "").CopyFrom(response)
    return Result(index, Outcome.SUCCEEDED, message.SerializeToString())


def error_result(
    index: int,
    item: pb.BatchItem,
    error: errors.ServingError,
    usage: generation_pb2.Usage | None = None,
    outcome: Outcome = Outcome.FAILED,
) -> Result:
    """Return what is stored of an item that has none."""
    return _error(index, item, outcome, error_message(error, usage))


def error_message(error: errors.ServingError, usage: generation_pb2.Usage | None = None) -> pb.BatchError:
    """Return the status that a call would end with."""
    status: Any = status_of(error, usage)
    details = dict(status.trailing_metadata)[rpc_status.GRPC_DETAILS_METADATA_KEY]
    return pb.BatchError.FromString(details)  # the fields are those of google.rpc.Status


def cancelled_result(index: int, item: pb.BatchItem) -> Result:
    """Return what is stored of an item that had no result when its batch was cancelled."""
    message = error_message(errors.Aborted("the batch was cancelled", reason="BATCH_CANCELLED"))
    message.code = 1  # CANCELLED, which the server gives no call
    return _error(index, item, Outcome.CANCELLED, message)


def _error(index: int, item: pb.BatchItem, outcome: Outcome, error: pb.BatchError) -> Result:
    message = pb.BatchResult(item_index=index, custom_id=_id_of(item, index), error=error)
    return Result(index, outcome, message.SerializeToString())


def _id_of(item: pb.BatchItem, index: int) -> str:
    return item.custom_id or str(index)


def result_message(index: int, body: bytes) -> pb.BatchResult:
    """Return a result as callers see it; `index` is its place in the order of results."""
    message = pb.BatchResult.FromString(body)
    message.index = index
    return message


def check_header(header: pb.BatchHeader) -> str | None:
    """Return the idempotency key, None if there is none. Raises InvalidRequest."""
    check_name(header.display_name, "header.display_name")
    try:
        return check.check_idempotency_key(header.idempotency_key)
    except errors.InvalidRequest as error:
        raise errors.InvalidRequest(
            error.message, reason=error.reason, field="header.idempotency_key", limit=check.MAX_IDEMPOTENCY_KEY
        ) from None
