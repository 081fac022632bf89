"""The state machine of the protocol tests: operations as rules, over real scripts, each as its role's user.

Two workers and two gateways, which crash and return as new incarnations while their ghosts go on; clients that are
delivered to, detach and resume; requests and replies that get lost, or come late; time that passes because leases,
deadlines and graces are moved.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from common import keys
from common.errors import BackendUnavailable, GenerationNotFound, QueueFull, ResultLost
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import ClaimedJob, CommitResult, ItemKind, JobState, LogEvent, LostReason, NewEvent, Swept, WorkerInfo
from common.scripts import Script, ScriptRunner
from tests.builders_common import make_event, make_job
from tests.integration.common import invariants
from tests.integration.common.conftest import SHARD
from tests.integration.common.invariants import Seen
from tests.integration.common.parties import NO_RETRY, QUEUE, Gateway, Parts, Worker

MAX_JOBS = 10
TENANTS = ("a", "b:c")
SLOTS = st.integers(0, 1)
T = TypeVar("T")


class ProtocolMachine(RuleBasedStateMachine):
    """Rules are the operations; after each, all invariants are checked."""

    parts: Parts
    overrides: dict[str, Script]

    def __init__(self) -> None:
        super().__init__()
        self.parts.superuser.flushall()
        self.parts.worker_redis.late = []
        self.num_ids = 0
        self.writer_of_token: dict[int, str] = {}
        self.tenant_of: dict[str, str] = {}
        self.seen: dict[str, Seen] = {}
        self.attach_ids: dict[str, list[str]] = {}  # of the calls that had the stream, the latest last
        self.cancelled: set[str] = set()
        self.workers = [self._new_worker(), self._new_worker()]
        self.ghosts: list[Worker] = []
        self.gateways = [self._new_gateway(), self._new_gateway()]
        self._run(self.gateways[0].queue.reap(SHARD))  # these begin the graces after a start...
        self._run(self.gateways[0].queue.sweep(SHARD))
        self._no_grace()

    # -- helpers

    def _new_id(self) -> str:
        """Ids by number, not at random: a history must run again in the same way."""
        self.num_ids += 1
        return base64.b32encode(hashlib.sha256(b"%d" % self.num_ids).digest()).decode().lower()[:26]

    def _run(self, operation: Awaitable[T]) -> T:
        async def wait() -> T:
            return await operation

        return self.parts.runner.run(wait())

    def _no_grace(self) -> None:  # ... which are over now
        self.parts.superuser.hset(keys.meta(SHARD), mapping={"grace": 0, "sweep_grace": 0})

    def _new_worker(self) -> Worker:
        redis = self.parts.worker_redis
        runner = ScriptRunner(redis, self.overrides)
        return Worker(JobClaims(redis, SHARD, self._new_id(), QUEUE, retry=NO_RETRY, scripts=runner))

    def _new_gateway(self) -> Gateway:
        redis = self.parts.gateway_redis
        runner = ScriptRunner(redis, self.overrides)
        return Gateway(JobQueue(redis, self._new_id(), QUEUE, retry=NO_RETRY, scripts=runner))

    def _maybe_lost(self, is_lost: bool, operation: Callable[[], Awaitable[T]]) -> T:
        """Run an operation; if its reply is to be lost, run it a second time, as its caller would."""
        redis = (self.parts.gateway_redis, self.parts.worker_redis)
        if is_lost:
            for client in redis:
                client.num_to_lose = 1
            with contextlib.suppress(BackendUnavailable):
                self._run(operation())
            for client in redis:
                client.num_to_lose = 0
        return self._run(operation())

    def _state(self, generation_id: str) -> str:
        value = self.parts.superuser.hget(keys.job(SHARD, generation_id), "st")
        assert value is not None
        return str(value.decode())

    def _pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.tenant_of)), label="generation")

    def _new_token(self, worker: Worker) -> int:
        token = len(self.writer_of_token)
        self.writer_of_token[token] = worker.claims.worker_id
        return token

    def _take_up(self, worker: Worker, jobs: list[ClaimedJob]) -> None:
        for job in jobs:
            assert job.remaining_ms > 0, "I10: an expired job was handed out"
            assert self._state(job.generation_id) == "R"
            assert [event.sequence for event in job.events] == list(range(1, job.sequence + 1))
            deltas = [delta for event in job.events if event.body for delta in event.body.deltas]
            worker.tokens[job.generation_id] = sum(len(delta.token_ids) for delta in deltas)

    def _learn(self, worker: Worker, result: CommitResult) -> None:
        for generation_id, reason in result.lost.items():
            assert reason not in (LostReason.DIVERGED, LostReason.GONE), "nothing was lost by the server"
            worker.tokens.pop(generation_id, None)

    # -- gateways and clients

    @precondition(lambda self: len(self.tenant_of) < MAX_JOBS)
    @rule(
        slot=SLOTS,
        tenant=st.sampled_from(TENANTS),
        priority=st.integers(0, 2),
        grace_ms=st.sampled_from([0, 5000]),
        kv_tokens=st.sampled_from([16, 16, 64]),
        key=st.sampled_from([None, None, "k1", "k2"]),
        is_lost=st.booleans(),
    )
    def enqueue(
        self, slot: int, tenant: str, priority: int, grace_ms: int, kv_tokens: int, key: str | None, is_lost: bool
    ) -> None:
        gateway = self.gateways[slot]
        job = make_job(
            tenant,
            priority=priority,
            disconnect_grace_ms=grace_ms,
            kv_tokens=kv_tokens,
            idempotency_key=key,
            generation_id=f"{SHARD}.{self._new_id()}",
            request_digest=b"same\x00body",
        )
        attach_id = self._new_id()
        try:
            accepted = self._maybe_lost(is_lost, lambda: gateway.queue.enqueue(SHARD, job, attach_id=attach_id))
        except QueueFull:
            return
        if accepted.duplicate:
            assert self.tenant_of[accepted.generation_id] == tenant, "I12: another tenant's idempotency key"
        else:
            assert accepted.generation_id == job.generation_id
            self.tenant_of[accepted.generation_id] = tenant
            self.seen[accepted.generation_id] = Seen()
            self.attach_ids[accepted.generation_id] = [attach_id]
            gateway.clients.add(accepted.generation_id)

    def _deliver(self, generation_id: str, event: LogEvent) -> bool:
        """Give the client an event if it is the next; False if one before it is missing."""
        seen = self.seen[generation_id]
        if event.sequence == seen.sequence + 1 and event.body is not None:
            seen.events.append(event)
        return event.sequence <= seen.sequence

    def _catch_up(self, gateway: Gateway, generation_id: str) -> None:
        seen = self.seen[generation_id]
        attachment = self._run(
            gateway.queue.read_log(generation_id, self.tenant_of[generation_id], seen.sequence, seen.chain_hash)
        )
        for event in attachment.events:
            assert self._deliver(generation_id, event)
        if attachment.record.gateway_id not in ("", gateway.queue.gateway_id):
            gateway.clients.discard(generation_id)

    @rule(slot=SLOTS, is_trimmed=st.booleans(), reconciles=st.booleans())
    def deliver(self, slot: int, is_trimmed: bool, reconciles: bool) -> None:
        """A gateway reads its reply stream and hands on; from the log where something is missing."""
        gateway = self.gateways[slot]
        if is_trimmed:
            self.parts.superuser.xtrim(keys.reply_stream(SHARD, gateway.queue.gateway_id), maxlen=0)
        items, moved = self._run(gateway.queue.replies({SHARD: gateway.cursor}, 1))
        gateway.cursor = moved.get(SHARD, gateway.cursor)
        for item in items:
            if item.generation_id not in gateway.clients:
                continue
            if item.kind is ItemKind.SUPERSEDED:
                gateway.clients.discard(item.generation_id)
            elif item.kind in (ItemKind.STARTED, ItemKind.REQUEUED):
                continue
            else:
                event = LogEvent(item.chain_hash, item.epoch, item.sequence, item.body, item.kind, item.reason)
                if not self._deliver(item.generation_id, event):
                    self._catch_up(gateway, item.generation_id)

        if reconciles:
            for generation_id in sorted(gateway.clients):
                self._catch_up(gateway, generation_id)

    @precondition(lambda self: self.tenant_of)
    @rule(data=st.data(), slot=SLOTS, is_lost=st.booleans(), overtakes=st.booleans())
    def attach(self, data: st.DataObject, slot: int, is_lost: bool, overtakes: bool) -> None:
        """A client resumes at some gateway, from what it has; perhaps before its earlier call was let go of."""
        generation_id = self._pick(data)
        seen, gateway = self.seen[generation_id], self.gateways[slot]
        tenant, attach_id = self.tenant_of[generation_id], self._new_id()
        where = (generation_id, tenant, seen.sequence, seen.chain_hash)
        attachment = self._maybe_lost(is_lost, lambda: gateway.queue.attach(*where, attach_id=attach_id))
        self.attach_ids[generation_id].append(attach_id)
        for event in attachment.events:
            assert self._deliver(generation_id, event)
        for other in self.gateways:
            other.clients.discard(generation_id)
        if not seen.is_ended:
            gateway.clients.add(generation_id)
        if overtakes:
            self.detach_at(gateway, generation_id, self.attach_ids[generation_id][-2])

    @precondition(lambda self: self.tenant_of)
    @rule(data=st.data(), slot=SLOTS)
    def meddle(self, data: st.DataObject, slot: int) -> None:
        """Another tenant, a forged past, a gateway without the stream: nothing is told, nothing changes."""
        generation_id = self._pick(data)
        queue, seen = self.gateways[slot].queue, self.seen[generation_id]
        stranger = TENANTS[1 - TENANTS.index(self.tenant_of[generation_id])]
        for operation in (queue.attach, queue.read_log, queue.get, queue.cancel):
            with pytest.raises(GenerationNotFound):  # I12
                self._run(operation(generation_id, stranger))
        other = self.gateways[1 - slot]
        if generation_id not in other.clients:
            self.detach_at(other, generation_id, self.attach_ids[generation_id][-1])
        if seen.sequence:
            with pytest.raises(ResultLost):
                self._run(queue.attach(generation_id, self.tenant_of[generation_id], seen.sequence, b"\xff" * 8))

    @precondition(lambda self: self.tenant_of)
    @rule(data=st.data(), slot=SLOTS, is_lost=st.booleans())
    def detach(self, data: st.DataObject, slot: int, is_lost: bool) -> None:
        generation_id = self._pick(data)
        self.detach_at(self.gateways[slot], generation_id, self.attach_ids[generation_id][-1], is_lost)

    def detach_at(self, gateway: Gateway, generation_id: str, attach_id: str, is_lost: bool = False) -> None:
        before = self.parts.superuser.hmget(keys.job(SHARD, generation_id), "st", "gw")
        self._maybe_lost(is_lost, lambda: gateway.queue.detach(generation_id, attach_id=attach_id))
        is_latest = attach_id == self.attach_ids[generation_id][-1]
        if is_latest:
            gateway.clients.discard(generation_id)
        if not is_latest or before[1].decode() != gateway.queue.gateway_id:
            assert self.parts.superuser.hmget(keys.job(SHARD, generation_id), "st", "gw") == before, "not its stream"

    @precondition(lambda self: self.tenant_of)
    @rule(data=st.data(), slot=SLOTS, is_lost=st.booleans())
    def cancel(self, data: st.DataObject, slot: int, is_lost: bool) -> None:
        generation_id = self._pick(data)
        was_final = JobState(self._state(generation_id)).is_final
        queue, tenant = self.gateways[slot].queue, self.tenant_of[generation_id]
        record = self._maybe_lost(is_lost, lambda: queue.cancel(generation_id, tenant))
        assert record.state.is_final
        if not was_final:
            assert record.state is JobState.CANCELLED
            self.cancelled.add(generation_id)

    @rule(slot=SLOTS)
    def gateway_crashes(self, slot: int) -> None:
        """Its clients lose their streams; when its lease has ended, a sweep begins the grace of its jobs."""
        dead = self.gateways[slot]
        self.gateways[slot] = self._new_gateway()
        self.parts.superuser.zadd(keys.gateway_leases(SHARD), {dead.queue.gateway_id: 0}, xx=True)
        self._run(self.gateways[slot].queue.sweep(SHARD))

    @rule(slot=SLOTS, forgets_scripts=st.booleans())
    def all_beat(self, slot: int, forgets_scripts: bool) -> None:
        """A second passes in which nothing happens: nobody who is alive may lose anything."""
        if forgets_scripts:
            self.parts.superuser.script_flush()
        gateway, worker = self.gateways[slot], self.workers[slot]
        self._run(gateway.queue.heartbeat({SHARD: gateway.cursor}))
        result = self._run(worker.claims.heartbeat(WorkerInfo(model="tiny")))
        self._learn(worker, result)
        if result.has_unknown_jobs:
            self._take_up(worker, self._run(worker.claims.owned()))
        assert self._run(gateway.queue.reap(SHARD)) == Swept(), "a living worker lost its jobs"

    # -- workers

    @rule(
        slot=SLOTS,
        max_jobs=st.integers(1, 3),
        free=st.sampled_from([16, 40, 1000]),
        total=st.sampled_from([40, 1000]),
        is_lost=st.booleans(),
        rings=st.booleans(),
    )
    def claim(self, slot: int, max_jobs: int, free: int, total: int, is_lost: bool, rings: bool) -> None:
        worker = self.workers[slot]
        if rings:
            self.parts.superuser.lpop(keys.bell(SHARD))  # as an idle worker does
        jobs = self._maybe_lost(is_lost, lambda: worker.claims.claim(max_jobs, min(free, total), total))
        self._take_up(worker, jobs)

    def _events(self, data: st.DataObject, worker: Worker) -> list[NewEvent]:
        events = []
        for generation_id in sorted(worker.tokens):
            what = data.draw(st.sampled_from(["nothing", "token", "tokens", "empty", "end", "fail"]), label="step")
            if what == "nothing":
                continue
            first = worker.tokens[generation_id]
            number = {"token": 1, "tokens": 3, "end": 1}.get(what, 0)
            token_ids = tuple(self._new_token(worker) for _ in range(number))
            terminal = {"end": JobState.DONE, "fail": JobState.FAILED}.get(what)
            events.append(make_event(generation_id, token_ids, first=first, terminal=terminal, progress=number > 0))
            worker.tokens[generation_id] += number
        return events

    def _commit(self, worker: Worker, data: st.DataObject, fault: str) -> CommitResult | None:
        """Commit some events. `fault`: what is lost, a "request", a "reply" or nothing; None is an unknown outcome."""
        events = self._events(data, worker)
        for event in events:
            if event.terminal is not None:
                worker.tokens.pop(event.generation_id)
        redis = self.parts.worker_redis
        redis.num_to_lose, redis.num_requests_to_lose = int(fault == "reply"), int(fault == "request")
        try:
            return self._run(worker.claims.commit(events))
        except BackendUnavailable:
            return None  # the library keeps the events; other things may happen before they are sent again
        finally:
            redis.num_to_lose = redis.num_requests_to_lose = 0

    def _get_work(self, worker: Worker) -> None:
        """Most histories would do nothing much if a worker were not often given something to compute."""
        if not worker.tokens:
            if len(self.tenant_of) < MAX_JOBS:
                self.enqueue(0, TENANTS[0], 1, 5000, 16, None, False)
            self._take_up(worker, self._run(worker.claims.claim(3, 1000, 1000)))

    @rule(
        data=st.data(),
        slot=SLOTS,
        faults=st.lists(st.sampled_from(["", "reply", "request"]), min_size=1, max_size=3),
        is_repeated=st.booleans(),
    )
    def work(self, data: st.DataObject, slot: int, faults: list[str], is_repeated: bool) -> None:
        """Some steps, each with its commit."""
        worker = self.workers[slot]
        self._get_work(worker)
        for fault in faults:
            named = set(worker.tokens)
            result = self._commit(worker, data, fault)
            if result is None and is_repeated:
                result = self._run(worker.claims.commit())
            if result is None:
                continue
            for generation_id in named & self.cancelled:
                assert generation_id in result.lost, "I10: a worker was not told of a cancelled job"
            self._learn(worker, result)
            if result.has_unknown_jobs:
                self._take_up(worker, self._run(worker.claims.owned()))
            assert worker.claims.held == set(worker.tokens)

    @precondition(lambda self: self.parts.worker_redis.late)
    @rule()
    def late_request_arrives(self) -> None:
        """A commit or claim that its worker gave up, on a connection that was only slow."""
        self._run(self.parts.worker_redis.deliver_late())

    @rule(data=st.data(), slot=SLOTS)
    def late_commit_meets_a_new_claim(self, data: st.DataObject, slot: int) -> None:
        """The same worker loses a job and takes it again; then its commit from the time before arrives."""
        worker = self.workers[slot]
        self._get_work(worker)
        self._commit(worker, data, "request")
        self.leases_end_and_are_reaped(slot, False)
        self._take_up(worker, self._run(worker.claims.claim(3, 1000, 1000)))
        while self.parts.worker_redis.late:
            self._run(self.parts.worker_redis.deliver_late())

    @precondition(lambda self: self.ghosts)
    @rule(data=st.data())
    def ghost_commits(self, data: st.DataObject) -> None:
        """A worker that was thought dead goes on with what it had."""
        ghost = data.draw(st.sampled_from(self.ghosts), label="ghost")
        result = self._commit(ghost, data, "")
        assert result is not None
        self._learn(ghost, result)

    @precondition(lambda self: any(worker.tokens for worker in self.workers))
    @rule(data=st.data(), slot=SLOTS, is_lost=st.booleans())
    def release(self, data: st.DataObject, slot: int, is_lost: bool) -> None:
        worker = self.workers[slot]
        if worker.tokens:
            released = data.draw(st.sets(st.sampled_from(sorted(worker.tokens))), label="released")
            self._maybe_lost(is_lost, lambda: worker.claims.release(sorted(released)))
            for generation_id in released:
                worker.tokens.pop(generation_id)

    @rule(slot=SLOTS, becomes_ghost=st.booleans())
    def worker_crashes(self, slot: int, becomes_ghost: bool) -> None:
        if becomes_ghost:
            self.ghosts.append(self.workers[slot])
        self.workers[slot] = self._new_worker()

    # -- time

    @rule(slot=SLOTS, of_ghosts=st.booleans())
    def leases_end_and_are_reaped(self, slot: int, of_ghosts: bool) -> None:
        """Takeover, also from a worker that is alive and still computes."""
        alive = {worker.claims.worker_id for worker in self.workers}
        leases = self.parts.superuser.zrange(keys.worker_leases(SHARD), 0, -1)
        ended = [wid for wid in leases if (wid.decode() not in alive) == of_ghosts]
        for wid in ended:
            self.parts.superuser.zadd(keys.worker_leases(SHARD), {wid: 0})
        self._no_grace()
        held = sum(self.parts.superuser.hlen(keys.worker_jobs(SHARD, wid.decode())) for wid in ended)
        taken = 0
        while (swept := self._run(self.gateways[slot].queue.reap(SHARD))) != Swept():
            taken += swept.requeued + swept.dead_lettered
        assert taken == held

    def _expire(self, generation_id: str) -> None:
        if not JobState(self._state(generation_id)).is_final:
            self.parts.superuser.hset(keys.job(SHARD, generation_id), "dl", 1)
            self.parts.superuser.zadd(keys.deadlines(SHARD), {generation_id: 1})

    @precondition(lambda self: self.tenant_of)
    @rule(data=st.data())
    def deadline_passes(self, data: st.DataObject) -> None:
        generation_id = self._pick(data)
        self._expire(generation_id)
        self._run(self.gateways[0].queue.sweep(SHARD))
        assert JobState(self._state(generation_id)).is_final

    @precondition(lambda self: len(self.tenant_of) < MAX_JOBS)
    @rule(slot=SLOTS)
    def claim_meets_an_expired_job(self, slot: int) -> None:
        self.enqueue(slot, TENANTS[0], 0, 5000, 16, None, False)
        for generation_id in list(self.tenant_of)[-1:]:
            self._expire(generation_id)
        worker = self.workers[slot]
        self._take_up(worker, self._run(worker.claims.claim(MAX_JOBS, 1000, 1000)))

    @rule(slot=SLOTS)
    def graces_end_and_are_swept(self, slot: int) -> None:
        detached = self.parts.superuser.zrange(keys.detached(SHARD), 0, -1)
        for name in detached:
            self.parts.superuser.zadd(keys.detached(SHARD), {name: 0})
        self._run(self.workers[slot].claims.sweep())
        for name in detached:
            assert JobState(self._state(name.decode())).is_final

    # -- checks

    @precondition(lambda self: len(self.tenant_of) >= 3)
    @rule()
    def everything_ends(self) -> None:
        """I9: given one live worker, every accepted job ends, and every client can learn how."""
        worker, queue = self.workers[0], self.gateways[0].queue
        for wid in self.parts.superuser.zrange(keys.worker_leases(SHARD), 0, -1):
            if wid.decode() != worker.claims.worker_id:
                self.parts.superuser.zadd(keys.worker_leases(SHARD), {wid: 0})
        self._no_grace()
        while self._run(queue.reap(SHARD)) != Swept():
            pass
        for _ in range(2 * MAX_JOBS):
            result = self._run(worker.claims.commit())
            self._learn(worker, result)
            if result.has_unknown_jobs:
                self._take_up(worker, self._run(worker.claims.owned()))
            self._take_up(worker, self._run(worker.claims.claim(MAX_JOBS, 10_000, 10_000)))
            ends = [
                make_event(generation_id, (), first=first, terminal=JobState.DONE)
                for generation_id, first in sorted(worker.tokens.items())
            ]
            self._learn(worker, self._run(worker.claims.commit(ends)))
            worker.tokens.clear()
            if all(JobState(self._state(name)).is_final for name in self.tenant_of):
                break
        for generation_id in self.tenant_of:
            assert JobState(self._state(generation_id)).is_final, "I9: an accepted job does not end"
            self._catch_up(self.gateways[0], generation_id)
            assert self.seen[generation_id].is_ended, "I9: a client cannot learn the end"

    @invariant()
    def all_invariants_hold(self) -> None:
        snapshot = invariants.take_snapshot(self.parts.superuser, SHARD)
        invariants.check_all(snapshot, QUEUE, self.seen, self.writer_of_token)
