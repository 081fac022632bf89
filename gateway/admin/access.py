"""Who may call the operators' services."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from common.errors import Unauthenticated
from common.grants import ADMIN_SCOPES, Grants
from gateway.identity.caller import Caller, CallInfo

LOCAL_OPERATOR: Final = Caller("", "", Grants(scopes=ADMIN_SCOPES), method="local")


def operator_authenticator(
    authenticate: Callable[[CallInfo], Awaitable[Caller]], *, is_open: bool
) -> Callable[[CallInfo], Awaitable[Caller]]:
    """Return how operators are known. `is_open`: who brings no credentials is an operator with all scopes.

    That is for an address at loopback: who reaches it can read the server's own memory and configuration. Credentials
    that a call does bring count there too, with no more than their own scopes.
    """

    async def operator(call: CallInfo) -> Caller:
        try:
            return await authenticate(call)
        except Unauthenticated as error:
            if is_open and error.reason == "CREDENTIALS_MISSING":
                return LOCAL_OPERATOR
            raise

    return operator
