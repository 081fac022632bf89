"""The gateway's side of the queue: enqueue, attach, cancel, the reply streams, and the upkeep that every gateway does.

Every method is one script call and bears repetition; all go through `Retry`, so all may raise BackendUnavailable,
BackendFull and BackendRefused besides what they name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from common import keys, records
from common.errors import (
    DeadlineExceeded,
    GenerationNotFound,
    IdempotencyKeyReused,
    QueueFull,
    ResultLost,
    SequenceOutOfRange,
    Superseded,
)
from common.headroom import Headroom
from common.jobs import (
    Attachment,
    Enqueued,
    GenerationRecord,
    JobState,
    LiveWorker,
    NewJob,
    QueueShape,
    ReplyItem,
    Settlement,
    Swept,
)
from common.redis import Redis, Retry, execute
from common.replication import ReplicaAcks
from common.scripts import ScriptRunner, as_list
from common.sealing import PLAIN, Sealer
from common.settings import QueueSettings
from common.upkeep import Upkeep
from common.wire import Argument

START_CURSOR: Final = b"0-0"
_ENTRIES_PER_READ: Final = 64
_RETRY_AFTER_MS: Final = 1000
_NO_CAP: Final = 1 << 40
_MAX_RUNNING_LOOKS: Final = 2000
_DRAIN_KEPT_S: Final = 86_400  # a worker that cannot reach the server for so long has been reaped
_REFUSALS: Final[Mapping[bytes, str]] = {
    b"QUEUE_FULL": "the model's queue is full",
    b"TENANT_QUEUE_FULL": "the tenant's queue for this model is full",
    b"TENANT_CONCURRENCY": "the tenant has too many generations of this model in flight",
    b"KEY_QUEUE_FULL": "the key's queue for this model is full",
    b"KEY_CONCURRENCY": "the key has too many generations of this model in flight",
}


class JobQueue:
    """One gateway incarnation's view of all shards.

    `gateway_id` is `keys.random_id()` of this process. Blocking reads go over `blocking_redis`, so that a pool which is
    busy waiting never delays an enqueue; its socket timeout bounds `block_ms` (see `common.redis.block_ms`). With
    `headroom`, which somebody else keeps up to date, new jobs are refused while memory is short; with `acks`, they
    count once replicas have them. `sealer` encrypts what is stored; what `replies` returns is as stored (see
    `records.open_item`).
    """

    def __init__(
        self,
        redis: Redis,
        gateway_id: str,
        settings: QueueSettings,
        *,
        retry: Retry | None = None,
        scripts: ScriptRunner | None = None,
        blocking_redis: Redis | None = None,
        headroom: Headroom | None = None,
        acks: ReplicaAcks | None = None,
        sealer: Sealer = PLAIN,
    ) -> None:
        self._redis = redis
        self._blocking_redis = blocking_redis or redis
        self._gateway_id = keys.check_incarnation(gateway_id)
        self._settings = settings
        self._retry = retry or Retry()
        self._scripts = scripts or ScriptRunner(redis)
        self._headroom = headroom
        self._acks = acks if acks is not None and acks.is_demanded else None
        self._sealer = sealer
        self._upkeep = Upkeep(self._run, settings)

    @property
    def gateway_id(self) -> str:
        return self._gateway_id

    @property
    def max_log_bytes(self) -> int:
        """Most bytes of one generation's events."""
        return self._settings.max_log_bytes

    async def _run(self, name: str, shard: str, *args: Argument) -> Any:
        return await self._retry.call(lambda: self._scripts.run(name, keys.meta(shard), *args))

    async def enqueue(self, shard: str, job: NewJob, *, attach_id: str = "") -> Enqueued:
        """Queue a generation; its events come to this gateway, for the call that `attach_id` names (see `detach`).

        The time limit is cut to the longest lifetime, the disconnect grace to its own longest. Raises QueueFull,
        IdempotencyKeyReused, BackendFull while the headroom is short, ReplicationUnconfirmed when replicas are demanded
        and too few have it in time, and DeadlineExceeded for a time limit that has already passed.
        """
        settings = self._settings
        lifetime_ms = settings.default_lifetime_ms if job.time_limit_ms is None else job.time_limit_ms
        if lifetime_ms <= 0:
            raise DeadlineExceeded("the time limit has already passed", reason="DEADLINE_TOO_SHORT")
        if self._headroom is not None:
            self._headroom.check()
        generation_id = job.generation_id or keys.new_generation_id(shard)
        if keys.shard_of(generation_id) != shard:
            raise ValueError("the generation id belongs to another shard")
        sampling = job.body.sampling
        sealer = self._sealer.of(job.tenant, generation_id)
        retention_ms = _least(settings.retention_ms, job.retention_ms or 0)
        arguments: tuple[Argument, ...] = (
            generation_id,
            job.tenant,
            job.key_id,
            job.priority,
            job.weight,
            self._gateway_id,
            min(lifetime_ms, settings.max_lifetime_ms),
            min(job.disconnect_grace_ms, settings.max_disconnect_grace_ms)
            if job.attended
            else settings.max_lifetime_ms,
            retention_ms,
            job.body.num_prompt_tokens,
            sampling.max_tokens * sampling.num_sequences,
            job.kv_tokens,
            job.peak_kv_tokens,
            "" if job.idempotency_key is None else keys.idempotency_digest(job.tenant, job.idempotency_key),
            job.request_digest,
            records.seal_echo(job.echo, sealer),
            records.encode_body(job.body, sealer),
            settings.max_queued,
            _least(settings.max_queued_per_tenant, job.max_queued),
            _least(settings.max_live_per_tenant, job.max_live),
            settings.gateway_lease_ms,
            settings.reply_ttl_ms,
            attach_id,
            max(retention_ms, settings.dead_letter_retention_ms) if job.retention_ms is None else retention_ms,
            int(self._acks is not None),
            "1" if job.has_reservation else "",
            job.quota_id if job.max_queued_of_key or job.max_live_of_key else "",
            job.max_queued_of_key or _NO_CAP,
            job.max_live_of_key or _NO_CAP,
        )
        acks = self._acks
        if acks is None:
            reply = await self._run("enqueue", shard, *arguments)
        else:
            key = keys.meta(shard)
            reply = await self._retry.call(lambda: acks.run(self._scripts, "enqueue", key, *arguments))
        status, *rest = as_list(reply)
        if status in _REFUSALS:
            raise QueueFull(_REFUSALS[status], reason=status.decode(), retry_after_ms=_RETRY_AFTER_MS)
        if status == b"REUSED":
            raise IdempotencyKeyReused
        stored_id, state, place, wait_ms = rest
        known_ms = records.known_ms(wait_ms)
        return Enqueued(stored_id.decode(), status == b"DUPLICATE", place, JobState(state.decode()), known_ms)

    async def lookup_idempotency(
        self, shards: Iterable[str], tenant: str, idempotency_key: str, request_digest: bytes
    ) -> str | None:
        """The generation that an earlier request with this key made in any of the shards (all revisions of a model).

        Raises IdempotencyKeyReused when its digest differs.
        """
        digest = keys.idempotency_digest(tenant, idempotency_key)
        names = [keys.idempotency(shard, digest) for shard in shards]
        for value in await asyncio.gather(*map(self._read, names)):
            if value is not None:
                generation_id, _, stored_digest = value.partition(b" ")
                if stored_digest != request_digest:
                    raise IdempotencyKeyReused
                return generation_id.decode()
        return None

    async def find_by_key(self, shards: Iterable[str], tenant: str, idempotency_key: str) -> str | None:
        """The generation that this key made in any of the shards, whatever its request was."""
        digest = keys.idempotency_digest(tenant, idempotency_key)
        found = await asyncio.gather(*(self._read(keys.idempotency(shard, digest)) for shard in shards))
        return next((value.partition(b" ")[0].decode() for value in found if value is not None), None)

    async def _read(self, key: str) -> bytes | None:
        value: bytes | None = await self._retry.call(lambda: execute(self._redis, "GET", key))
        return value

    async def attach(
        self,
        generation_id: str,
        tenant: str,
        after_sequence: int = 0,
        after_hash: bytes = b"",
        *,
        attach_id: str = "",
        again: bool = False,
    ) -> Attachment:
        """Send the generation's further events to this gateway and return what its log holds after `after_sequence`.

        `after_hash` is the chain hash of that event, if the caller has it; `attach_id` names the call (see `detach`).
        A gateway that had the stream gets a SUPERSEDED item; a disconnect grace that was running stops. Raises
        GenerationNotFound, SequenceOutOfRange and ResultLost. `again` is for a call that had attached before, and whose
        gateway's lease ended: raises Superseded, and changes nothing, when another has attached since.
        """
        gateway_id = self._gateway_id
        return await self._attach(generation_id, tenant, after_sequence, after_hash, gateway_id, attach_id, again)

    async def read_log(
        self, generation_id: str, tenant: str, after_sequence: int = 0, after_hash: bytes = b""
    ) -> Attachment:
        """As `attach`, but without taking the stream over: for large events, gaps, and the check of silent streams."""
        return await self._attach(generation_id, tenant, after_sequence, after_hash, "", "", False)

    async def _attach(
        self,
        generation_id: str,
        tenant: str,
        after_sequence: int,
        after_hash: bytes,
        gateway_id: str,
        attach_id: str,
        again: bool,
    ) -> Attachment:
        reply = await self._run(
            "attach",
            keys.shard_of(generation_id),
            generation_id,
            tenant,
            gateway_id,
            after_sequence,
            after_hash,
            self._settings.max_attach_events,
            self._settings.max_attach_bytes,
            self._settings.gateway_lease_ms,
            self._settings.reply_ttl_ms,
            attach_id,
            int(again),
        )
        if reply is None:
            raise GenerationNotFound
        status, *rest = as_list(reply)
        if status == b"RESULT_LOST":
            raise ResultLost
        if status == b"SUPERSEDED":
            raise Superseded
        if status == b"OUT_OF_RANGE":
            raise SequenceOutOfRange(after_sequence, rest[0])
        described, more, entries = rest
        record = records.record_from_reply(described)
        opener = self._sealer.of(record.tenant, record.generation_id)
        record = replace(record, echo=records.open_echo(record.echo, opener))
        events = tuple(records.event_from_fields(fields, opener) for fields in entries)
        return Attachment(record, events, more == 1)

    async def detach(self, generation_id: str, *, attach_id: str = "", least_grace_ms: int = 0) -> JobState | None:
        """The client of this gateway's stream is gone: begin the job's own disconnect grace (0: it is cancelled now).

        `attach_id` is what its call gave when it enqueued or attached: nothing happens when another call has attached
        since. `least_grace_ms` holds where the job's own grace is shorter. Returns the state afterwards, None if there
        is no such job.
        """
        shard = keys.shard_of(generation_id)
        state = await self._run("detach", shard, generation_id, self._gateway_id, attach_id, least_grace_ms)
        return None if state is None else JobState(state.decode())

    async def cancel(self, generation_id: str, tenant: str | None) -> GenerationRecord:
        """End a generation; one that has ended stays as it is. `tenant` None is an operator, who may end any.

        Raises GenerationNotFound, for another tenant's generation too.
        """
        shard = keys.shard_of(generation_id)
        reply = await self._run("cancel", shard, generation_id, tenant or "", int(tenant is None))
        if reply is None:
            raise GenerationNotFound
        return records.record_from_reply(as_list(reply))

    async def get(self, generation_id: str, tenant: str | None) -> GenerationRecord:
        """What is stored about a generation; arguments and errors as for `cancel`."""
        shard = keys.shard_of(generation_id)
        reply = await self._run("get", shard, tenant or "", int(tenant is None), 0, generation_id)
        found = as_list(reply)
        if not found:
            raise GenerationNotFound
        record = records.record_from_reply(found[0])
        opener = self._sealer.of(record.tenant, record.generation_id)
        return replace(record, echo=records.open_echo(record.echo, opener))

    async def get_all(self, shard: str, generation_ids: Sequence[str]) -> list[GenerationRecord]:
        """What is stored of generations of any tenants, those that there are; echoes as stored. One script call."""
        return [
            records.record_from_reply(item)
            for item in as_list(await self._run("get", shard, "", 1, 0, *generation_ids))
        ]

    async def delete(self, generation_id: str, tenant: str) -> None:
        """End a generation if it runs, and erase all that is stored of it. Raises GenerationNotFound."""
        if await self._run("delete", keys.shard_of(generation_id), generation_id, tenant) is None:
            raise GenerationNotFound

    async def settlements(self, shard: str, limit: int = 100) -> list[Settlement]:
        """Ended generations whose reservation is to be settled, the oldest first; all gateways see the same ones."""
        key = keys.settlements(shard)
        found = await self._retry.call(lambda: execute(self._redis, "ZRANGE", key, 0, limit - 1))
        return [Settlement.from_member(member) for member in found]

    async def forget_settlements(self, shard: str, settled: Iterable[Settlement]) -> None:
        """Take settled ones off the list."""
        members = [settlement.member for settlement in settled]
        if members:
            await self._retry.call(lambda: execute(self._redis, "ZREM", keys.settlements(shard), *members))

    async def num_queued(self, shard: str) -> int:
        """Jobs of all classes that wait for a worker."""
        lengths = await self._retry.call(lambda: execute(self._redis, "HGETALL", keys.queue_lengths(shard)))
        return sum(map(int, lengths.values()))

    async def shape(self, shard: str, max_tenants: int = 200) -> QueueShape:
        """What waits, by class and by tenant, and for how long; what runs; what failed. Changes nothing.

        At most `max_tenants` tenants are looked at, shared out over the classes that have any: its cost is bounded.
        """
        settings = self._settings
        kept_ms = max(settings.retention_ms, settings.dead_letter_retention_ms)
        return records.shape_from_reply(as_list(await self._run("queue_shape", shard, max_tenants, kept_ms)))

    async def list_running(self, shard: str, limit: int = 100) -> list[GenerationRecord]:
        """Generations that workers have, of all tenants, those first that have run longest; echoes as stored."""
        if limit <= 0:
            return []
        found = as_list(await self._run("running", shard, limit, _MAX_RUNNING_LOOKS))
        return [records.record_from_reply(item) for item in found]

    async def list_inflight(self, shard: str, limit: int = 100) -> list[GenerationRecord]:
        """Queued and running generations of all tenants, those with the nearest deadline first; echoes as stored."""
        if limit <= 0:
            return []
        return [records.record_from_reply(item) for item in as_list(await self._run("get", shard, "", 1, limit))]

    async def replies(self, cursors: Mapping[str, bytes], block_ms: int) -> tuple[list[ReplyItem], Mapping[str, bytes]]:
        """Wait for items in the reply streams of many shards: one command for all.

        `cursors` gives the last entry read of each shard (START_CURSOR at first); returns the items in order of each
        shard, and the cursors that changed. Items may repeat or be missing (a trimmed stream): the log decides.
        """
        shard_of_stream = {keys.reply_stream(shard, self._gateway_id).encode(): shard for shard in cursors}
        command: list[Argument] = ["XREAD", "COUNT", _ENTRIES_PER_READ, "BLOCK", block_ms, "STREAMS"]
        command += [*shard_of_stream, *cursors.values()]
        reply = await self._retry.call(lambda: self._wait_for(command))
        items: list[ReplyItem] = []
        moved: dict[str, bytes] = {}
        for stream, entries in (reply or {}).items():
            for entry_id, (_, packed) in entries:
                items += records.items_from_entry(packed)
                moved[shard_of_stream[stream]] = entry_id
        return items, moved

    async def _wait_for(self, command: Sequence[Argument]) -> Any:
        (reply,) = await self._blocking_redis.execute_together(command)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def heartbeat(self, cursors: Mapping[str, bytes]) -> set[str]:
        """Renew this gateway's lease on each shard and trim what `replies` has read; every second.

        Returns the shards where the lease or the stream had been lost: live streams there must attach again.
        """
        shards = list(cursors)
        calls = (self._beat(shard, self._settings.gateway_lease_ms, cursors[shard]) for shard in shards)
        lapsed = await asyncio.gather(*calls)
        return {shard for shard, was_lost in zip(shards, lapsed, strict=True) if was_lost}

    async def leave(self, shards: Iterable[str]) -> None:
        """Give the leases up: the next sweep begins the grace of every job that is still attached here."""
        await asyncio.gather(*(self._beat(shard, 0, START_CURSOR) for shard in shards))

    async def _beat(self, shard: str, lease_ms: int, cursor: bytes) -> bool:
        reply = await self._run("beat_gateway", shard, self._gateway_id, lease_ms, self._settings.reply_ttl_ms, cursor)
        return bool(reply)

    async def reap(self, shard: str) -> Swept:
        """Requeue the jobs of workers whose lease ended; every second, on every shard."""
        return await self._upkeep.reap(shard)

    async def sweep(self, shard: str) -> Swept:
        """End expired and abandoned jobs; every second, on every shard."""
        return await self._upkeep.sweep(shard)

    async def workers(self, shard: str, limit: int = 1000) -> list[LiveWorker]:
        """The workers of a shard, the most recently seen first."""
        return await self._upkeep.workers(shard, limit)

    async def drain(self, shard: str, worker_id: str, requested_by: str) -> bool:
        """Ask a worker to drain: it learns of it with its next heartbeat. False where the shard has no such worker.

        A repeat changes nothing. `requested_by` is a credential's id, for the worker's log.
        """
        return bool(await self._run("drain", shard, worker_id, requested_by, _DRAIN_KEPT_S))


def _least(own: int, asked: int) -> int:
    """The tighter of the queue's own bound and one that may be absent (0)."""
    return min(own, asked) if asked else own
