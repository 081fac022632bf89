"""Tenants' records: weight, trust group, retention and quotas. A tenant without a record has the defaults."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from common import keys
from common.errors import TenantNotFound
from common.grants import NO_POLICY, TenantPolicy
from common.redis import Redis, Retry, execute

CACHE_MS: Final = 5000  # a change holds everywhere after so long
_MAX_CACHED: Final = 10_000
_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(TenantPolicy)


@dataclass(frozen=True, slots=True)
class Tenant:
    """A stored tenant."""

    name: str
    policy: TenantPolicy


class Tenants:
    """Reads and writes tenants' records. Methods raise the errors of `Retry` besides what they name.

    `policy` remembers an answer for CACHE_MS; `monotonic_ms` is the clock of that memory.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        retry: Retry | None = None,
        monotonic_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
    ) -> None:
        self._redis = redis
        self._retry = retry or Retry()
        self._monotonic_ms = monotonic_ms
        self._cache: dict[str, tuple[float, TenantPolicy]] = {}  # name -> good until, policy

    async def _execute(self, *command: str | bytes | int) -> Any:
        return await self._retry.call(lambda: execute(self._redis, *command))

    async def policy(self, name: str) -> TenantPolicy:
        """What holds for a tenant now, or held at most CACHE_MS ago."""
        cached = self._cache.get(name)
        now = self._monotonic_ms()
        if cached is not None and now < cached[0]:
            return cached[1]
        stored = await self._execute("HGET", keys.TENANTS, name)
        policy = _DECODER.decode(stored) if stored is not None else NO_POLICY
        if len(self._cache) >= _MAX_CACHED:
            self._cache.clear()
        self._cache[name] = (now + CACHE_MS, policy)
        return policy

    async def get(self, name: str) -> Tenant:
        """A tenant's record as stored. Raises TenantNotFound if it has none."""
        stored = await self._execute("HGET", keys.TENANTS, name)
        if stored is None:
            raise TenantNotFound("no such tenant")
        return Tenant(name, _DECODER.decode(stored))

    async def list(self) -> list[Tenant]:
        """All tenants with a record, by name."""
        stored = await self._execute("HGETALL", keys.TENANTS)
        return [Tenant(name.decode(), _DECODER.decode(policy)) for name, policy in sorted(stored.items())]

    async def set(self, name: str, policy: TenantPolicy) -> Tenant:
        """Write a tenant's record, whole."""
        await self._execute("HSET", keys.TENANTS, name, _ENCODER.encode(policy))
        self._cache.pop(name, None)
        return Tenant(name, policy)

    async def delete(self, name: str) -> None:
        """Forget a tenant's record: it has the defaults again. Raises TenantNotFound."""
        deleted = await self._execute("HDEL", keys.TENANTS, name)
        self._cache.pop(name, None)
        if not deleted:
            raise TenantNotFound("no such tenant")
