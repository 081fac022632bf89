"""The scripts of common/scripts as functions on a shard: each call is one atomic step, as it is on the server.

Only what the protocol's laws rest on is modelled. Time is not: leases, graces and deadlines may end at any moment, so
that nothing here can rest on clocks. Method by method this follows the Lua text of the same name, without these:

- what only chooses which job is next: tenants, classes, sizes, the bell, and the isolation of jobs that ended their
  workers. Here a claim takes the queue's first jobs, a suspect like any other;
- preemption: a release that leaves out what may not give way, and counts no claim;
- dead letters: a failed job stays as it is; nobody lists it, sends it again (a new job without a gateway) or purges it;
- graces, of leases after a pause of the server and of jobs: one that is not over is a lease or grace that ends later;
- what operators see, and their requests that workers drain: here a worker may leave at any moment;
- bounds, usage, memory, confirmations of replicas, and the end of retention.

The state machine in tests/integration/common does the first three on a real server.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tests.protocol.state import (
    LIVE,
    NONE,
    Chain,
    Entry,
    Event,
    Item,
    Job,
    LastClaim,
    Record,
    Server,
)


class ScriptError(Exception):
    """The server refused a command in the middle of a script: what was written before it stays."""


class Shard:
    """A server's keys, open for writing."""

    def __init__(self, server: Server) -> None:
        self.jobs = {job.id: job for job in server.jobs}
        self.queue = list(server.queue)
        self.records = {(record.worker, record.job): record for record in server.records}
        self.last_claims = {last.worker: last for last in server.last_claims}
        self.streams = list(server.streams)

    def close(self) -> Server:
        return Server(
            tuple(self.jobs.values()),
            tuple(self.queue),
            tuple(sorted(self.records.values())),
            tuple(sorted(self.last_claims.values())),
            tuple(self.streams),
        )

    def store(self, job: Job) -> None:
        self.jobs[job.id] = job._replace(progress=False)

    def send(self, gateway: int, item: Item) -> None:
        """XADD NOMKSTREAM to a reply stream."""
        if gateway != NONE:
            stream = self.streams[gateway]
            if stream is not None:
                self.streams[gateway] = (*stream, item)


class Found(NamedTuple):
    """Reply of attach."""

    status: str  # OK, OUT_OF_RANGE, RESULT_LOST, SUPERSEDED, NOT_FOUND
    job: Job | None = None  # as loaded
    events: tuple[Entry, ...] = ()


class Scripts:
    """The scripts. Mutants override single methods."""

    def __init__(self, *, max_attempts: int, max_claims: int, has_grace: bool) -> None:
        self.max_attempts = max_attempts
        self.max_claims = max_claims
        self.has_grace = has_grace
        self.tracks_attach = False

    # -- lib_jobs

    def load(self, shard: Shard, job_id: int) -> Job | None:
        job = shard.jobs.get(job_id)
        if job is not None and job.state == "R":
            record = shard.records.get((job.worker, job_id))
            if record is not None:
                return job._replace(n=record.n, progress=record.progress)
        return job

    def append(self, job: Job, entry: Entry) -> Job:
        """XADD with an id of our own: the stream refuses any that is not above its last."""
        if job.log and (entry.epoch, entry.n) <= (job.log[-1].epoch, job.log[-1].n):
            raise ScriptError(f"XADD {entry.epoch}-{entry.n} after {job.log[-1].epoch}-{job.log[-1].n}")
        return job._replace(log=(*job.log, entry))

    def run_record(self, job: Job) -> Record:
        return Record(job.worker, job.id, job.epoch, job.n, job.progress, job.gateway)

    def take_from_worker(self, shard: Shard, job: Job) -> None:
        shard.records.pop((job.worker, job.id), None)

    def settle(self, shard: Shard, job: Job, state: str) -> None:
        shard.store(job._replace(state=state, worker=NONE, detached=False))

    def end_epoch(self, job: Job) -> int:
        """The epoch in which a job is ended from outside."""
        return job.epoch + 1

    def finish(self, shard: Shard, job: Job, state: str) -> None:
        """Ends a live job from outside: cancel (C), expire (E), give up (F)."""
        if job.state == "Q":
            shard.queue.remove(job.id)
        else:
            self.take_from_worker(shard, job)
        epoch = self.end_epoch(job)
        entry = Entry(epoch, job.n + 1, state, job.chain, 0)
        epochs = (*job.epochs, (epoch, job.n))
        job = self.append(job._replace(epoch=epoch, n=job.n + 1, epochs=epochs), entry)
        shard.send(job.gateway, Item(job.id, entry))
        self.settle(shard, job, state)

    def requeue_epoch(self, job: Job) -> int:
        """The epoch of a job that goes back to its queue: above its last holder's, who is fenced off."""
        return job.epoch + 1

    def requeue(self, shard: Shard, job: Job, *, counts: bool) -> None:
        attempts = 0 if job.progress else job.attempts + counts
        if (counts and attempts >= self.max_attempts) or job.claims >= self.max_claims:
            self.finish(shard, job._replace(attempts=attempts), "F")
            return
        self.take_from_worker(shard, job)
        job = job._replace(state="Q", epoch=self.requeue_epoch(job), attempts=attempts, worker=NONE)
        shard.store(job)
        shard.queue.append(job.id)
        shard.queue.sort(key=lambda job_id: (shard.jobs[job_id].claims == 0, job_id))  # before all that never ran
        shard.send(job.gateway, Item(job.id, Entry(job.epoch, job.n, "Q", job.chain, 0)))

    def begin_grace(self, shard: Shard, job: Job) -> None:
        """Nobody listens any more: the job's own grace begins, or it ends at once."""
        job = job._replace(gateway=NONE)
        if not self.has_grace:
            self.finish(shard, job, "C")
            return
        shard.store(job._replace(detached=True, n=shard.jobs[job.id].n))
        if job.state == "R":
            shard.records[job.worker, job.id] = self.run_record(job)

    # -- scripts of gateways

    def known_key(self, shard: Shard, key: int) -> int:
        """The job that an idempotency key has made, or -1."""
        return next((job.id for job in shard.jobs.values() if job.key == key), NONE)

    def enqueue(self, shard: Shard, job_id: int, key: int, gateway: int, attach_id: int) -> int:
        """Return the job's id: an older one if the key is known."""
        if job_id in shard.jobs:
            return job_id  # our own earlier try, whose reply was lost
        known = self.known_key(shard, key)
        if known != NONE:
            return known
        if shard.streams[gateway] is None:
            shard.streams[gateway] = ()
        shard.store(Job(job_id, key, gateway=gateway, attach_id=attach_id))
        shard.queue.append(job_id)
        return job_id

    def hash_differs(self, entry: Entry, chain: Chain) -> bool:
        return entry.chain != chain

    def attach(
        self,
        shard: Shard,
        job_id: int,
        gateway: int,
        after: int,
        chain: Chain | None,
        attach_id: int,
        *,
        again: bool = False,
    ) -> Found:
        """Read a job's log after an event; `gateway` -1 reads only. `chain` None: the caller has no hash.

        `again`: only if no other call has attached since this one did.
        """
        job = self.load(shard, job_id)
        if job is None:
            return Found("NOT_FOUND")
        if again and job.state in LIVE and not self.may_attach_again(job, attach_id):
            return Found("SUPERSEDED")
        if after > job.n:
            return Found("OUT_OF_RANGE" if chain is None else "RESULT_LOST")
        if after > 0:
            epoch = [epoch for epoch, before in job.epochs if before < after][-1:]
            at = next((entry for entry in job.log if [entry.epoch] == epoch and entry.n == after), None)
            if at is None or (chain is not None and self.hash_differs(at, chain)):
                return Found("RESULT_LOST")
        found = Found("OK", job, job.events[after:])
        if gateway == NONE:
            return found
        if shard.streams[gateway] is None:
            shard.streams[gateway] = ()
        if job.state in LIVE:
            self.reroute(shard, job, gateway, attach_id)
        return found._replace(job=self.load(shard, job_id))

    def may_attach_again(self, job: Job, attach_id: int) -> bool:
        return job.attach_id == attach_id

    def reroute(self, shard: Shard, job: Job, gateway: int, attach_id: int) -> None:
        """Send the further events of a live job to another gateway, and tell the one that had it."""
        if job.gateway != gateway:
            shard.send(job.gateway, Item(job.id, Entry(job.epoch, job.n, "S", job.chain, 0)))
            if job.state == "R":
                shard.records[job.worker, job.id] = self.run_record(job._replace(gateway=gateway))
        stored = shard.jobs[job.id]
        if self.tracks_attach and job.gateway != gateway:
            stored = stored._replace(attached_at=job.n)
        shard.store(stored._replace(gateway=gateway, attach_id=attach_id, detached=False))

    def detach(self, shard: Shard, job_id: int, gateway: int, attach_id: int) -> None:
        job = self.load(shard, job_id)
        if job is not None and job.state in LIVE and job.gateway == gateway and self.has_stream(job, attach_id):
            self.begin_grace(shard, job)

    def has_stream(self, job: Job, attach_id: int) -> bool:
        """Whether no other call has attached since the one that lets go."""
        return job.attach_id == attach_id

    def cancel(self, shard: Shard, job_id: int) -> None:
        job = self.load(shard, job_id)
        if job is not None and job.state in LIVE:
            self.finish(shard, job, "C")

    # -- scripts of workers

    def refuses_late(self, job: Job) -> bool:
        return job.late_at != NONE

    def claim_epoch(self, job: Job) -> int:
        return job.epoch + 1

    def claim(self, shard: Shard, worker: int, call: int, max_jobs: int) -> list[Job]:
        last = shard.last_claims.get(worker)
        if last is not None and self.is_repeat(last, call):
            claimed = [self.load(shard, job_id) for job_id in last.jobs]
            return [job for job in claimed if job is not None and job.state == "R" and job.worker == worker]
        taken: list[Job] = []
        for job_id in tuple(shard.queue):
            if len(taken) == max_jobs:
                break
            job = shard.jobs[job_id]
            if self.refuses_late(job):
                self.finish(shard, job, "E")
            else:
                taken.append(self._take(shard, job, worker))
        shard.last_claims[worker] = LastClaim(worker, call, tuple(job.id for job in taken))
        return taken

    def is_repeat(self, last: LastClaim, call: int) -> bool:
        return last.call == call

    def _take(self, shard: Shard, job: Job, worker: int) -> Job:
        epoch = self.claim_epoch(job)
        marker = Entry(epoch, job.n, "T", job.chain, 0)
        epochs = (*job.epochs, (epoch, job.n))
        job = job._replace(state="R", epoch=epoch, epochs=epochs, claims=job.claims + 1, worker=worker)
        job = self.append(job, marker)
        shard.queue.remove(job.id)
        shard.store(job)
        shard.records[worker, job.id] = self.run_record(job)
        shard.send(job.gateway, Item(job.id, marker))
        return job

    def owned(self, shard: Shard, worker: int, known: Iterable[int]) -> list[Job]:
        unknown = [job_id for holder, job_id in shard.records if holder == worker and job_id not in known]
        return [job for job_id in unknown if (job := self.load(shard, job_id)) is not None]

    def fence(self, record: Record | None, event: Event) -> bool:
        """Whether the log stands where this worker believes that it does."""
        return record is not None and (record.epoch, record.n) == (event.epoch, event.n_before)

    def is_done(self, record: Record | None, event: Event) -> bool:
        """Whether this is a repeat of the job's last event."""
        return record is not None and (record.epoch, record.n) == (event.epoch, event.n)

    def commit(
        self, shard: Shard, worker: int, events: Sequence[Event], rest: Iterable[tuple[int, int]]
    ) -> frozenset[int]:
        """Return the jobs that the worker has lost."""
        lost = set()
        records = {event.job: shard.records.get((worker, event.job)) for event in events}
        for event in events:
            record = records[event.job]
            if self.fence(record, event):
                self.write(shard, worker, event, record.gateway if record is not None else NONE)
            elif event.kind == "":
                if not self.is_done(record, event):
                    lost.add(event.job)
            else:
                job = shard.jobs.get(event.job)
                if job is None or (job.state, job.epoch, job.n) != (event.kind, event.epoch, event.n):
                    lost.add(event.job)
        return frozenset(lost) | self.lost(shard, worker, rest)

    def write(self, shard: Shard, worker: int, event: Event, gateway: int) -> None:
        """Append an event, without looking at anything."""
        stored = shard.jobs[event.job]
        entry = Entry(event.epoch, event.n, event.kind, event.chain, event.num_tokens)
        stored = self.append(stored, entry)
        if event.kind == "":
            shard.store(stored)
            shard.records[worker, event.job] = Record(worker, event.job, event.epoch, event.n, event.progress, gateway)
        else:
            stored = stored._replace(epoch=event.epoch, n=event.n)
            self.take_from_worker(shard, stored)
            self.settle(shard, stored, event.kind)
        shard.send(gateway, Item(event.job, entry))

    def lost(self, shard: Shard, worker: int, held: Iterable[tuple[int, int]]) -> frozenset[int]:
        """Those of the held (job, epoch) that are not this worker's any more; all that a heartbeat does here."""
        records = shard.records
        return frozenset(
            job for job, epoch in held if (worker, job) not in records or records[worker, job].epoch != epoch
        )

    def release(self, shard: Shard, worker: int, held: Iterable[tuple[int, int]]) -> None:
        for job_id, epoch in held:
            job = self.load(shard, job_id)
            if job is not None and job.state == "R" and job.worker == worker and job.epoch == epoch:
                self.requeue(shard, job, counts=False)

    # -- upkeep

    def reap(self, shard: Shard, worker: int) -> None:
        """The worker's lease has ended, whether it is alive or not."""
        for holder, job_id in tuple(shard.records):
            if holder == worker:
                job = self.load(shard, job_id)
                if job is None or job.state != "R" or job.worker != worker:
                    del shard.records[holder, job_id]
                else:
                    self.requeue(shard, job, counts=True)
        shard.last_claims.pop(worker, None)

    def sweep_late(self, shard: Shard, job_id: int) -> None:
        job = self.load(shard, job_id)
        assert job is not None
        self.finish(shard, job, "E")

    def sweep_gateway(self, shard: Shard, gateway: int) -> None:
        """A gateway's lease has ended: the grace of its jobs begins, and its stream is gone."""
        for job_id in tuple(shard.jobs):
            job = self.load(shard, job_id)
            if job is not None and job.state in LIVE and job.gateway == gateway:
                self.begin_grace(shard, job)
        shard.streams[gateway] = None

    def sweep_detached(self, shard: Shard, job_id: int) -> None:
        job = self.load(shard, job_id)
        assert job is not None
        self.finish(shard, job, "C")
