"""Batches as they are stored: made, fed by one gateway at a time, filled with results, read, and erased.

A batch lies under its tenant's hash tag, so that another tenant's cannot be named, and one script sees all that decides
about a new one. What it says of its items is sealed as generations are (`common/sealing.py`). Every method is one
script call, or a few, that bear repetition, and raises the errors of `Retry` besides what it names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import msgspec

from common import keys
from common.errors import (
    BatchNotFound,
    IdempotencyKeyReused,
    ResourceExhausted,
    SealBroken,
    SequenceOutOfRange,
    Unavailable,
)
from common.grants import NO_GRANTS_GIVEN, Grants
from common.headroom import Headroom
from common.redis import Redis, Retry, execute
from common.replication import ReplicaAcks
from common.scripts import ScriptRunner, as_list
from common.sealing import PLAIN, GenerationSealer, Sealer
from common.wire import Argument

MAKING_MS: Final = 600_000  # how long items are kept between two calls of `append`
_SOON_MS: Final = 10_000  # after which a batch is looked at whose maker may have died
MAX_APPENDED: Final = 256  # items of one call: a script's arguments must fit its stack
MAX_PAGE_BYTES: Final = 1 << 20
_INDEX_BYTES: Final = 4


class BatchState(StrEnum):
    """Where a batch is. The last two are final."""

    RUNNING = "R"
    CANCELLING = "X"
    DONE = "D"
    CANCELLED = "C"

    @property
    def is_final(self) -> bool:
        return self in (BatchState.DONE, BatchState.CANCELLED)


class Outcome(StrEnum):
    """What kind of result an item has: the field of the batch by which it is counted."""

    SUCCEEDED = "ok"
    FAILED = "er"
    CANCELLED = "ca"


class Owner(msgspec.Struct, frozen=True, array_like=True):
    """Whose batch it is: what a gateway must know to call on its maker's behalf, as of its making."""

    tenant: str
    key_id: str
    method: str = "api_key"
    quota_id: str = ""
    grants: Grants = NO_GRANTS_GIVEN


_OWNER_ENCODER: Final = msgspec.msgpack.Encoder()
_OWNER_DECODER: Final = msgspec.msgpack.Decoder(Owner)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """A batch. Times are server time in ms since the epoch, 0 where it has not happened."""

    batch_id: str
    owner: Owner
    state: BatchState
    is_deleted: bool  # it is erased once its jobs have ended; callers do not see it any more
    total: int
    num_succeeded: int
    num_failed: int
    num_cancelled: int
    num_running: int  # in the queue, as its feeder said last
    fed_below: int  # no item from here on has ever been fed
    epoch: int
    created_ms: int
    deadline_ms: int
    ended_ms: int
    retention_ms: int
    priority: int
    display_name: str
    salt: str

    @property
    def num_results(self) -> int:
        return self.num_succeeded + self.num_failed + self.num_cancelled

    @property
    def expires_ms(self) -> int:
        """When its results are erased, or while it runs: when items without a result are given up."""
        return self.ended_ms + self.retention_ms if self.ended_ms else self.deadline_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """What is stored of a batch besides its items."""

    batch_id: str
    owner: Owner
    total: int
    priority: int  # the queue's class
    display_name: str = ""
    idempotency_key: str | None = None
    request_digest: bytes = b""  # what must be equal when the key is used again
    max_batches: int
    retention_ms: int
    lifetime_ms: int


@dataclass(frozen=True, slots=True)
class Result:
    """What came of an item, as bytes that only the caller of this module understands."""

    item_index: int
    outcome: Outcome
    body: bytes


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to feed a batch. `done` has a bit for each item with a result, as SETBIT counts them; when taken."""

    batch: BatchRecord
    remaining_ms: int  # until the batch's deadline
    done: bytes = b""


class LeaseLost(Exception):
    """Another gateway feeds the batch now, or nobody needs to any more."""


class Batches:
    """The batches of one deployment, as one gateway sees them."""

    def __init__(
        self,
        redis: Redis,
        gateway_id: str,
        *,
        retry: Retry | None = None,
        scripts: ScriptRunner | None = None,
        headroom: Headroom | None = None,
        acks: ReplicaAcks | None = None,
        sealer: Sealer = PLAIN,
    ) -> None:
        """With `headroom`, no batch is made while memory is short; with `acks`, one counts once replicas have it."""
        self._redis = redis
        self._gateway_id = keys.check_incarnation(gateway_id)
        self._retry = retry or Retry()
        self._scripts = scripts or ScriptRunner(redis)
        self._headroom = headroom
        self._acks = acks if acks is not None and acks.is_demanded else None
        self._sealer = sealer

    async def _run(self, name: str, key: str, *args: Argument) -> Any:
        return await self._retry.call(lambda: self._scripts.run(name, key, *args))

    # -- making ---------------------------------------------------------------------------------------------------

    async def earlier(self, tenant: str, idempotency_key: str) -> tuple[str, bytes] | None:
        """The batch that an earlier call with this key made, and the digest of that call, if it is still kept."""
        name = keys.batch_idempotency(tenant, keys.idempotency_digest(tenant, idempotency_key))
        found = await self._retry.call(lambda: execute(self._redis, "GET", name))
        if found is None:
            return None
        batch_id, _, digest = found.partition(b" ")
        return batch_id.decode(), digest

    async def append(self, tenant: str, batch_id: str, first: int, items: Sequence[bytes]) -> None:
        """Keep items of a batch that is being made, for MAKING_MS; `first` is the index of the first of them.

        Raises Unavailable if those before are gone, and BackendFull.
        """
        assert 0 < len(items) <= MAX_APPENDED
        if self._headroom is not None:
            self._headroom.check()
        sealer = self._sealer.of(tenant, batch_id)
        sealed = [sealer.seal(item, _item_label(first + offset)) for offset, item in enumerate(items)]
        count = await self._run("batch_append", keys.batch(tenant, batch_id), MAKING_MS, first, *sealed)
        if count < 0:
            raise _items_lost()

    async def discard(self, tenant: str, batch_id: str) -> None:
        """Forget the items of a batch that is not made after all."""
        await self._retry.call(lambda: execute(self._redis, "DEL", keys.batch(tenant, batch_id) + ":items"))

    async def start(self, new: NewBatch) -> tuple[BatchRecord, bool]:
        """Make a batch of the items that were appended; return it, and whether an earlier call had made it.

        Raises IdempotencyKeyReused, ResourceExhausted at the tenant's most batches, and ReplicationUnconfirmed.
        """
        tenant, batch_id = new.owner.tenant, new.batch_id
        sealer = self._sealer.of(tenant, batch_id)
        key = keys.batch(tenant, batch_id)
        # First, so that a batch that exists is always on this list; whoever finds one there that does not takes it off.
        await self._mark(tenant, batch_id, _SOON_MS)
        arguments: tuple[Argument, ...] = (
            new.total,
            "" if new.idempotency_key is None else keys.idempotency_digest(tenant, new.idempotency_key),
            new.request_digest,
            new.max_batches,
            new.retention_ms,
            new.lifetime_ms,
            _OWNER_ENCODER.encode(new.owner),
            new.priority,
            sealer.seal(new.display_name.encode(), _NAME_LABEL),
            keys.random_id(),
        )
        acks = self._acks
        if acks is None:
            reply = await self._run("batch_start", key, *arguments)
        else:
            reply = await self._retry.call(lambda: acks.run(self._scripts, "batch_start", key, *arguments))
        status, *rest = as_list(reply)
        if status == b"LOST":
            raise _items_lost()
        if status == b"REUSED":
            raise IdempotencyKeyReused
        if status == b"TOO_MANY":
            raise ResourceExhausted(
                f"the tenant has {new.max_batches} batches, as many as it may; delete one, or wait until one expires",
                reason="TOO_MANY_BATCHES",
                metadata={"limit": str(new.max_batches)},
            )
        is_duplicate = status == b"DUPLICATE"
        await self._mark(tenant, batch_id, None if is_duplicate else 0)
        return await self.get(tenant, rest[0].decode() if is_duplicate else batch_id), is_duplicate

    # -- reading --------------------------------------------------------------------------------------------------

    async def get(self, tenant: str, batch_id: str) -> BatchRecord:
        """Raises BatchNotFound."""
        record, _, _ = await self._page(tenant, batch_id, "results", 0, 0)
        return record

    async def all_of(self, tenant: str) -> list[BatchRecord]:
        """A tenant's batches, the latest first."""
        ids = await self._retry.call(lambda: execute(self._redis, "ZREVRANGE", keys.batches(tenant), 0, -1))
        found = await asyncio.gather(*(self._get_if_any(tenant, batch_id.decode()) for batch_id in ids))
        return sorted(
            (batch for batch in found if batch is not None),
            key=lambda batch: (batch.created_ms, batch.batch_id),
            reverse=True,
        )

    async def _get_if_any(self, tenant: str, batch_id: str) -> BatchRecord | None:
        try:
            return await self.get(tenant, batch_id)
        except BatchNotFound:
            return None

    async def results(
        self, tenant: str, batch_id: str, after_index: int, max_results: int = 256
    ) -> tuple[BatchRecord, list[tuple[int, bytes]]]:
        """The batch, and item index and body of the next results after an index: as many as there are and fit.

        Raises BatchNotFound, SequenceOutOfRange and SealBroken.
        """
        record, count, entries = await self._page(tenant, batch_id, "results", after_index, max_results)
        if after_index > count:
            raise SequenceOutOfRange(after_index, count, field="after_index")
        sealer = self._sealer.of(tenant, batch_id)
        return record, [_open_result(entry, sealer) for entry in entries]

    async def items(self, tenant: str, batch_id: str, first: int, max_items: int) -> list[bytes | SealBroken]:
        """Items from an index on, as many as fit; one that does not open stands there as its error.

        For the feeder of the batch. Raises LeaseLost where it has none, or they end too soon.
        """
        try:
            _, _, entries = await self._page(tenant, batch_id, "items", first, max_items, deleted=True)
        except BatchNotFound:
            entries = []
        if not entries:
            raise LeaseLost
        sealer = self._sealer.of(tenant, batch_id)
        return [_open_item(entry, first + offset, sealer) for offset, entry in enumerate(entries)]

    async def _page(
        self, tenant: str, batch_id: str, what: str, first: int, most: int, *, deleted: bool = False
    ) -> tuple[BatchRecord, int, list[bytes]]:
        reply = await self._run("batch_page", keys.batch(tenant, batch_id), what, first, most, MAX_PAGE_BYTES)
        if reply is None:
            raise BatchNotFound
        fields, count, entries = as_list(reply)
        record = self._record(tenant, batch_id, fields)
        if record.is_deleted and not deleted:
            raise BatchNotFound
        return record, count, entries

    def _record(self, tenant: str, batch_id: str, fields: Sequence[bytes | None]) -> BatchRecord:
        state, deleted, *rest = fields
        total, succeeded, failed, cancelled, running, fed, epoch, created, deadline, ended, retention, priority = (
            int(value or 0) for value in rest[:12]
        )
        owner, name, salt = (value or b"" for value in rest[12:])
        assert state is not None
        return BatchRecord(
            batch_id=batch_id,
            owner=_OWNER_DECODER.decode(owner),
            state=BatchState(state.decode()),
            is_deleted=deleted is not None,
            total=total,
            num_succeeded=succeeded,
            num_failed=failed,
            num_cancelled=cancelled,
            num_running=running,
            fed_below=fed,
            epoch=epoch,
            created_ms=created,
            deadline_ms=deadline,
            ended_ms=ended,
            retention_ms=retention,
            priority=priority,
            display_name=_open_name(name, self._sealer.of(tenant, batch_id)),
            salt=salt.decode(),
        )

    # -- feeding --------------------------------------------------------------------------------------------------

    async def due(self, max_batches: int = 64) -> list[tuple[str, str]]:
        """Tenants and ids of batches that may have no feeder."""
        found = await self._run("batch_due", keys.ACTIVE_BATCHES, max_batches)
        pairs = (member.decode().partition(" ") for member in as_list(found))
        return [(tenant, batch_id) for batch_id, _, tenant in pairs]

    async def _mark(self, tenant: str, batch_id: str, due_ms: int | None) -> None:
        """Note when somebody is to look at a batch; None: never more."""
        due = "" if due_ms is None else due_ms
        await self._run("batch_due", keys.ACTIVE_BATCHES, 0, f"{batch_id} {tenant}", due)

    async def take(self, tenant: str, batch_id: str, lease_ms: int) -> Lease | None:
        """Take the lease on a batch; None if another gateway has it, or there is nothing to feed."""
        # A gateway that feeds it looks after its place on the list; one that is being made needs nobody yet.
        reply = as_list(
            await self._run("batch_lease", keys.batch(tenant, batch_id), self._gateway_id, 0, lease_ms, 0, 0)
        )
        if reply[0] == b"HELD":
            await self._mark(tenant, batch_id, lease_ms)
            return None
        if reply[0] == b"ENDED":
            # It may be just about to be made: it is looked at once more, and then found or gone for good.
            is_made = await self._retry.call(
                lambda: execute(self._redis, "EXISTS", keys.batch(tenant, batch_id) + ":items")
            )
            await self._mark(tenant, batch_id, lease_ms if is_made else None)
            return None
        await self._mark(tenant, batch_id, lease_ms)
        return Lease(self._record(tenant, batch_id, reply[2]), int(reply[1]), reply[3])

    async def renew(self, batch: BatchRecord, lease_ms: int, *, num_running: int, fed_below: int) -> Lease:
        """Keep the lease for so long from now; 0 gives it up. Raises LeaseLost.

        `fed_below`: no item from there on is fed before the next call.
        """
        tenant = batch.owner.tenant
        key = keys.batch(tenant, batch.batch_id)
        reply = as_list(
            await self._run("batch_lease", key, self._gateway_id, batch.epoch, lease_ms, num_running, fed_below)
        )
        if reply[0] != b"OK":
            raise LeaseLost
        await self._mark(tenant, batch.batch_id, lease_ms)
        return Lease(self._record(tenant, batch.batch_id, reply[2]), int(reply[1]))

    async def finish(self, batch: BatchRecord, results: Iterable[Result]) -> BatchState:
        """Append results of items that have none yet; return the state of the batch then. Raises LeaseLost."""
        tenant, batch_id = batch.owner.tenant, batch.batch_id
        sealer = self._sealer.of(tenant, batch_id)
        arguments: list[Argument] = [batch.epoch]
        for result in results:
            entry = result.item_index.to_bytes(_INDEX_BYTES, "little")
            entry += sealer.seal(result.body, _result_label(result.item_index))
            arguments += (result.item_index, result.outcome.value, entry)
        status, *rest = as_list(await self._run("batch_result", keys.batch(tenant, batch_id), *arguments))
        if status != b"OK":
            raise LeaseLost
        state = BatchState(rest[1].decode())
        if state.is_final:
            await self._mark(tenant, batch_id, None)
        return state

    # -- ends -----------------------------------------------------------------------------------------------------

    async def cancel(self, tenant: str, batch_id: str) -> BatchRecord:
        """Begin to end a batch; one that has ended stays as it is. Raises BatchNotFound."""
        fields = await self._run("batch_cancel", keys.batch(tenant, batch_id))
        record = None if fields is None else self._record(tenant, batch_id, as_list(fields))
        if record is None or record.is_deleted:
            raise BatchNotFound
        return record

    async def delete(self, tenant: str, batch_id: str) -> None:
        """Erase a batch; one that runs ends first, and is not seen any more from now on. Raises BatchNotFound."""
        if await self._run("batch_delete", keys.batch(tenant, batch_id), 0) is None:
            raise BatchNotFound

    async def erase(self, batch: BatchRecord) -> None:
        """Erase a batch that was deleted, now that its jobs have ended."""
        await self._run("batch_delete", keys.batch(batch.owner.tenant, batch.batch_id), 1)
        await self._mark(batch.owner.tenant, batch.batch_id, None)


def has_bit(bits: bytes, index: int) -> bool:
    """Whether a bit is set, as the server counts them: the first is the highest of the first byte."""
    return index // 8 < len(bits) and bool(bits[index // 8] >> (7 - index % 8) & 1)


_NAME_LABEL: Final = b"batch name"


def _item_label(index: int) -> bytes:
    return b"batch item %d" % index


def _result_label(item_index: int) -> bytes:
    return b"batch result %d" % item_index


def _open_name(record: bytes, sealer: GenerationSealer) -> str:
    """What cannot be opened is left out: a batch is no less for it, and must be fed, listed and erased."""
    try:
        return sealer.open(record, _NAME_LABEL).decode() if record else ""
    except SealBroken:
        return ""


def _open_item(entry: bytes, index: int, sealer: GenerationSealer) -> bytes | SealBroken:
    try:
        return sealer.open(entry, _item_label(index))
    except SealBroken as error:
        return error


def _open_result(entry: bytes, sealer: GenerationSealer) -> tuple[int, bytes]:
    item_index = int.from_bytes(entry[:_INDEX_BYTES], "little")
    return item_index, sealer.open(entry[_INDEX_BYTES:], _result_label(item_index))


def _items_lost() -> Unavailable:
    return Unavailable("the items were lost before the batch was made; make it again", reason="BATCH_LOST")
