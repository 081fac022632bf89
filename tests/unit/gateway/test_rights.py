"""Scopes, models and priorities of a caller."""

from __future__ import annotations

import pytest

from common.errors import InvalidRequest, ModelNotFound, PermissionDenied
from common.grants import ADMIN_SCOPES, DATA_SCOPES, Grants, Scope
from gateway.identity.caller import Caller
from gateway.rights import check_method, check_model, priority_of
from torchrelay.admin.v1beta1 import api_key_pb2, fleet_pb2, tenant_pb2, usage_pb2
from torchrelay.v1 import generation_pb2, model_pb2

FILES = (api_key_pb2, fleet_pb2, tenant_pb2, usage_pb2, generation_pb2, model_pb2)
METHODS = [
    f"/{service.full_name}/{method.name}"
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


def caller(**grants: object) -> Caller:
    return Caller("acme", "k1", Grants(**grants))  # type: ignore[arg-type]


def allowed(scopes: tuple[str, ...]) -> set[str]:
    found = set()
    for method in METHODS:
        try:
            check_method(method, caller(scopes=scopes))
        except PermissionDenied:
            continue
        found.add(method)
    return found


def test_every_method_has_a_scope_and_only_models_are_for_all() -> None:
    assert len(METHODS) > 20
    assert {method.split("/")[1] for method in allowed(())} == {"torchrelay.v1.ModelService"}
    assert allowed((*DATA_SCOPES, *ADMIN_SCOPES)) == set(METHODS)
    assert not any(".admin." in method for method in allowed(DATA_SCOPES)), "what a key has whose maker said nothing"


@pytest.mark.parametrize(
    ("scope", "service"),
    [
        (Scope.GENERATE, "torchrelay.v1.GenerationService"),
        (Scope.ADMIN_KEYS, "torchrelay.admin.v1beta1.ApiKeyService"),
        (Scope.ADMIN_TENANTS, "torchrelay.admin.v1beta1.TenantService"),
        (Scope.ADMIN_FLEET, "torchrelay.admin.v1beta1.FleetService"),
        (Scope.ADMIN_USAGE, "torchrelay.admin.v1beta1.UsageService"),
    ],
)
def test_a_scope_opens_its_service_alone(scope: Scope, service: str) -> None:
    opened = {method.split("/")[1] for method in allowed((scope.value,)) - allowed(())}
    assert opened == {service}


@pytest.mark.parametrize(
    ("models", "name", "is_allowed"),
    [
        ((), "any", True),
        (("tiny",), "tiny", True),
        (("tiny",), "tiny2", False),
        (("team-*", "tiny"), "team-a", True),
        (("team-*",), "other-team-a", False),
        (("*",), "any", True),
    ],
)
def test_models_by_name_or_prefix(models: tuple[str, ...], name: str, is_allowed: bool) -> None:
    if is_allowed:
        check_model(caller(models=models), name, reveal=False)
        return
    with pytest.raises(PermissionDenied) as denied:
        check_model(caller(models=models), name, reveal=True)
    assert denied.value.reason == "MODEL_NOT_ALLOWED"
    with pytest.raises(ModelNotFound):
        check_model(caller(models=models), name, reveal=False)


@pytest.mark.parametrize(
    ("wanted", "classes", "found"),
    [
        (generation_pb2.PRIORITY_UNSPECIFIED, (0, 1, 2), 1),
        (generation_pb2.PRIORITY_UNSPECIFIED, (1, 2), 1),
        (generation_pb2.PRIORITY_UNSPECIFIED, (2,), 2),
        (generation_pb2.PRIORITY_UNSPECIFIED, (0,), 0),
        (generation_pb2.PRIORITY_HIGH, (0, 1), 0),
        (generation_pb2.PRIORITY_LOW, (2,), 2),
    ],
)
def test_a_priority_is_a_class(wanted: int, classes: tuple[int, ...], found: int) -> None:
    assert priority_of(wanted, classes) == found


def test_a_priority_that_is_not_allowed_and_one_that_is_none() -> None:
    with pytest.raises(PermissionDenied) as denied:
        priority_of(generation_pb2.PRIORITY_HIGH, (1, 2))
    assert denied.value.reason == "PRIORITY_NOT_ALLOWED"
    with pytest.raises(InvalidRequest) as invalid:
        priority_of(99, (0, 1, 2))
    assert (invalid.value.reason, invalid.value.metadata["field"]) == ("FIELD_INVALID", "priority")
