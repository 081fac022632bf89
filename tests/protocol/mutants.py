"""The protocol with one guard taken out at a time: each must break a law, or the laws prove nothing.

A mutant overrides one or two methods of the model, and says which law it breaks first, and in which configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from tests.protocol.explorer import LIVENESS
from tests.protocol.model import Config, Protocol
from tests.protocol.scripts import Shard
from tests.protocol.state import (
    FINAL,
    NONE,
    Budget,
    Call,
    Chain,
    Commit,
    Computed,
    Entry,
    Event,
    Held,
    Job,
    LastClaim,
    Record,
    State,
    Worker,
)
from tests.protocol.workers import Step, on_its_way


class NoFence(Protocol):
    drops_spent_messages = False

    def fence(self, record: Record | None, event: Event) -> bool:
        return True


class EpochIsNotCompared(Protocol):
    """The fence looks at the number of the event alone."""

    drops_spent_messages = False

    def fence(self, record: Record | None, event: Event) -> bool:
        return record is not None and record.n == event.n_before


class CheckAndAppendInTwoSteps(Protocol):
    drops_spent_messages = False

    def sends(self, state: State, slot: int, worker: Worker, label: str) -> Iterator[Step]:
        assert worker.pending is not None
        records = {record.job: record for record in state.server.records if record.worker == worker.id}
        if all(self.fence(records.get(event.job), event) for event in worker.pending.events):
            checked = self.put(state, Shard(state.server), slot, worker)
            yield f"{label}: checked", on_its_way(checked, "write", worker.id, worker.pending)
        else:
            yield from super().sends(state, slot, worker, label)

    def arrives(self, shard: Shard, kind: str, args: tuple[object, ...]) -> None:
        if kind != "write":
            super().arrives(shard, kind, args)
            return
        worker, sent = args
        assert isinstance(worker, int)
        assert isinstance(sent, Commit)
        for event in sent.events:
            record = shard.records.get((worker, event.job))
            self.write(shard, worker, event, record.gateway if record is not None else NONE)


class RepeatIsAppendedAgain(Protocol):
    """The server numbers events itself, so that it cannot know a repeat."""

    def fence(self, record: Record | None, event: Event) -> bool:
        return record is not None and record.epoch == event.epoch

    def write(self, shard: Shard, worker: int, event: Event, gateway: int) -> None:
        record = shard.records[worker, event.job]
        super().write(shard, worker, event._replace(n_before=record.n), gateway)


class TakeoverLeavesTheJobWithItsOldWorker(Protocol):
    def take_from_worker(self, shard: Shard, job: Job) -> None:
        pass


class TakeoverBeginsAnew(Protocol):
    """The new worker does not read the log."""

    def adopt(self, worker: Worker, jobs: Iterable[Job]) -> Worker:
        after = super().adopt(worker, jobs)
        return after._replace(held=tuple(held._replace(computed=()) for held in after.held))

    def _event(self, held: Held, tokens: tuple[int, ...], kind: str) -> Event:
        return Event(held.job, held.epoch, held.n, held.computed + tokens, len(tokens), kind, progress=True)


class RequeueKeepsTheEpoch(Protocol):
    def requeue_epoch(self, job: Job) -> int:
        return job.epoch


class CancelKeepsTheEpoch(Protocol):
    def end_epoch(self, job: Job) -> int:
        return job.epoch


class ClaimKeepsTheEpoch(Protocol):
    def claim_epoch(self, job: Job) -> int:
        return max(job.epoch, 1)

    def requeue_epoch(self, job: Job) -> int:
        return job.epoch


class RequeueCountsNoAttempt(Protocol):
    def requeue(self, shard: Shard, job: Job, *, counts: bool) -> None:
        super().requeue(shard, job, counts=False)


class ClaimsAreNotBounded(Protocol):
    def requeue(self, shard: Shard, job: Job, *, counts: bool) -> None:
        super().requeue(shard, job._replace(claims=0), counts=counts)
        if job.id in shard.queue:
            shard.store(shard.jobs[job.id]._replace(claims=job.claims))


class LostClaimIsForgotten(Protocol):
    """A repeated claim gets other jobs, and nobody asks what the server counts as this worker's."""

    def is_repeat(self, last: LastClaim, call: int) -> bool:
        return False

    def owned(self, shard: Shard, worker: int, known: Iterable[int]) -> list[Job]:
        return []


class ClaimHandsOutWhatIsLate(Protocol):
    def refuses_late(self, job: Job) -> bool:
        return False


class BacklogIgnoresTheEpoch(Protocol):
    """What was computed before a job was lost is committed after it was claimed again."""

    def fits_epoch(self, held: Held, computed: Computed) -> bool:
        return True


class EnqueueIgnoresTheKey(Protocol):
    def known_key(self, shard: Shard, key: int) -> int:
        return NONE


class EnqueueWritesAgain(Protocol):
    """The same request, arriving a second time, writes the job once more."""

    drops_spent_messages = False

    def enqueue(self, shard: Shard, job_id: int, key: int, gateway: int, attach_id: int) -> int:
        shard.jobs.pop(job_id, None)
        return super().enqueue(shard, job_id, key, gateway, attach_id)


class AttachLeavesTheStreamWhereItWas(Protocol):
    def reroute(self, shard: Shard, job: Job, gateway: int, attach_id: int) -> None:
        pass


class AttachTrustsAnyPast(Protocol):
    def hash_differs(self, entry: Entry, chain: Chain) -> bool:
        return False


class DetachIgnoresTheAttachId(Protocol):
    def has_stream(self, job: Job, attach_id: int) -> bool:
        return True


class NoHashChain(Protocol):
    """Neither attach nor the gateway compares hashes."""

    def hash_differs(self, entry: Entry, chain: Chain) -> bool:
        return False

    def advance(self, call: Call, entry: Entry) -> Call:
        return call._replace(n=entry.n, chain=call.chain + entry.tokens)


class GatewayWithoutIndexCheck(Protocol):
    """What the reply stream brings is handed on, whatever its number."""

    def judge(self, call: Call, entry: Entry) -> str:
        return "news" if entry.kind in ("T", "Q", "S") else "deliver"

    def advance(self, call: Call, entry: Entry) -> Call:
        return call._replace(n=entry.n, chain=call.chain + entry.tokens)


class GatewayTakesAGapForGranted(Protocol):
    """An event that is not the next is taken as if it were, if only it is new."""

    def judge(self, call: Call, entry: Entry) -> str:
        verdict = super().judge(call, entry)
        return "deliver" if verdict == "read" and entry.kind not in ("T", "Q", "S") else verdict

    def advance(self, call: Call, entry: Entry) -> Call:
        return call._replace(n=entry.n, chain=call.chain + entry.tokens)


class EndComesBeforeTheTokens(Protocol):
    """A terminal item ends the stream, although events before it are missing."""

    def judge(self, call: Call, entry: Entry) -> str:
        return "deliver" if entry.kind in FINAL else super().judge(call, entry)

    def advance(self, call: Call, entry: Entry) -> Call:
        if entry.n > call.n + 1:
            return call
        return super().advance(call, entry)


class NoReconcile(Protocol):
    def must_reconcile(self, call: Call) -> bool:
        return False


class GatewayIgnoresSuperseded(Protocol):
    def is_mine(self, job: Job, call: Call) -> bool:
        return True


class StaleCallAttachesAgain(Protocol):
    """A call whose client has moved on takes the stream back when the later call's gateway loses its lease."""

    def may_attach_again(self, job: Job, attach_id: int) -> bool:
        return True


class ReleaseForgetsTheQueue(Protocol):
    def release(self, shard: Shard, worker: int, held: Iterable[tuple[int, int]]) -> None:
        super().release(shard, worker, held)
        shard.queue.clear()


@dataclass(frozen=True)
class Mutant:
    make: Callable[[Config], Protocol]
    config: Config
    law: str  # that it breaks


MUTANTS: Final[tuple[Mutant, ...]] = (
    Mutant(NoFence, Config(Budget(reaps=1)), "I3"),
    Mutant(EpochIsNotCompared, Config(Budget(reaps=1, lost=1), length=1, num_gateways=1), "no script fails halfway"),
    Mutant(CheckAndAppendInTwoSteps, Config(Budget(reaps=1)), "I3"),
    Mutant(RepeatIsAppendedAgain, Config(Budget(lost=1)), "I2"),
    Mutant(TakeoverLeavesTheJobWithItsOldWorker, Config(Budget(reaps=1)), "I8"),
    Mutant(TakeoverBeginsAnew, Config(Budget(reaps=1)), "I2"),
    Mutant(RequeueKeepsTheEpoch, Config(Budget(reaps=1)), "I3"),
    Mutant(CancelKeepsTheEpoch, Config(Budget(cancels=1)), "I3"),
    Mutant(ClaimKeepsTheEpoch, Config(Budget(reaps=1)), "I3"),
    Mutant(RequeueCountsNoAttempt, Config(Budget(reaps=3), length=1, max_claims=9), "I7"),
    Mutant(ClaimsAreNotBounded, Config(Budget(reaps=2, empties=2), max_claims=1), "I7"),
    Mutant(LostClaimIsForgotten, Config(Budget(lost=1)), LIVENESS),
    Mutant(ClaimHandsOutWhatIsLate, Config(Budget(deadlines=1)), "I10"),
    Mutant(BacklogIgnoresTheEpoch, Config(Budget(lost=1, backlogs=1, reaps=1), num_gateways=1), "I3"),
    Mutant(EnqueueIgnoresTheKey, Config(Budget(lost=1)), "I9"),
    Mutant(EnqueueWritesAgain, Config(Budget(lost=1)), "I8"),
    Mutant(AttachLeavesTheStreamWhereItWas, Config(Budget(drops=1)), "I8 (events)"),
    Mutant(AttachTrustsAnyPast, Config(Budget(failovers=1, drops=1), num_gateways=1), "I5"),
    Mutant(DetachIgnoresTheAttachId, Config(Budget(drops=1)), "I8 (events)"),
    Mutant(NoHashChain, Config(Budget(failovers=1)), "I4"),
    Mutant(GatewayWithoutIndexCheck, Config(Budget(drops=1)), "I4"),
    Mutant(GatewayTakesAGapForGranted, Config(Budget(trims=1)), "I4"),
    Mutant(EndComesBeforeTheTokens, Config(Budget(trims=1)), "I5"),
    Mutant(NoReconcile, Config(Budget(trims=1)), LIVENESS),
    Mutant(GatewayIgnoresSuperseded, Config(Budget(), num_rivals=1), "I4 (superseded)"),
    Mutant(StaleCallAttachesAgain, Config(Budget(drops=1, lapses=1), length=1), "I9"),
    Mutant(ReleaseForgetsTheQueue, Config(Budget(releases=1)), "I8"),
)
