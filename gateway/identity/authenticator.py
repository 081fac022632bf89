"""From a call to its caller: the first kind of credential that the call bears, in the operator's order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from common.errors import Unauthenticated
from common.tenants import Tenants
from gateway.identity.api_key import bearer_of
from gateway.identity.caller import Caller, CallInfo, Principal


class CredentialMethod(Protocol):
    """One kind of credential."""

    async def identify(self, call: CallInfo) -> Principal | None:
        """Return who calls, None if the call bears no credential of this kind.

        Raises Unauthenticated for one that is not accepted, with a text that does not say why.
        """


class Authenticator:
    """Turns calls into callers. `methods` are tried in order, and the first that finds its credential decides.

    With `strict`, a call that bears two credentials in its metadata is refused, whatever they are worth: values under
    both names, or different ones under one. `wanted` says which credentials there are, for whoever brings none;
    `closing` ends what the methods do in the background.
    """

    def __init__(
        self,
        methods: Sequence[CredentialMethod],
        tenants: Tenants,
        *,
        strict: bool = False,
        wanted: str = "",
        closing: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._methods = methods
        self._tenants = tenants
        self._strict = strict
        self._closing = closing
        self._missing = f"credentials are required: {wanted}" if wanted else "credentials are required"

    async def aclose(self) -> None:
        """End what runs in the background; to be called when no calls are left."""
        if self._closing is not None:
            await self._closing()

    async def authenticate(self, call: CallInfo) -> Caller:
        """Return whose call this is. Raises Unauthenticated, and the errors of `Retry` when the store is away."""
        if self._strict and _num_credentials(call) > 1:
            raise Unauthenticated("the call bears two credentials; send one", reason="CREDENTIALS_AMBIGUOUS")
        bearer = bearer_of(call)
        for method in self._methods:
            principal = await method.identify(call)
            if principal is not None:
                policy = await self._tenants.policy(principal.tenant)
                return Caller(
                    principal.tenant,
                    principal.credential_id,
                    principal.grants,
                    policy,
                    principal.method,
                    principal.quota_id,
                )
        if bearer:
            raise Unauthenticated("the credentials are not valid")
        raise Unauthenticated(self._missing, reason="CREDENTIALS_MISSING")


def _num_credentials(call: CallInfo) -> int:
    """How many credentials a call's metadata bears; the same value twice under one name is one."""
    return sum(len(set(call.values(name))) for name in ("authorization", "x-api-key"))
