"""Decides from what callers wrote down and from what the server holds in the end whether a law was broken. Pure.

The laws are the invariants I1 to I13 of the protocol; those on the store are the ones that the protocol's stateful test
checks, on the same kind of snapshot. Run it when nothing is in flight any more.
"""

from __future__ import annotations

import linecache
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from common.jobs import FINAL_STATES, ItemKind, JobState
from common.settings import QueueSettings
from tests.chaos.history import Generation, History, Outcome
from tests.chaos.truth import Truth
from tests.integration.common import invariants
from tests.integration.common.invariants import Snapshot

_MAX_SHOWN: Final = 5
_REFUSALS: Final = frozenset({"BACKEND_FULL", "BACKEND_UNAVAILABLE", "UNAVAILABLE", "QUEUE_FULL", "TENANT_QUEUE_FULL"})
# A gateway that cannot renew its lease is as good as dead to the others.
CUTS_GATEWAYS_OFF: Final = frozenset(
    {
        "pause-gateway",
        "partition-gateway",
        "server-unreachable",
        "lose-replies-to-gateway",
        "step-clock-of-server",
        # With leases as short as these, a server that is away for less than 3 s may end them (see QueueSettings).
        "pause-server",
        "pause-everything",
        "block-server",
        "slow-fsync",
    }
)
_MAX_LOCALS: Final = 1500


@dataclass(frozen=True, slots=True)
class Evidence:
    """What there is to judge. `texts` is what an undisturbed system said, by prompt and max_tokens."""

    history: History
    snapshot: Snapshot
    truth: Truth
    settings: QueueSettings
    texts: Mapping[tuple[int, int], str]
    is_whole: bool = (
        True  # nothing has been forgotten by the server since, as it forgets results when their time is over
    )


@dataclass(slots=True)
class Report:
    """Violations by law, none if all is well; and counts."""

    violations: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, law: str, what: str) -> None:
        self.violations.setdefault(law, []).append(what)

    @property
    def num_violations(self) -> int:
        return sum(map(len, self.violations.values()))

    def __str__(self) -> str:
        lines = []
        for law, found in sorted(self.violations.items()):
            lines += [f"{law}: {len(found)}", *(f"    {what}" for what in found[:_MAX_SHOWN])]
        return "\n".join(lines) or "no violation"


Law = Callable[[Evidence, Report], None]
_LAWS: Final[list[Law]] = []


def law(function: Law) -> Law:
    """Register a law."""
    _LAWS.append(function)
    return function


def check(evidence: Evidence) -> Report:
    """Hold everything against every law."""
    report = Report()
    for rule in _LAWS:
        rule(evidence, report)
    report.counts = dict(_counts(evidence.history))
    return report


def _accepted(history: History) -> Iterable[Generation]:
    return (generation for generation in history.generations if generation.generation_id)


# -- what callers saw -----------------------------------------------------------------------------------------------


@law
def callers_complaints(evidence: Evidence, report: Report) -> None:
    """I4, I12 and whatever else showed at once."""
    for complaint in evidence.history.complaints:
        report.add(complaint.partition(":")[0], complaint)
    for generation in evidence.history.generations:
        for complaint in generation.complaints:
            report.add(complaint.partition(":")[0], f"{generation.generation_id} ({generation.kind}): {complaint}")


@law
def tokens_are_the_models(evidence: Evidence, report: Report) -> None:
    """I4: whatever a caller received is a prefix of what the model says; the text is an undisturbed system's."""
    for generation in _accepted(evidence.history):
        expected = evidence.truth.output(generation.prompt, generation.max_tokens)
        if generation.token_ids != expected[: len(generation.token_ids)]:
            report.add("I4", f"{generation.generation_id}: other tokens than the model's")
        text = evidence.texts.get((generation.prompt, generation.max_tokens))
        if text is not None and not text.startswith(generation.text):
            report.add("I4", f"{generation.generation_id}: other text than undisturbed")
        is_whole = generation.outcome is Outcome.FINISHED and generation.finish_reason == "FINISH_REASON_LENGTH"
        if is_whole and text is not None and generation.text != text:
            report.add("I5", f"{generation.generation_id}: the text is not whole")


@law
def the_end_comes_after_all_tokens(evidence: Evidence, report: Report) -> None:
    """I5, and the end is the one that was asked for."""
    for generation in _accepted(evidence.history):
        if generation.outcome is not Outcome.FINISHED:
            continue
        reason = generation.finish_reason
        if reason == "FINISH_REASON_LENGTH" and len(generation.token_ids) != generation.max_tokens:
            report.add("I5", f"{generation.generation_id}: ended after {len(generation.token_ids)} tokens")
        elif reason == "FINISH_REASON_CANCELLED" and not _may_be_cancelled(generation, evidence.history):
            report.add("I6", f"{generation.generation_id} ({generation.kind}): cancelled, and nobody asked for it")
        elif reason not in ("FINISH_REASON_LENGTH", "FINISH_REASON_CANCELLED"):
            report.add("I6", f"{generation.generation_id}: ended with {reason}")
        if generation.usage[1] != len(generation.token_ids):
            report.add(
                "usage", f"{generation.generation_id}: {generation.usage[1]} for {len(generation.token_ids)} tokens"
            )


def _may_be_cancelled(generation: Generation, history: History) -> bool:
    """Whether somebody asked for it, or its gateway was taken for dead while it had no grace."""
    if generation.kind in ("cancel", "leave"):
        return True
    if generation.grace_s == 0 and generation.num_begins > 1:
        return True  # the call that made it broke before it was accepted
    meanwhile = (fault.kind for fault in history.faults if fault.overlaps(generation.started, generation.ended))
    return generation.grace_s == 0 and any(kind in CUTS_GATEWAYS_OFF for kind in meanwhile)


@law
def every_accepted_generation_is_answered(evidence: Evidence, report: Report) -> None:
    """I9: no caller was left without an end, or told that a result is lost."""
    for generation in _accepted(evidence.history):
        if generation.outcome in (Outcome.OPEN, Outcome.LOST):
            report.add("I9", f"{generation.generation_id} ({generation.kind}): {generation.outcome} {generation.error}")


@law
def refusals_are_of_those_that_faults_explain(evidence: Evidence, report: Report) -> None:
    """What was not accepted was told that the system is full or away, and nothing else."""
    for generation in evidence.history.generations:
        if generation.outcome is Outcome.REFUSED and generation.error not in _REFUSALS:
            report.add("refusal", f"a call ({generation.kind}) was refused with {generation.error}")


@law
def one_key_makes_one_generation(evidence: Evidence, report: Report) -> None:
    """A repeat is answered with the same generation, and nobody else has it."""
    owners: dict[str, Generation] = {}
    for generation in _accepted(evidence.history):
        if any(other != generation.generation_id for other in generation.other_ids):
            report.add("idempotency", f"{generation.generation_id}: one key made several generations")
        if owners.setdefault(generation.generation_id, generation) is not generation:
            report.add("idempotency", f"{generation.generation_id}: two requests share a generation")
    by_digest = Counter(job.fields["ik"] for job in evidence.snapshot.jobs.values() if job.fields.get("ik"))
    for digest, number in by_digest.items():
        if number > 1:
            report.add("idempotency", f"key {digest.decode()}: {number} generations are stored")


# -- what callers saw against what is stored ------------------------------------------------------------------------


@law
def what_was_seen_is_stored(evidence: Evidence, report: Report) -> None:
    """I4, I6: every event that a caller saw stands in the log, with the same hash; the end is the stored one."""
    for generation in _accepted(evidence.history):
        job = evidence.snapshot.jobs.get(generation.generation_id)
        if job is None:
            if evidence.is_whole:
                report.add("I9", f"{generation.generation_id}: accepted, and not stored")
            continue
        hashes = {event.sequence: event.chain_hash.hex() for event in job.events}
        for sequence, digest in generation.hashes.items():
            if hashes.get(sequence) != digest:
                report.add("I4", f"{generation.generation_id}: event {sequence} is another one in the log")
                break
        if generation.outcome is Outcome.FINISHED:
            expected = JobState.CANCELLED if generation.finish_reason == "FINISH_REASON_CANCELLED" else JobState.DONE
            if job.state is not expected or job.events[-1].kind.value != expected.value:
                report.add("I6", f"{generation.generation_id}: told {generation.finish_reason}, stored {job.state}")
        if generation.outcome is Outcome.FAILED and job.state is not JobState.FAILED:
            report.add("I6", f"{generation.generation_id}: told that it failed, stored {job.state}")


@law
def a_cancelled_generation_ends_as_one(evidence: Evidence, report: Report) -> None:
    """I10: what CancelGeneration answers is final, and no event follows."""
    for generation in _accepted(evidence.history):
        job = evidence.snapshot.jobs.get(generation.generation_id)
        if job is None or not generation.cancel_answered:
            continue
        stored = {JobState.CANCELLED: "GENERATION_STATE_CANCELLED", JobState.DONE: "GENERATION_STATE_FINISHED"}
        if stored.get(job.state) != generation.cancel_state:
            report.add("I10", f"{generation.generation_id}: cancel said {generation.cancel_state}, stored {job.state}")


@law
def nothing_expired_was_started(evidence: Evidence, report: Report) -> None:
    """I10."""
    for generation_id, job in evidence.snapshot.jobs.items():
        if job.number("sc") > job.number("dl"):
            report.add("I10", f"{generation_id}: started after its deadline")


@law
def epochs_belong_to_their_workers(evidence: Evidence, report: Report) -> None:
    """I3: epochs never go back along a log, and none is begun by two workers."""
    for generation_id, job in evidence.snapshot.jobs.items():
        last = 0
        holders: dict[int, str] = {}
        for event in job.log:
            if event.epoch < last:
                report.add("I3", f"{generation_id}: epoch {event.epoch} behind {last}")
            last = event.epoch
            if event.kind is ItemKind.STARTED and holders.setdefault(event.epoch, event.reason) != event.reason:
                report.add("I3", f"{generation_id}: two workers in epoch {event.epoch}")
        if job.number("ep") < last:
            report.add("I3", f"{generation_id}: epoch {job.number('ep')} is stored, {last} is in the log")


@law
def everything_has_ended(evidence: Evidence, report: Report) -> None:
    """I9 for the store: also what nobody waited for."""
    for generation_id, job in evidence.snapshot.jobs.items():
        if job.state not in FINAL_STATES:
            report.add("I9", f"{generation_id}: {job.state} in the end")


@law
def the_store_is_sound(evidence: Evidence, report: Report) -> None:
    """I1, I2, I7, I8, I11, I13 and usage, as the protocol's own test has them."""
    snapshot, settings = evidence.snapshot, evidence.settings
    checks: dict[str, Callable[[], None]] = {
        "I1": lambda: invariants.i1_one_terminal_and_nothing_after_it(snapshot),
        "I2": lambda: invariants.i2_events_are_numbered_without_gap_and_tokens_per_output(snapshot),
        "I7": lambda: invariants.i7_attempts_are_bounded(snapshot, settings),
        "I8": lambda: invariants.i8_a_job_is_in_exactly_one_place(snapshot),
        "I11": lambda: invariants.i11_a_waiting_job_has_a_wake_up(snapshot),
        "I13": lambda: invariants.i13_memory_is_bounded(snapshot, settings),
        "usage": lambda: invariants.usage_is_counted_once(snapshot),
    }
    if not evidence.is_whole:
        del checks["usage"]  # the sum is of all that there has been
    for name, run in checks.items():
        try:
            run()
        except AssertionError as error:
            report.add(name, f"the store: {_where(error)}")


def _where(error: AssertionError) -> str:
    """Return the condition that failed, and what it was about."""
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    condition = linecache.getline(frame.f_code.co_filename, line).strip()
    about = {name: value for name, value in frame.f_locals.items() if isinstance(value, str | int | dict)}
    return f"{condition} {error} {str(about)[:_MAX_LOCALS]}"


# -- figures --------------------------------------------------------------------------------------------------------


def _counts(history: History) -> Iterable[tuple[str, int]]:
    generations = history.generations
    accepted = list(_accepted(history))
    yield "generations", len(generations)
    yield "accepted", len(accepted)
    yield "in_flight_on_what_was_hit", sum(bool(generation.faults) for generation in generations)
    yield "takeovers", sum(generation.num_takeovers for generation in generations)
    yield "resumes", sum(generation.num_resumes for generation in generations)
    yield "tokens", sum(len(generation.token_ids) for generation in generations)
    yield "stranger_calls", history.num_stranger_calls
    for outcome, number in Counter(generation.outcome for generation in generations).items():
        yield f"outcome_{outcome}", number
    for error, number in Counter(generation.error for generation in generations if generation.error).items():
        yield f"error_{error}", number
