"""Between admin messages and what is stored: grants, quotas, tenants; checks, all bad fields at once. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from common.errors import InvalidRequest, PermissionDenied
from common.grants import (
    ADMIN_SCOPES,
    NO_GRANTS_GIVEN,
    PRIORITY_HIGH,
    PRIORITY_LOW,
    PRIORITY_NORMAL,
    TENANT_NAME,
    Caps,
    Grants,
    Quotas,
    Scope,
    TenantPolicy,
)
from common.tenants import Tenant
from gateway import convert
from gateway.validation import milliseconds
from gateway.violations import Violations
from torchrelay.admin.v1beta1 import grants_pb2, tenant_pb2
from torchrelay.v1 import generation_pb2

_MAX_MODELS: Final = 256
_MAX_MODEL_NAME: Final = 256
_MAX_COUNT: Final = 1 << 40  # beyond any use, and exact in the server's arithmetic
_MAX_WEIGHT: Final = 1000.0
_MIN_WEIGHT: Final = 0.001
_LATEST_MS: Final = 7_258_118_400_000  # 2200-01-01; far below what a timestamp can hold

_SCOPES: Final[Mapping[int, str]] = {
    grants_pb2.SCOPE_GENERATE: Scope.GENERATE.value,
    grants_pb2.SCOPE_TASKS: Scope.TASKS.value,
    grants_pb2.SCOPE_BATCH: Scope.BATCH.value,
    grants_pb2.SCOPE_ADMIN_KEYS: Scope.ADMIN_KEYS.value,
    grants_pb2.SCOPE_ADMIN_TENANTS: Scope.ADMIN_TENANTS.value,
    grants_pb2.SCOPE_ADMIN_FLEET: Scope.ADMIN_FLEET.value,
    grants_pb2.SCOPE_ADMIN_USAGE: Scope.ADMIN_USAGE.value,
}
_SCOPE_NUMBERS: Final = {scope: number for number, scope in _SCOPES.items()}
_PRIORITIES: Final[Mapping[int, int]] = {
    generation_pb2.PRIORITY_HIGH: PRIORITY_HIGH,
    generation_pb2.PRIORITY_NORMAL: PRIORITY_NORMAL,
    generation_pb2.PRIORITY_LOW: PRIORITY_LOW,
}
_PRIORITY_NUMBERS: Final = {priority: number for number, priority in _PRIORITIES.items()}
_QUOTAS: Final = ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "max_queued", "max_live")
_CAPS: Final = ("max_tokens", "max_outputs", "max_context_tokens")


def check_tenant_name(name: str, field: str = "tenant") -> str:
    """Return the name. Raises InvalidRequest."""
    if not TENANT_NAME.fullmatch(name):
        raise InvalidRequest(
            "must be 1 to 64 of a-z, 0-9, '-', '_' and '.'",
            reason="FIELD_INVALID" if name else "FIELD_REQUIRED",
            field=field,
        )
    return name


def grants_of(message: grants_pb2.Grants) -> Grants:
    """Return the grants of a message. Raises InvalidRequest with every bad field."""
    bad = Violations()
    for index, scope in enumerate(message.scopes):
        if scope not in _SCOPES:
            bad.add(f"grants.scopes[{index}]", "must be a scope that this server knows", "FIELD_INVALID")
    for index, priority in enumerate(message.priorities):
        if priority not in _PRIORITIES:
            bad.add(f"grants.priorities[{index}]", "must be a priority", "FIELD_INVALID")
    if len(message.models) > _MAX_MODELS:
        bad.add("grants.models", f"at most {_MAX_MODELS} are taken")
    for index, model in enumerate(message.models):
        if not 1 <= len(model) <= _MAX_MODEL_NAME or "*" in model[:-1]:
            bad.add(
                f"grants.models[{index}]",
                f"must be 1 to {_MAX_MODEL_NAME} characters, with '*' at the end at most",
                "FIELD_INVALID",
            )
    caps = {name: getattr(message.caps, name) for name in _CAPS if message.caps.HasField(name)}
    for name, value in caps.items():
        if value < 1:
            bad.add(f"grants.caps.{name}", "must be at least 1")
    quotas = _quotas_of(message.quotas, "grants.quotas", bad)
    bad.raise_if_any()
    grace = message.caps.max_disconnect_grace if message.caps.HasField("max_disconnect_grace") else None
    return Grants(
        scopes=tuple(dict.fromkeys(_SCOPES[scope] for scope in message.scopes)) or NO_GRANTS_GIVEN.scopes,
        models=tuple(message.models),
        priorities=tuple(sorted({_PRIORITIES[one] for one in message.priorities})) or NO_GRANTS_GIVEN.priorities,
        caps=Caps(
            **caps,
            max_disconnect_grace_ms=None
            if grace is None
            else milliseconds(grace, "grants.caps.max_disconnect_grace", minimum=0),
        ),
        quotas=quotas,
    )


def grants_message(grants: Grants) -> grants_pb2.Grants:
    """Return the message of grants; a scope that only a later server knows is left out."""
    caps = grants_pb2.Caps(**{name: getattr(grants.caps, name) for name in _CAPS})
    if grants.caps.max_disconnect_grace_ms is not None:
        caps.max_disconnect_grace.CopyFrom(convert.duration(grants.caps.max_disconnect_grace_ms))
    scopes: Sequence[int] = [_SCOPE_NUMBERS[scope] for scope in grants.scopes if scope in _SCOPE_NUMBERS]
    return grants_pb2.Grants(
        scopes=scopes,  # type: ignore[arg-type]
        models=grants.models,
        priorities=[_PRIORITY_NUMBERS[one] for one in grants.priorities],  # type: ignore[misc]
        caps=caps,
        quotas=_quotas_message(grants.quotas),
    )


def policy_of(message: tenant_pb2.Tenant) -> TenantPolicy:
    """Return the policy in a tenant's record. Raises InvalidRequest with every bad field."""
    bad = Violations()
    weight = message.weight if message.HasField("weight") else 1.0
    if not math.isfinite(weight) or not _MIN_WEIGHT <= weight <= _MAX_WEIGHT:
        bad.add("tenant.weight", f"must be {_MIN_WEIGHT:g} to {_MAX_WEIGHT:g}")
    if message.trust_group and not TENANT_NAME.fullmatch(message.trust_group):
        bad.add("tenant.trust_group", "must be at most 64 of a-z, 0-9, '-', '_' and '.'", "FIELD_INVALID")
    quotas = _quotas_of(message.quotas, "tenant.quotas", bad)
    bad.raise_if_any()
    retention_ms = None
    if message.HasField("max_retention"):
        retention_ms = milliseconds(message.max_retention, "tenant.max_retention", minimum=1000)
    return TenantPolicy(weight=weight, trust_group=message.trust_group, retention_ms=retention_ms, quotas=quotas)


def tenant_message(tenant: Tenant) -> tenant_pb2.Tenant:
    """Return the message of a tenant's record."""
    policy = tenant.policy
    message = tenant_pb2.Tenant(
        tenant=tenant.name,
        weight=policy.weight,
        trust_group=policy.trust_group,
        quotas=_quotas_message(policy.quotas),
    )
    if policy.retention_ms is not None:
        message.max_retention.CopyFrom(convert.duration(policy.retention_ms))
    return message


def check_scopes(scopes: Iterable[str], own: Collection[str]) -> None:
    """Raise PermissionDenied for an administrative scope that the caller does not have itself."""
    if any(scope in ADMIN_SCOPES and scope not in own for scope in scopes):
        raise PermissionDenied(
            "an administrative scope can be given, and keys that have it changed, by those who have it",
            reason="SCOPE_NOT_ALLOWED",
        )


def milliseconds_of(moment: Timestamp, field: str) -> int:
    """Return a time in ms since the epoch. Raises InvalidRequest for one that is none, or a hundred years away."""
    try:
        value = moment.ToMilliseconds()
    except ValueError:
        value = -1
    if not 0 <= value <= _LATEST_MS or not 0 <= moment.nanos < 1_000_000_000:
        raise InvalidRequest("must be a valid time before the year 2200", reason="FIELD_OUT_OF_RANGE", field=field)
    return value


def page_start(token: str, names: Sequence[str]) -> int:
    """Return the index behind the item that a page token names. Raises InvalidRequest for a foreign token."""
    if not token:
        return 0
    try:
        return names.index(token) + 1
    except ValueError:
        raise InvalidRequest("is not a token of this list", reason="FIELD_INVALID", field="page_token") from None


def _quotas_of(message: grants_pb2.Quotas, path: str, bad: Violations) -> Quotas:
    values = {name: getattr(message, name) for name in _QUOTAS}
    for name, value in values.items():
        if value > _MAX_COUNT:
            bad.add(f"{path}.{name}", f"must be at most {_MAX_COUNT}")
    return Quotas(**values)


def _quotas_message(quotas: Quotas) -> grants_pb2.Quotas:
    return grants_pb2.Quotas(**{name: getattr(quotas, name) for name in _QUOTAS})
