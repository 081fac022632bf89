"""Random bytes that all gateways of a deployment share: they key digests and salts."""

from __future__ import annotations

import secrets
from typing import Final

from common import keys
from common.redis import Redis, Retry, execute

_NUM_BYTES: Final = 32


async def shared_secret(redis: Redis, admin_redis: Redis, retry: Retry) -> bytes:
    """Return the deployment's secret; the first gateway makes it. Raises the errors of `Retry`."""
    found = await retry.call(lambda: execute(redis, "GET", keys.SHARED_SECRET))
    if found is None:
        made = secrets.token_bytes(_NUM_BYTES)
        await retry.call(lambda: execute(admin_redis, "SET", keys.SHARED_SECRET, made, "NX"))
        found = await retry.call(lambda: execute(redis, "GET", keys.SHARED_SECRET))
    return bytes(found)
