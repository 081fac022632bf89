"""How one item's request is run: as a job of its own, which no connection holds up and another gateway finds again."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

from google.protobuf.message import Message

from common import errors
from common.api_keys import ApiKeys
from common.batches import Owner
from common.grants import Scope
from common.job_queue import JobQueue
from common.tenants import Tenants
from gateway.identity.caller import Caller

_LOOK_AGAIN_S: Final = 5.0
_MAX_OWNERS: Final = 10_000
_FIRST_PAUSE_S: Final = 0.1
_MAX_PAUSE_S: Final = 30.0
_FORGET_AFTER_S: Final = 60.0
_FORGOTTEN_AT_ONCE: Final = 16
_MAX_FORGOTTEN: Final = 2048  # in one round, a second


class RunningItem(Protocol):
    """A job whose end somebody waits for."""

    generation_id: str


class Runner(Protocol):
    """Runs requests of one kind. Methods raise ServingError."""

    async def submit(self, request: Any, caller: Caller) -> RunningItem:
        """Queue a request, or find the job that its idempotency key made before; listen to it."""
        ...

    async def response(self, running: Any, caller: Caller) -> Message:
        """Wait for the end and return what a call would. Raises GenerationEndedError."""
        ...

    def let_go(self, running: Any) -> None:
        """Listen no longer; the job goes on."""
        ...

    async def find(self, request: Any, tenant: str) -> str | None:
        """Return the id of the job that the request's idempotency key made, if it is still kept."""
        ...


class Owners:
    """From a batch's owner to a caller with the rights of now; those of a token or certificate are as at its making."""

    def __init__(self, api_keys: ApiKeys, tenants: Tenants, clock: Callable[[], float] = time.monotonic) -> None:
        self._api_keys = api_keys
        self._tenants = tenants
        self._clock = clock
        self._known: dict[Owner, tuple[float, Caller | errors.PermissionDenied]] = {}

    async def caller(self, owner: Owner) -> Caller:
        """Raises PermissionDenied for an API key that has ended or may make no batches any more."""
        known = self._known.get(owner)
        if known is None or self._clock() >= known[0]:
            found = await self._look(owner)
            if len(self._known) >= _MAX_OWNERS:
                self._known.clear()
            known = self._known[owner] = (self._clock() + _LOOK_AGAIN_S, found)
        if isinstance(known[1], errors.PermissionDenied):
            raise known[1]
        return known[1]

    async def _look(self, owner: Owner) -> Caller | errors.PermissionDenied:
        grants, quota_id = owner.grants, owner.quota_id
        if owner.method == "api_key":
            try:
                key = await self._api_keys.current(owner.key_id)
            except (errors.ApiKeyNotFound, errors.Unauthenticated):
                return errors.PermissionDenied("the batch's API key was revoked or has expired", reason="API_KEY_ENDED")
            grants, quota_id = key.grants, key.quota_id
        if Scope.BATCH.value not in grants.scopes:
            return errors.PermissionDenied("this key may not call this method", metadata={"scope": Scope.BATCH.value})
        policy = await self._tenants.policy(owner.tenant)
        return Caller(owner.tenant, owner.key_id, grants, policy, owner.method, quota_id)


def is_for_now(error: errors.ServingError) -> bool:
    """Whether a request was refused for want of room, or of the store, and not for what it is."""
    return isinstance(error, errors.ResourceExhausted | errors.Unavailable)


def pause_s(attempt: int, error: errors.ServingError, rng: random.Random) -> float:
    """How long to wait before try number `attempt`, from 0: doubling, with full jitter, behind what the error says."""
    bound = min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(attempt, 16))
    return min(_MAX_PAUSE_S, (error.retry_after_ms or 0) / 1000) + rng.uniform(0, bound)


class Bells:
    """Wakes those in this process who wait for news of a batch."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = {}

    def ring(self, batch_id: str) -> None:
        for event in self._waiting.get(batch_id, ()):
            event.set()

    @contextmanager
    def listening(self, batch_id: str) -> Iterator[asyncio.Event]:
        """An event that is set by news, for as long as the context lasts."""
        event = asyncio.Event()
        self._waiting.setdefault(batch_id, set()).add(event)
        try:
            yield event
        finally:
            waiting = self._waiting[batch_id]
            waiting.discard(event)
            if not waiting:
                del self._waiting[batch_id]


class Forgetting:
    """Erases jobs whose results are stored, a while later: until then a feeder that was cut off finds them again.

    Jobs that a process leaves behind expire as all do.
    """

    def __init__(self, queue: JobQueue, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue = queue
        self._clock = clock
        self._later: deque[tuple[float, str, str]] = deque()

    def add(self, tenant: str, generation_id: str) -> None:
        self._later.append((self._clock() + _FORGET_AFTER_S, tenant, generation_id))

    async def round(self) -> None:
        """Erase what is due. Raises the errors of `Retry`; what was not erased then is due again."""
        for _ in range(_MAX_FORGOTTEN // _FORGOTTEN_AT_ONCE):
            due: list[tuple[float, str, str]] = []
            while self._later and self._later[0][0] <= self._clock() and len(due) < _FORGOTTEN_AT_ONCE:
                due.append(self._later.popleft())
            if not due:
                return
            try:
                await asyncio.gather(*(erase_job(self._queue, tenant, job) for _, tenant, job in due))
            except errors.ServingError:
                self._later.extendleft(reversed(due))
                raise


async def erase_job(queue: JobQueue, tenant: str, generation_id: str) -> None:
    """End a job if it runs, and erase it; nothing happens if there is none."""
    try:
        await queue.delete(generation_id, tenant)
    except errors.GenerationNotFound:
        return
