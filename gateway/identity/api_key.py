"""API keys in a call's metadata: `authorization: Bearer`, or `x-api-key`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from common.api_keys import PREFIX, ApiKeys
from common.errors import Unauthenticated
from gateway.identity.caller import CallInfo, Principal

_MAX_TOKEN_CHARS: Final = 8192
_MAX_KEY_CHARS: Final = 512


def bearer_of(call: CallInfo) -> str:
    """Return what follows `Bearer` in the call's authorization, "" if there is none. Raises Unauthenticated."""
    found = call.values("authorization")
    if not found:
        return ""
    scheme, _, token = found[-1].partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or len(token) > _MAX_TOKEN_CHARS:
        raise Unauthenticated("authorization must be: Bearer KEY")
    return token


def api_key_of(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    """Return the API key of a call, "" if it bears none: a bearer token of another kind is none.

    Raises Unauthenticated.
    """
    return _key_of(CallInfo(metadata))


def _key_of(call: CallInfo) -> str:
    key = bearer_of(call)
    if not key.startswith(f"{PREFIX}_"):
        own = call.values("x-api-key")
        key = own[-1].strip() if own else ""
    if len(key) > _MAX_KEY_CHARS:
        raise Unauthenticated("the credentials are not valid")
    return key


class ApiKeyMethod:
    """Identifies by API key."""

    def __init__(self, api_keys: ApiKeys) -> None:
        self._api_keys = api_keys

    async def identify(self, call: CallInfo) -> Principal | None:
        """Return whose key the call bears, None if it bears none. Raises Unauthenticated and the errors of `Retry`."""
        key = _key_of(call)
        if not key:
            return None
        record = await self._api_keys.verify(key)
        return Principal(record.tenant, record.key_id, record.grants, quota_id=record.quota_id)
