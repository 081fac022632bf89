"""The first administrator's key: made straight in the store, since nobody may ask a gateway for it yet."""

from __future__ import annotations

import asyncio
import sys

from common import keys
from common.api_keys import ApiKeys
from common.errors import FailedPrecondition, ServingError
from common.grants import ADMIN_SCOPES, Grants
from common.redis import Redis, Retry, connect, execute
from common.settings import RedisSettings
from common.startup import read_settings
from gateway.settings import GatewaySettings


async def first_admin_key(redis: Redis, tenant: str, *, again: bool = False) -> str:
    """Make a key with every administrative scope, unless one was made here before.

    Raises FailedPrecondition then, but for `again`; and InvalidRequest, and the errors of `Retry`.
    """
    retry = Retry()
    claim = await retry.call(lambda: execute(redis, "SET", keys.FIRST_ADMIN_KEY, "", *(() if again else ("NX",))))
    if claim is None:
        raise FailedPrecondition("the first administrator's key was made already; --again makes another")
    try:
        created = await ApiKeys(redis, retry=retry).create(
            tenant, "first administrator", grants=Grants(scopes=ADMIN_SCOPES)
        )
    except ServingError:
        await retry.call(lambda: execute(redis, "DEL", keys.FIRST_ADMIN_KEY))
        raise
    await retry.call(lambda: execute(redis, "SET", keys.FIRST_ADMIN_KEY, created.api_key.key_id))
    return created.secret


def main(tenant: str, *, again: bool) -> int:
    """Print the key on stdout; return the exit status."""
    settings, redis_settings = read_settings(lambda: (GatewaySettings(), RedisSettings()), GatewaySettings)

    async def make() -> str:
        url = settings.admin_redis_url or redis_settings.url
        redis = connect(redis_settings.model_copy(update={"url": url}))
        try:
            return await first_admin_key(redis, tenant, again=again)
        finally:
            await redis.aclose()

    try:
        key = asyncio.run(make())
    except ServingError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 1
    sys.stdout.write(key + "\n")
    return 0
