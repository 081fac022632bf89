"""Random bytes that all gateways of a deployment share: they key digests and salts."""

from __future__ import annotations

import secrets
from typing import Final

from common import keys
from common.redis import Redis, Retry, execute

_NUM_BYTES: Final = 32


class SharedSecret:
    """The deployment's secret, read once; the first gateway makes it."""

    def __init__(self, redis: Redis, admin_redis: Redis, retry: Retry) -> None:
        self._redis = redis
        self._admin_redis = admin_redis
        self._retry = retry
        self._secret: bytes | None = None

    async def get(self) -> bytes:
        """Return the secret. Raises the errors of `Retry`."""
        if self._secret is None:
            found = await self._read()
            if found is None:
                made = secrets.token_bytes(_NUM_BYTES)
                await self._retry.call(lambda: execute(self._admin_redis, "SET", keys.SHARED_SECRET, made, "NX"))
                found = await self._read()
            self._secret = found
        assert self._secret is not None
        return self._secret

    async def _read(self) -> bytes | None:
        found: bytes | None = await self._retry.call(lambda: execute(self._redis, "GET", keys.SHARED_SECRET))
        return found
