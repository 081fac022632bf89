"""The model of tests/protocol does what the real scripts do: random operations on both, then the same in both.

Everything that the model keeps of a shard is read back from the server: jobs, logs, queue, run records, reply streams.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import redis as redis_sync
from redis.exceptions import NoScriptError, ResponseError

from common import keys, records, scripts
from common.chain import GENESIS, next_hash
from common.generation import EventBody, OutputDelta
from common.jobs import ItemKind
from tests.builders_common import make_job
from tests.integration.common.conftest import SHARD
from tests.protocol.model import Config, Protocol
from tests.protocol.mutants import (
    AttachLeavesTheStreamWhereItWas,
    CancelKeepsTheEpoch,
    DetachIgnoresTheAttachId,
    LostClaimIsForgotten,
    NoFence,
    RequeueCountsNoAttempt,
    RequeueKeepsTheEpoch,
    StaleCallAttachesAgain,
    TakeoverLeavesTheJobWithItsOldWorker,
)
from tests.protocol.scripts import ScriptError, Shard
from tests.protocol.state import LIVE, NONE, Budget, Chain, Event, Item, Job, Record, Server

FOREVER = 3_600_000  # ms: leases, graces and deadlines end when a history says so
MAX_ATTEMPTS, MAX_CLAIMS = 2, 4
HISTORIES, STEPS = 40, 30
META = keys.meta(SHARD)
_BODY = records.encode_body(make_job().body)
Step = tuple[Any, Any]  # what the model answered, what the server answered


def hash_of(chain: Chain) -> bytes:
    """One token in each event that has any, so that the tuple and the hash say the same."""
    value = GENESIS
    for one in chain:
        value = next_hash(value, (OutputDelta(0, 0, (one,)),))
    return value


def wid(worker: int) -> str:
    return f"w{worker}".ljust(26, "a")


def gid(gateway: int) -> str:
    return "" if gateway == NONE else f"g{gateway}".ljust(26, "a")


def generation(job_id: int) -> str:
    return f"{SHARD}.{'j' + str(job_id + 2):a<26}"


def number(name: bytes) -> int:
    """The inverse of `wid` and `gid`."""
    return int(name[1:2]) if name else NONE


class Both:
    """A shard of the model and one of the server, on which the same things are done."""

    def __init__(self, make: Callable[[Config], Protocol], server: redis_sync.Redis, rng: random.Random) -> None:
        config = Config(Budget(), max_attempts=MAX_ATTEMPTS, max_claims=MAX_CLAIMS, has_grace=rng.random() < 0.7)
        self.protocol, self.rng, self.server = make(config), rng, server
        self.has_grace = config.has_grace
        self.shard = Shard(Server())
        self.tokens = self.attach_ids = 0
        server.flushall()
        self.script("reap", FOREVER, 9, 9, MAX_ATTEMPTS, MAX_CLAIMS)  # these begin the graces after a start, and say
        self.script("sweep", 99, 9, FOREVER)  # that somebody was here just now, so that no other grace begins
        server.hset(META, mapping={"grace": 0, "sweep_grace": 0})

    def script(self, name: str, *args: Any) -> Any:
        script = scripts.load(name)
        try:
            return self.server.execute_command("EVALSHA", script.sha1, 1, META, *args)
        except NoScriptError:
            return self.server.execute_command("EVAL", script.text, 1, META, *args)

    def step(self) -> None:
        """Do something at random in both, and compare what they answer and what they keep."""
        names = [name for name in dir(self) if name.startswith("do_")]
        name = self.rng.choice([*names, "do_commit", "do_commit", "do_claim"])
        modelled, real = getattr(self, name)()
        assert modelled == real, name
        self.compare(name)

    # -- the same question to both

    def _job(self) -> int:
        return self.rng.randrange(max(1, len(self.shard.jobs)))

    def _new_attach_id(self) -> int:
        self.attach_ids += 1
        return self.attach_ids

    def do_enqueue(self) -> Step:
        job, key, gateway, attach_id = (
            self.rng.randrange(4),
            self.rng.randrange(3),
            self._gateway(),
            self._new_attach_id(),
        )
        job = min(job, len(self.shard.jobs))
        modelled = self.protocol.enqueue(self.shard, job, key, gateway, attach_id)
        reply = self.script(
            "enqueue", generation(job), "acme", "", 1, 1, gid(gateway), FOREVER, FOREVER if self.has_grace else 0,
            FOREVER, 1, 9, 16, 16, f"key{key}", "digest", "", _BODY, 99, 99, 99, FOREVER, FOREVER, attach_id,
            FOREVER, 0, "", "", 99, 99,
        )  # fmt: skip
        return generation(modelled), reply[1].decode()

    def _gateway(self) -> int:
        return self.rng.randrange(2)

    def do_claim(self) -> Step:
        worker, most = self.rng.randrange(2), self.rng.randrange(1, 3)
        call = self.rng.randrange(3)
        jobs = self.protocol.claim(self.shard, worker, call, most)
        reply = self.script("claim", wid(worker), f"call{call}", FOREVER, most, 999, 999, 9999, 0, 9, 0, 0.05)
        return self._claimed(jobs), self._claimed_really(reply[0])

    def _claimed(self, jobs: list[Job]) -> list[tuple[Any, ...]]:
        return sorted((generation(job.id), job.epoch, job.n, hash_of(job.chain), job.progress) for job in jobs)

    def _claimed_really(self, reply: list[list[Any]]) -> list[tuple[Any, ...]]:
        found = [(records.job_from_reply(one), records.claim_head(one)) for one in reply]
        return sorted(
            (job.generation_id, job.epoch, job.sequence, job.chain_hash, head.progress) for job, head in found
        )

    def do_owned(self) -> Step:
        worker = self.rng.randrange(2)
        known = [job for job in self.shard.jobs if self.rng.random() < 0.4]
        jobs = self.protocol.owned(self.shard, worker, known)
        reply = self.script("owned", wid(worker), 99, 99999, *map(generation, known))
        return self._claimed(jobs), self._claimed_really(reply)

    def _event(self, worker: int, job_id: int) -> Event | None:
        """What this worker, or one that is a little behind or ahead, might commit."""
        job = self.shard.jobs.get(job_id)
        if job is None:
            return None
        record = self.shard.records.get((worker, job_id)) or Record(worker, job_id, job.epoch, job.n, False, NONE)
        epoch = max(1, record.epoch - self.rng.choice([0, 0, 0, 0, 0, 1, 2]))
        n = max(0, record.n - self.rng.choice([0, 0, 0, 0, 1, -1]))
        self.tokens += 1
        chain = job.chain if self.rng.random() < 0.2 else (*job.chain, self.tokens)
        kind = self.rng.choice(["", "", "", "", "D", "F"])
        return Event(job_id, epoch, n, chain, len(chain) - len(job.chain), kind, self.rng.random() < 0.6)

    def do_commit(self) -> Step:
        worker = self.rng.randrange(2)
        events, rest = [], []
        for job_id in self.shard.jobs:
            event = self._event(worker, job_id)
            if event is not None and self.rng.random() < 0.7:
                events.append(event)
            elif event is not None:
                rest.append((job_id, event.epoch))
        events.sort(key=lambda event: event.kind != "")
        modelled = self.protocol.commit(self.shard, worker, events, rest)
        ended = [event for event in events if event.kind]
        args: list[Any] = [wid(worker), FOREVER, len(events) - len(ended), len(ended)]
        for event in events:
            deltas = (OutputDelta(0, 0, event.chain[-1:]),) if event.num_tokens else ()
            entry = records.encode_entry(hash_of(event.chain), event.epoch, event.n, EventBody(deltas))
            before = f"{event.epoch}-{event.n_before}".ljust(20)
            after = f"{event.epoch}-{event.n}".ljust(20) + f"0 0 0 {int(event.progress)}".ljust(40)
            args += [generation(event.job), f"{event.epoch}-{event.n}", before, after, entry]
            args += [event.kind, ""] if event.kind else []
        for job_id, epoch in rest:
            args += [generation(job_id), f"{epoch}-"]
        reply = self.script("commit", *args)
        return {generation(job) for job in modelled}, {name.decode() for name in reply[0][::2]}

    def do_release(self) -> Step:
        worker = self.rng.randrange(2)
        held = [(job, record.epoch) for (holder, job), record in self.shard.records.items() if holder == worker]
        held = [(job, epoch - (self.rng.random() < 0.2)) for job, epoch in held]
        self.protocol.release(self.shard, worker, held)
        self.script("release", wid(worker), MAX_CLAIMS, *[part for job, at in held for part in (generation(job), at)])
        return None, None

    def do_attach(self) -> Step:
        job_id, gateway, attach_id = self._job(), self.rng.choice([0, 1, NONE]), self._new_attach_id()
        job = self.shard.jobs.get(job_id)
        chains: list[Chain] = [()] + ([entry.chain for entry in job.events] if job is not None else [])
        after = self.rng.randrange(len(chains) + 1)
        chain = self.rng.choice([None, chains[min(after, len(chains) - 1)], (12345,)])
        again = gateway != NONE and job is not None and self.rng.random() < 0.3
        if again and job is not None:
            attach_id = self.rng.choice([job.attach_id, job.attach_id - 1])
        past = chain if after else None
        found = self.protocol.attach(self.shard, job_id, gateway, after, past, attach_id, again=again)
        packed = b"" if chain is None or not after else hash_of(chain)
        reply = self.script(
            "attach", generation(job_id), "acme", gid(gateway), after, packed, 99, 99999, FOREVER, FOREVER, attach_id,
            int(again),
        )  # fmt: skip
        if found.status != "OK":
            return found.status, "NOT_FOUND" if reply is None else reply[0].decode()
        assert found.job is not None
        events = [records.event_from_fields(fields) for fields in reply[3]]
        described = records.record_from_reply(reply[1])
        return (
            [(entry.epoch, entry.n, entry.kind, hash_of(entry.chain)) for entry in found.events],
            (found.job.state, found.job.epoch, found.job.n, gid(found.job.gateway)),
        ), (
            [(event.epoch, event.sequence, event.kind, event.chain_hash) for event in events],
            (described.state, described.epoch, described.sequence, described.gateway_id),
        )

    def do_detach(self) -> Step:
        """By the call that has the stream, or by one that had it."""
        job = self.shard.jobs.get(self._job())
        if job is None:
            return None, None
        gateway = self.rng.choice([job.gateway, job.gateway, self._gateway()])
        job_id, attach_id = job.id, self.rng.choice([job.attach_id, job.attach_id - 1])
        self.protocol.detach(self.shard, job_id, gateway, attach_id)
        self.script("detach", generation(job_id), gid(gateway), attach_id)
        return None, None

    def do_cancel(self) -> Step:
        if self.rng.random() < 0.7:
            return None, None
        job_id = self._job()
        self.protocol.cancel(self.shard, job_id)
        self.script("cancel", generation(job_id), "acme", 0)
        return None, None

    # -- time passes

    def do_reap(self) -> Step:
        worker = self.rng.randrange(2)
        if not any(holder == worker for holder, _ in self.shard.records):
            return None, None
        self.protocol.reap(self.shard, worker)
        self.server.zadd(keys.worker_leases(SHARD), {wid(worker): 0})
        self.script("reap", FOREVER, 9, 9, MAX_ATTEMPTS, MAX_CLAIMS)
        return None, None

    def do_sweep(self) -> Step:
        """A deadline passes, a gateway's lease or a grace ends, and is swept or, a deadline, left to a claim."""
        job_id, what = self._job(), self.rng.choice(["late", "gateway", "grace"])
        job = self.shard.jobs.get(job_id)
        if job is None or job.state not in LIVE:
            return None, None
        if what == "late":
            self.shard.jobs[job_id] = job._replace(late_at=len(job.log))
            self.server.hset(keys.job(SHARD, generation(job_id)), "dl", 1)
            self.server.zadd(keys.deadlines(SHARD), {generation(job_id): 1 + job_id})
            if self.rng.random() < 0.5:
                return None, None
        for late in sorted(self.shard.jobs):
            if self.shard.jobs[late].state in LIVE and self.shard.jobs[late].late_at != NONE and self._is_due(late):
                self.protocol.sweep_late(self.shard, late)
        job = self.shard.jobs[job_id]
        if what == "gateway" and job.state in LIVE and job.gateway != NONE:
            self.server.zadd(keys.gateway_leases(SHARD), {gid(job.gateway): 0})
            self.protocol.sweep_gateway(self.shard, job.gateway)
        if what == "grace" and job.state in LIVE and job.detached:
            self.server.zadd(keys.detached(SHARD), {generation(job_id): 0})
            self.protocol.sweep_detached(self.shard, job_id)
        self.script("sweep", 99, 9, FOREVER)
        return None, None

    def _is_due(self, job_id: int) -> bool:
        """A claim or a requeue gives a job's deadline a new place in the index: its slack is for the worker alone."""
        score = self.server.zscore(keys.deadlines(SHARD), generation(job_id))
        return score is not None and score < 1e9

    # -- what they keep

    def compare(self, name: str) -> None:
        server = self.shard.close()
        for job in server.jobs:
            self._compare_job(name, job)
        queue = [one.decode() for one in self.server.zrange(f"{{{SHARD}}}:q:1:acme", 0, -1)]
        assert [generation(job_id) for job_id in server.queue] == queue, f"{name}: queue"
        for worker in range(2):
            stored = {
                key.decode(): (value[:20].decode().rstrip(), value.split()[4], value[60:].strip(b"-"))
                for key, value in self.server.hgetall(keys.worker_jobs(SHARD, wid(worker))).items()
            }
            modelled = {
                generation(one.job): (f"{one.epoch}-{one.n}", b"%d" % one.progress, gid(one.gateway).encode())
                for one in server.records
                if one.worker == worker
            }
            assert modelled == stored, f"{name}: run records of worker {worker}"
        for gateway in range(2):
            self._compare_stream(name, gateway, server.streams[gateway])

    def _compare_job(self, name: str, job: Job) -> None:
        key = keys.job(SHARD, generation(job.id))
        fields = ("st", "ep", "n", "es", "w", "gw", "ai", "at", "nc")
        stored = [value or b"0" if field in ("at", "nc") else value or b"" for field, value in
                  zip(fields, self.server.hmget(key, fields), strict=True)]  # fmt: skip
        epochs = "".join(f"{epoch}:{before}," for epoch, before in job.epochs)
        modelled = [
            job.state, job.epoch, job.n, epochs, wid(job.worker) if job.worker != NONE else "", gid(job.gateway),
            job.attach_id, job.attempts, job.claims,
        ]  # fmt: skip
        assert [str(value).encode() for value in modelled] == stored, f"{name}: job {job.id}"
        is_detached = self.server.zscore(keys.detached(SHARD), generation(job.id)) is not None
        assert job.detached == is_detached, f"{name}: grace of job {job.id}"
        log = []
        for entry_id, entry in self.server.xrange(keys.job_log(SHARD, generation(job.id))):
            event = records.event_from_fields([part for pair in entry.items() for part in pair])
            assert entry_id.decode() == f"{event.epoch}-{event.sequence}"
            log.append((event.epoch, event.sequence, event.kind.value, event.chain_hash))
        assert [(one.epoch, one.n, one.kind, hash_of(one.chain)) for one in job.log] == log, f"{name}: log {job.id}"

    def _compare_stream(self, name: str, gateway: int, stream: tuple[Item, ...] | None) -> None:
        key = keys.reply_stream(SHARD, gid(gateway))
        if not self.server.exists(key):
            assert not stream, f"{name}: stream of gateway {gateway}"
            return
        items = [item for _, entry in self.server.xrange(key) for item in records.items_from_entry(entry[b"b"])]
        real = [(one.generation_id, one.epoch, one.sequence, one.kind.value, one.chain_hash) for one in items]
        modelled = [
            (generation(one.job), one.entry.epoch, one.entry.n, one.entry.kind, hash_of(one.entry.chain))
            for one in stream or ()
        ]
        assert modelled == real, f"{name}: stream of gateway {gateway}"
        assert all(item.kind in ItemKind for item in items)


def run(make: Callable[[Config], Protocol], superuser: redis_sync.Redis, histories: int) -> None:
    for seed in range(histories):
        both = Both(make, superuser, random.Random(seed))
        for _ in range(STEPS):
            both.step()


def test_the_model_does_what_the_scripts_do(superuser: redis_sync.Redis) -> None:
    run(Protocol, superuser, HISTORIES)


@pytest.mark.parametrize(
    "make",
    [
        NoFence,
        RequeueKeepsTheEpoch,
        RequeueCountsNoAttempt,
        CancelKeepsTheEpoch,
        LostClaimIsForgotten,
        TakeoverLeavesTheJobWithItsOldWorker,
        AttachLeavesTheStreamWhereItWas,
        DetachIgnoresTheAttachId,
        StaleCallAttachesAgain,
    ],
)
def test_a_model_that_does_something_else_is_found(
    make: Callable[[Config], Protocol], superuser: redis_sync.Redis
) -> None:
    with pytest.raises((AssertionError, KeyError, ValueError, ScriptError, ResponseError)):
        run(make, superuser, HISTORIES)
