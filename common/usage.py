"""What was used, hour by hour, as the scripts that end generations have counted it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from common import keys
from common.redis import Redis, Retry, execute

KEPT_HOURS: Final = 35 * 24
_AT_ONCE: Final = 64


@dataclass(slots=True)
class Counts:
    """Sums over generations."""

    generations: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: Counts) -> None:
        self.generations += other.generations
        self.prompt_tokens += other.prompt_tokens
        self.cached_prompt_tokens += other.cached_prompt_tokens
        self.completion_tokens += other.completion_tokens


@dataclass(frozen=True, slots=True, order=True)
class UsageKey:
    """Whose usage it is. `hour` counts from the epoch."""

    hour: int
    tenant: str
    shard: str
    key_id: str


class UsageReader:
    """Reads usage. Raises the errors of `Retry`."""

    def __init__(self, redis: Redis, *, retry: Retry | None = None) -> None:
        self._redis = redis
        self._retry = retry or Retry()

    async def now_hour(self) -> int:
        """The server's hour."""
        seconds, _ = await self._retry.call(lambda: execute(self._redis, "TIME"))
        return int(seconds) // 3600

    async def read(self, shards: Iterable[str], hours: range) -> dict[UsageKey, Counts]:
        """All that was counted in some shards (model revisions) and hours."""
        wanted = [(shard, hour) for hour in hours for shard in shards]
        found: dict[UsageKey, Counts] = defaultdict(Counts)
        for start in range(0, len(wanted), _AT_ONCE):
            part = wanted[start : start + _AT_ONCE]
            stored = await asyncio.gather(*(self._hour(shard, hour) for shard, hour in part))
            for (shard, hour), fields in zip(part, stored, strict=True):
                for name, amount in fields.items():
                    kind, key_id, tenant = name.decode().split(":", 2)
                    counts = found[UsageKey(hour, tenant, shard, key_id)]
                    if kind in Counts.__slots__:  # later programs may count more kinds
                        setattr(counts, kind, int(amount))
        return dict(found)

    async def _hour(self, shard: str, hour: int) -> dict[bytes, bytes]:
        stored: dict[bytes, bytes] = await self._retry.call(
            lambda: execute(self._redis, "HGETALL", keys.usage(shard, hour))
        )
        return stored
