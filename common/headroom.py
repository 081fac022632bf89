"""Room in the server's memory: new work is refused while running work can still be stored to its end.

Commits and cancellations are written even above `maxmemory` (scripts with allow-oom): what was accepted must be able to
end. Without a bound below that, accepted work alone could drive the server beyond what its host or container grants.
"""

from __future__ import annotations

from typing import Final

import structlog

from common.errors import BackendFull, BackendRefused
from common.redis import Redis, Retry, execute

_LOG: Final = structlog.get_logger(__name__)
_RETRY_AFTER_MS: Final = 1000


class Headroom:
    """The share of `maxmemory` that the server uses, as of the last `measure`; no bound where it has no `maxmemory`."""

    def __init__(self, redis: Redis, max_share: float, *, retry: Retry | None = None) -> None:
        self._redis = redis
        self._max_share = max_share
        self._retry = retry or Retry()
        self._used_share = 0.0
        self._is_refused = False
        self._is_known = True

    @property
    def used_share(self) -> float:
        """Of `maxmemory`, 0.0 while unknown or without one."""
        return self._used_share

    async def measure(self) -> None:
        """Ask the server; to be called each second. Raises BackendUnavailable.

        A server that does not tell (a managed one may refuse INFO, or a proxy leave its fields out) is taken for one
        without a bound, and logged once.
        """
        if self._is_refused:
            return
        try:
            info = await self._retry.call(lambda: execute(self._redis, "INFO", "memory"))
        except BackendRefused:
            self._is_refused = True
            self._forget("INFO is refused: no bound below the server's own")
            return
        if "maxmemory" not in info or "used_memory" not in info:  # asked again: another server may answer next time
            self._forget("INFO tells no maxmemory or used_memory: no bound below the server's own")
            return
        self._is_known = True
        limit = int(info["maxmemory"])
        # Buffers of replicas and of the append-only file are not held against maxmemory by the server either.
        used = int(info["used_memory"]) - int(info.get("mem_not_counted_for_evict", 0))
        before, self._used_share = self._used_share, used / limit if limit else 0.0
        if (before > self._max_share) != (self._used_share > self._max_share):
            _LOG.warning("queue.memory", used_share=round(self._used_share, 3), accepts=not self.is_short)

    def _forget(self, detail: str) -> None:
        if self._is_known:
            _LOG.warning("queue.memory_unknown", detail=detail)
        self._is_known = False
        self._used_share = 0.0

    @property
    def is_short(self) -> bool:
        return self._used_share > self._max_share

    def check(self) -> None:
        """Raise BackendFull while there is no room for new work."""
        if self.is_short:
            raise BackendFull(
                "the queue's server has too little memory left for new work",
                metadata={"limit": f"{self._max_share:.2f}", "got": f"{self._used_share:.2f}"},
                retry_after_ms=_RETRY_AFTER_MS,
            )
