"""Acknowledgement of replicas: what was accepted survives the loss of the primary.

A script is followed, on the same connection, by WAITAOF (replicas have it on disk) or WAIT (in memory), which answers
how many replicas have all that this connection has written. So the script must write something even when it repeats:
see enqueue.lua.
"""

from __future__ import annotations

import time
from typing import Any, Final, cast

from redis.exceptions import ResponseError

from common.errors import ReplicationUnconfirmed
from common.redis import Redis, execute
from common.scripts import ScriptRunner
from common.settings import RedisSettings
from common.wire import Argument

_RETRY_AFTER_MS: Final = 1000
# A replica tells how far it has synced when it is asked, and each second. Asked in the same breath as it is sent the
# write, it answers before the sync; so it is asked again, at first soon.
_FIRST_WAIT_MS: Final = 5
_MAX_WAIT_MS: Final = 20


class ReplicaAcks:
    """Runs scripts that count only once `min_replicas` replicas have what they wrote.

    Each call keeps a connection of `redis` until the replicas have answered: a pool of its own, so that a stopped
    replica holds up nothing but new jobs.
    """

    def __init__(self, redis: Redis, settings: RedisSettings) -> None:
        self._redis = redis
        self._min_replicas = settings.min_replicas
        self._timeout_ms = settings.wait_timeout_ms
        self._has_waitaof = settings.replica_sync == "disk"

    @property
    def is_demanded(self) -> bool:
        """Whether any replica is asked at all."""
        return self._min_replicas > 0

    async def run(self, scripts: ScriptRunner, name: str, key: str, *args: Argument) -> Any:
        """Run a script once, as `ScriptRunner.run`, and wait for the replicas.

        Raises ReplicationUnconfirmed when too few answer in time, and redis-py's errors.
        """
        async with cast(Redis, self._redis.client()) as connection:
            reply = await scripts.on(connection).run(name, key, *args)
            replicas = await self._wait(connection)
        if replicas < self._min_replicas:
            raise ReplicationUnconfirmed(
                "too few replicas have confirmed the request: whether it is kept is unknown; repeat it with the same "
                "idempotency key",
                metadata={"limit": str(self._min_replicas), "got": str(replicas)},
                retry_after_ms=_RETRY_AFTER_MS,
            )
        return reply

    async def _wait(self, connection: Redis) -> int:
        """How many replicas have what the connection wrote: enough, or what there were when the time was over."""
        end = time.monotonic() + self._timeout_ms / 1000
        wait_ms = _FIRST_WAIT_MS
        while True:
            left_ms = int((end - time.monotonic()) * 1000)
            replicas = await self._ask(connection, max(1, min(wait_ms, left_ms)))
            if replicas >= self._min_replicas or left_ms <= wait_ms:
                return replicas
            wait_ms = min(2 * wait_ms, _MAX_WAIT_MS)

    async def _ask(self, connection: Redis, timeout_ms: int) -> int:
        if self._has_waitaof:
            try:
                return int((await execute(connection, "WAITAOF", 0, self._min_replicas, timeout_ms))[1])
            except ResponseError as error:
                if "unknown command" not in str(error).lower():
                    raise
                self._has_waitaof = False  # an older server
        return int(await execute(connection, "WAIT", self._min_replicas, timeout_ms))
