"""What a caller may do: methods by scope, models, priorities and caps. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from common import errors
from common.grants import PRIORITY_HIGH, PRIORITY_LOW, PRIORITY_NORMAL, Scope
from gateway.identity.caller import Caller
from torchrelay.v1 import generation_pb2 as pb

# The scope that each service asks for; None: every caller may.
SCOPE_OF: Final[Mapping[str, Scope | None]] = {
    "torchrelay.v1.GenerationService": Scope.GENERATE,
    "torchrelay.v1.ModelService": None,
    "torchrelay.v1.EmbeddingService": Scope.TASKS,
    "torchrelay.v1.ClassificationService": Scope.TASKS,
    "torchrelay.v1.BatchService": Scope.BATCH,
    "torchrelay.admin.v1beta1.ApiKeyService": Scope.ADMIN_KEYS,
    "torchrelay.admin.v1beta1.TenantService": Scope.ADMIN_TENANTS,
    "torchrelay.admin.v1beta1.FleetService": Scope.ADMIN_FLEET,
    "torchrelay.admin.v1beta1.LogService": Scope.ADMIN_FLEET,
    "torchrelay.admin.v1beta1.UsageService": Scope.ADMIN_USAGE,
}
_PRIORITIES: Final[Mapping[int, int]] = {
    pb.PRIORITY_HIGH: PRIORITY_HIGH,
    pb.PRIORITY_NORMAL: PRIORITY_NORMAL,
    pb.PRIORITY_LOW: PRIORITY_LOW,
}


def check_method(method: str, caller: Caller) -> None:
    """Raise PermissionDenied for a method (`/package.Service/Method`) outside the caller's scopes."""
    scope = SCOPE_OF[method[1:].partition("/")[0]]
    if scope is not None and scope.value not in caller.grants.scopes:
        raise errors.PermissionDenied("this key may not call this method", metadata={"scope": scope.value})


def check_model(caller: Caller, name: str, *, reveal: bool) -> None:
    """Raise PermissionDenied for a model that the caller may not use; ModelNotFound where it must not learn of it."""
    if caller.grants.allows_model(name):
        return
    if reveal:
        raise errors.PermissionDenied("this key may not use this model", reason="MODEL_NOT_ALLOWED")
    raise errors.ModelNotFound("no such model")


def priority_of(wanted: int, allowed: Iterable[int]) -> int:
    """Return the queue's class for a request's priority.

    Unset is normal, or where that is not allowed the next lower or else higher one that is. Raises InvalidRequest for
    no priority at all, PermissionDenied for one that is not allowed.
    """
    classes = sorted(allowed)
    if wanted == pb.PRIORITY_UNSPECIFIED and classes:
        return next((one for one in classes if one >= PRIORITY_NORMAL), classes[-1])
    found = _PRIORITIES.get(wanted)
    if found is None and wanted != pb.PRIORITY_UNSPECIFIED:
        raise errors.InvalidRequest(
            "must be PRIORITY_HIGH, PRIORITY_NORMAL or PRIORITY_LOW", reason="FIELD_INVALID", field="priority"
        )
    if found not in classes:
        raise errors.PermissionDenied(
            "this key may not ask for this priority", reason="PRIORITY_NOT_ALLOWED", metadata={"field": "priority"}
        )
    return found
