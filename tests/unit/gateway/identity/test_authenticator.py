"""Which of a call's credentials decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest

from common.errors import Unauthenticated
from common.grants import Grants, TenantPolicy
from common.tenants import Tenants
from gateway.identity.authenticator import Authenticator
from gateway.identity.caller import Caller, CallInfo, Principal

GRANTS = Grants(models=("tiny",))


@dataclass
class Method:
    """Finds its credential in the metadata value of its name; `bad` is not accepted."""

    name: str
    num_asked: int = 0

    async def identify(self, call: CallInfo) -> Principal | None:
        self.num_asked += 1
        values = call.values(self.name)
        if values == ["bad"]:
            raise Unauthenticated("the credentials are not valid")
        return Principal(values[0], f"{self.name}-id", GRANTS, self.name) if values else None


class Policies:
    async def policy(self, name: str) -> TenantPolicy:
        return TenantPolicy(weight=float(len(name)))


def authenticator(*methods: Method, strict: bool = False) -> Authenticator:
    return Authenticator(methods, cast(Tenants, Policies()), strict=strict)


async def test_the_first_method_that_finds_its_credential_decides() -> None:
    first, second = Method("first"), Method("second")
    caller = await authenticator(first, second).authenticate(CallInfo([("second", "acme"), ("first", "umbrella")]))
    assert caller == Caller("umbrella", "first-id", GRANTS, TenantPolicy(weight=8), "first")
    assert second.num_asked == 0
    caller = await authenticator(first, second).authenticate(CallInfo([("second", "acme")]))
    assert caller.tenant == "acme"


async def test_a_credential_that_is_not_accepted_is_not_made_good_by_another() -> None:
    with pytest.raises(Unauthenticated):
        await authenticator(Method("first"), Method("second")).authenticate(
            CallInfo([("first", "bad"), ("second", "acme")])
        )


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [([], "CREDENTIALS_MISSING"), ([("authorization", "Bearer what-nobody-knows")], "CREDENTIALS_INVALID")],
    ids=["none", "unknown"],
)
async def test_nothing_found(metadata: list[tuple[str, str | bytes]], reason: str) -> None:
    with pytest.raises(Unauthenticated) as raised:
        await authenticator(Method("first")).authenticate(CallInfo(metadata))
    assert raised.value.reason == reason


async def test_two_credentials_are_ambiguous_only_where_that_is_asked_for() -> None:
    call = CallInfo([("authorization", "Bearer a.b.c"), ("x-api-key", "tr_x"), ("first", "acme")])
    assert (await authenticator(Method("first")).authenticate(call)).tenant == "acme"
    with pytest.raises(Unauthenticated) as raised:
        await authenticator(Method("first"), strict=True).authenticate(call)
    assert raised.value.reason == "CREDENTIALS_AMBIGUOUS"


@pytest.mark.parametrize("name", ["authorization", "x-api-key"])
async def test_two_values_of_one_name_are_ambiguous_too_unless_they_are_the_same(name: str) -> None:
    values = ("Bearer a.b.c", "Bearer a.b.d")
    own = [("first", "acme")]
    twice: list[tuple[str, str | bytes]] = [*((name, value) for value in values), *own]
    strict, lax = authenticator(Method("first"), strict=True), authenticator(Method("first"))
    with pytest.raises(Unauthenticated) as raised:
        await strict.authenticate(CallInfo(twice))
    assert raised.value.reason == "CREDENTIALS_AMBIGUOUS"
    assert (await lax.authenticate(CallInfo(twice))).tenant == "acme"
    same: list[tuple[str, str | bytes]] = [(name, values[0]), (name, values[0]), *own]
    assert (await strict.authenticate(CallInfo(same))).tenant == "acme"
