"""Quotas over time: requests and tokens a minute, tokens a day, of a tenant and of each of its credentials.

They live under the tenant's own hash tag, apart from any model's shard, so that they hold over all models and gateways.
A generation reserves its most before it is queued; the script that ends it leaves word in its shard of what it used,
and the next round of any gateway's upkeep gives the rest back (see `scripts/quota_settle.lua`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from common import keys
from common.errors import InvalidRequest, QuotaExceeded, RateLimited
from common.grants import Quotas
from common.redis import Redis, Retry
from common.scripts import ScriptRunner, as_list
from common.wire import Argument

_NOT_BEGUN: Final = -1
_WORDS: Final = {
    "requests_per_minute": "requests a minute",
    "tokens_per_minute": "tokens a minute",
    "tokens_per_day": "tokens a day",
}


@dataclass(frozen=True, slots=True)
class Reservation:
    """What is asked for: an id that makes a repeat harmless, and tokens."""

    tenant: str
    quota_id: str  # of the credential
    reservation_id: str
    num_tokens: int


class QuotaMeter:
    """Reserves and settles. Every method is one script call and raises the errors of `Retry` besides what it names."""

    def __init__(
        self,
        redis: Redis,
        lifetime_ms: int,
        *,
        retry: Retry | None = None,
        scripts: ScriptRunner | None = None,
    ) -> None:
        """`lifetime_ms`: a reservation that nobody settles is kept for so long; longer than any generation lives."""
        self._retry = retry or Retry()
        self._scripts = scripts or ScriptRunner(redis)
        self._lifetime_ms = lifetime_ms

    async def reserve(self, wanted: Reservation, of_tenant: Quotas, of_key: Quotas) -> None:
        """Count a request in all quotas of tenant and credential, or in none.

        Raises RateLimited with the exact time to wait, QuotaExceeded when the day's tokens are spent, and
        InvalidRequest (REQUEST_TOO_LARGE) for a request that no waiting would help.
        """
        reply = await self._run(
            "quota_reserve",
            wanted.tenant,
            wanted.reservation_id,
            wanted.num_tokens,
            self._lifetime_ms,
            _limits(of_tenant),
            wanted.quota_id,
            _limits(of_key),
        )
        status, *rest = as_list(reply)
        if status == b"OK":
            return
        owner, name, limit = rest[0].decode(), rest[1].decode(), rest[2]
        subject = f"{owner}:{name}"
        text = f"the {owner}'s quota of {limit} {_WORDS[name]}"
        if status == b"TOO_LARGE":
            raise InvalidRequest(
                f"prompt and most new tokens exceed {text}",
                reason="REQUEST_TOO_LARGE",
                field="config.max_tokens",
                limit=limit,
                got=wanted.num_tokens,
            )
        if status == b"QUOTA_EXCEEDED":
            raise QuotaExceeded(f"{text} is spent", subject=subject, limit=limit)
        raise RateLimited(f"{text} is spent for now", subject=subject, limit=limit, retry_after_ms=max(1, rest[3]))

    async def release(self, tenant: str, reservation_id: str) -> None:
        """Give a reservation back whole: what it was made for did not begin."""
        await self.settle(tenant, [(reservation_id, _NOT_BEGUN)])

    async def settle(self, tenant: str, used: Iterable[tuple[str, int]]) -> int:
        """Give back what reservations (id, tokens used) did not use. Returns how many were not settled before."""
        arguments: list[Argument] = [part for pair in used for part in pair]
        return int(await self._run("quota_settle", tenant, *arguments))

    async def _run(self, name: str, tenant: str, *args: Argument) -> Any:
        return await self._retry.call(lambda: self._scripts.run(name, keys.quota(tenant), *args))


def _limits(quotas: Quotas) -> str:
    return f"{quotas.requests_per_minute} {quotas.tokens_per_minute} {quotas.tokens_per_day}"
