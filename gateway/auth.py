"""Who calls: API keys from a call's metadata."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from common.api_keys import ApiKeys
from common.errors import Unauthenticated

_MAX_KEY_CHARS = 512


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose call this is."""

    tenant: str
    key_id: str


# Set by the guard for the duration of one call.
CALLER: ContextVar[Caller] = ContextVar("torchrelay_caller")


def current_caller() -> Caller:
    """Return who makes the call that is being served."""
    return CALLER.get()


def api_key_of(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    """Return the key of `authorization: Bearer`, or else of `x-api-key`. Raises Unauthenticated."""
    bearer = own = ""
    for name, value in metadata:
        if isinstance(value, bytes):
            continue
        if name == "authorization":
            scheme, _, token = value.partition(" ")
            if scheme.lower() != "bearer" or not token.strip():
                raise Unauthenticated("authorization must be: Bearer KEY")
            bearer = token.strip()
        elif name == "x-api-key":
            own = value.strip()
    key = bearer or own
    if not key:
        raise Unauthenticated(
            "an API key is required in `authorization: Bearer` or `x-api-key`", reason="CREDENTIALS_MISSING"
        )
    if len(key) > _MAX_KEY_CHARS:
        raise Unauthenticated("the credentials are not valid")
    return key


def authenticator(api_keys: ApiKeys) -> Callable[[Sequence[tuple[str, str | bytes]]], Awaitable[Caller]]:
    """Return the function that turns a call's metadata into its caller, or raises Unauthenticated."""

    async def authenticate(metadata: Sequence[tuple[str, str | bytes]]) -> Caller:
        record = await api_keys.verify(api_key_of(metadata))
        return Caller(record.tenant, record.key_id)

    return authenticate
