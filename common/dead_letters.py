"""Dead letters: generations that failed, to be looked at, sent again, or deleted by an operator.

Each call on one letter is one script and bears repetition: a letter is sent again once, and deleted once. A repeated
retry is answered like the first. A repeated purge is not: nothing is left that could tell, so it is NOT_FOUND. Methods
raise the errors of `Retry` besides what they name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

import structlog

from common import keys, records
from common.errors import GenerationNotFound, SealBroken
from common.headroom import Headroom
from common.jobs import GenerationRecord
from common.redis import Redis, Retry, execute
from common.scripts import ScriptRunner, as_list
from common.sealing import PLAIN, Sealer
from common.settings import QueueSettings
from common.wire import Argument

log = structlog.get_logger()

T = TypeVar("T")

MAX_LETTERS: Final = 1000  # of one shard, see scripts/lib_jobs.lua
_PER_CALL: Final = 100  # letters that one script reads: none may hold the server for long
_AT_A_TIME: Final = 16


class Outcome(StrEnum):
    """What became of one letter."""

    RETRIED = "RETRIED"
    PURGED = "PURGED"
    NOT_FOUND = "NOT_FOUND"  # no dead letter (any more)
    QUEUE_FULL = "QUEUE_FULL"
    TENANT_QUEUE_FULL = "TENANT_QUEUE_FULL"
    TENANT_CONCURRENCY = "TENANT_CONCURRENCY"
    UNREADABLE = "UNREADABLE"  # its record does not open here


@dataclass(frozen=True, slots=True)
class LetterResult:
    """What was done with one letter."""

    generation_id: str
    outcome: Outcome
    new_generation_id: str = ""  # that a retry made, now or earlier


@dataclass(frozen=True, slots=True, order=True)
class LetterMark:
    """Where a list of letters was left: the last one that was seen."""

    ended_ms: int
    generation_id: str


class DeadLetters:
    """The dead letters of all shards; they are bounded in number per shard and expire."""

    def __init__(
        self,
        redis: Redis,
        settings: QueueSettings,
        *,
        retry: Retry | None = None,
        scripts: ScriptRunner | None = None,
        headroom: Headroom | None = None,
        sealer: Sealer = PLAIN,
    ) -> None:
        self._redis = redis
        self._sealer = sealer
        self._headroom = headroom
        self._settings = settings
        self._retry = retry or Retry()
        self._scripts = scripts or ScriptRunner(redis)

    async def _run(self, name: str, shard: str, *args: Argument) -> Any:
        return await self._retry.call(lambda: self._scripts.run(name, keys.meta(shard), *args))

    async def newest(
        self, shards: Sequence[str], limit: int, after: LetterMark | None = None
    ) -> tuple[list[GenerationRecord], int]:
        """The newest `limit` letters behind `after`, of all shards together, and how many are stored in all."""
        parts = await asyncio.gather(*(self._newest(shard, limit, after) for shard in shards))
        found = [record for records_of_shard, _ in parts for record in records_of_shard]
        found.sort(key=mark_of, reverse=True)
        return found[:limit], sum(total for _, total in parts)

    async def _newest(self, shard: str, limit: int, after: LetterMark | None) -> tuple[list[GenerationRecord], int]:
        found: list[GenerationRecord] = []
        while True:
            most = min(_PER_CALL, limit - len(found))
            mark = ("", "") if after is None else (after.ended_ms, after.generation_id)
            total, *page = as_list(await self._run("dead_letters", shard, most, *mark))
            found += map(records.record_from_reply, page)
            if len(page) < most or len(found) >= limit:
                return found, total
            after = mark_of(found[-1])

    async def retry(self, generation_ids: Sequence[str]) -> list[LetterResult]:
        """Queue letters again, each as a new generation that nobody listens to; the letter is listed no more.

        One that this process cannot read stays a letter. Raises BackendFull, also while the headroom is short; letters
        before it may have been queued then, and a repeat answers with the same new ones.
        """
        return await _each(generation_ids, self._retry_one)

    async def _retry_one(self, generation_id: str) -> LetterResult:
        settings = self._settings
        if self._headroom is not None:
            self._headroom.check()
        try:
            shard = keys.shard_of(generation_id)
        except GenerationNotFound:
            return LetterResult(generation_id, Outcome.NOT_FOUND)
        new_id = keys.new_generation_id(shard)
        try:
            body, echo = await self._resealed(shard, generation_id, new_id)
        except SealBroken as error:
            log.error("letter.unreadable", generation_id=generation_id, reason=error.reason)
            return LetterResult(generation_id, Outcome.UNREADABLE)
        reply = await self._run(
            "retry",
            shard,
            generation_id,
            new_id,
            settings.max_lifetime_ms,
            settings.max_queued,
            settings.max_queued_per_tenant,
            settings.max_live_per_tenant,
            body,
            echo,
        )
        if reply is None:
            return LetterResult(generation_id, Outcome.NOT_FOUND)
        status, *rest = as_list(reply)
        if status == b"OK":
            return LetterResult(generation_id, Outcome.RETRIED, rest[0].decode())
        return LetterResult(generation_id, Outcome(status.decode()))

    async def _resealed(self, shard: str, old_id: str, new_id: str) -> tuple[bytes, bytes]:
        """Body and echo of a letter for the generation that a retry makes, sealed if records are. Raises SealBroken."""
        key = keys.job(shard, old_id)
        tenant, body, echo = await self._retry.call(lambda: execute(self._redis, "HMGET", key, "t", "b", "eo"))
        if tenant is None:
            return b"", b""  # the script says that there is no such letter
        old, new = (self._sealer.of(tenant.decode(), name) for name in (old_id, new_id))
        return records.reseal_body(body, old, new), records.seal_echo(records.open_echo(echo, old), new)

    async def purge(self, generation_ids: Sequence[str]) -> list[LetterResult]:
        """Delete letters with all that is stored of them.

        After PURGED and NOT_FOUND alike a letter is not there: `Retry` repeats a call whose reply was lost, and finds
        NOT_FOUND what that call has deleted.
        """
        return await _each(generation_ids, self._purge_one)

    async def _purge_one(self, generation_id: str) -> LetterResult:
        try:
            shard = keys.shard_of(generation_id)
        except GenerationNotFound:
            return LetterResult(generation_id, Outcome.NOT_FOUND)
        is_purged = await self._run("purge", shard, generation_id)
        return LetterResult(generation_id, Outcome.PURGED if is_purged else Outcome.NOT_FOUND)


def mark_of(record: GenerationRecord) -> LetterMark:
    """The place of a letter in the list of all."""
    return LetterMark(record.ended_ms, record.generation_id)


async def _each(generation_ids: Sequence[str], act: Callable[[str], Awaitable[T]]) -> list[T]:
    """Act on each id once, some at a time; results in order."""
    ids = list(dict.fromkeys(generation_ids))
    results: list[T] = []
    for start in range(0, len(ids), _AT_A_TIME):
        results += await asyncio.gather(*map(act, ids[start : start + _AT_A_TIME]))
    return results
