"""Who calls: API keys from a call's metadata."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import sha256

from common.errors import Unauthenticated

_MAX_CACHED_KEYS = 4096
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
    """Return the key of `authorization: Bearer` or else of `x-api-key`. Raises Unauthenticated."""
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
        raise Unauthenticated("the API key is not valid")
    return key


class Authenticator:
    """Checks keys against their records, and believes a record for a few seconds so that a call costs no round trip.

    Keys are cached by digest: the process holds no key longer than its call. Refusals are not cached, so a
    new key works at once.
    """

    def __init__(
        self,
        verify: Callable[[str], Awaitable[Caller]],
        cache_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`verify` looks a key up and raises Unauthenticated; `cache_s` bounds how long a revoked key still works."""
        self._verify = verify
        self._cache_s = cache_s
        self._clock = clock
        self._cache: OrderedDict[bytes, tuple[float, Caller]] = OrderedDict()

    async def __call__(self, metadata: Sequence[tuple[str, str | bytes]]) -> Caller:
        """Return the caller. Raises Unauthenticated, or BackendUnavailable while the records cannot be read."""
        key = api_key_of(metadata)
        digest = sha256(key.encode()).digest()
        cached = self._cache.get(digest)
        if cached is not None and self._clock() < cached[0]:
            return cached[1]
        caller = await self._verify(key)
        self._cache[digest] = (self._clock() + self._cache_s, caller)
        self._cache.move_to_end(digest)
        while len(self._cache) > _MAX_CACHED_KEYS:
            self._cache.popitem(last=False)
        return caller
