"""The checker sees each law broken: a sound history, changed in one place after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from common.chain import GENESIS, next_hash
from common.generation import EventBody, FinishReason, OutputDelta
from common.jobs import ItemKind, LogEvent
from common.settings import QueueSettings
from tests.chaos.callers import take_event
from tests.chaos.checker import Evidence, check
from tests.chaos.history import Generation, History, Outcome
from tests.chaos.truth import Truth
from tests.integration.common.invariants import Snapshot, StoredJob
from torchrelay.v1 import generation_pb2 as pb

TOKENS = tuple(range(10, 34))
TRUTH = Truth(((1, 2, 3),), (TOKENS,))
ID = "tiny-0000000000000000." + "a" * 26


def stored_log() -> list[LogEvent]:
    """A log of three events and an end, of a job that two workers had."""
    entries = [LogEvent(GENESIS, 1, 0, None, ItemKind.STARTED, "w1")]
    digest, first = GENESIS, 0
    for sequence, number in enumerate((8, 8, 8), start=1):
        epoch = 1 if sequence < 3 else 3
        if sequence == 3:
            entries.append(LogEvent(digest, 3, 2, None, ItemKind.STARTED, "w2"))
        delta = OutputDelta(0, first, TOKENS[first : first + number], "x" * number)
        digest = next_hash(digest, (delta,))
        entries.append(LogEvent(digest, epoch, sequence, EventBody((delta,))))
        first += number
    end = OutputDelta(0, first, finish_reason=FinishReason.LENGTH)
    digest = next_hash(digest, (end,))
    entries.append(LogEvent(digest, 3, 4, EventBody((end,)), ItemKind.DONE, ""))
    return entries


def stored_job(**fields: bytes) -> StoredJob:
    known = {
        "st": b"D", "t": b"red", "k": b"key", "c": b"1", "ep": b"3", "n": b"4", "at": b"0", "nc": b"2", "pt": b"3",
        "sc": b"1000", "dl": b"900000", "ik": b"digest", "gw": b"", "w": b"",
    }  # fmt: skip
    return StoredJob({**known, **fields}, stored_log(), None, 1000, 1000)


def make_evidence() -> Evidence:
    """All is well."""
    job = stored_job()
    usage = {"generations:key:red": 1, "prompt_tokens:key:red": 3, "completion_tokens:key:red": 24}
    snapshot = Snapshot(
        jobs={ID: job},
        queued={},
        isolated={},
        active={},
        lengths={},
        live={},
        bell=0,
        deadlines=set(),
        detached=set(),
        worker_jobs={},
        gateway_jobs={},
        usage=usage,
        idempotency_ttls={"digest": 1000},
        dead_letters=set(),
    )
    generation = Generation("follow", "red", 0, 24, generation_id=ID, outcome=Outcome.FINISHED)
    generation.token_ids, generation.text = list(TOKENS), "x" * 24
    generation.finish_reason, generation.usage = "FINISH_REASON_LENGTH", (3, 24)
    generation.hashes = {event.sequence: event.chain_hash.hex() for event in job.events}
    return Evidence(History([generation]), snapshot, TRUTH, QueueSettings(), {(0, 24): "x" * 24})


def test_a_sound_history_breaks_no_law() -> None:
    report = check(make_evidence())
    assert not report.violations, str(report)
    assert report.counts["accepted"] == 1
    assert report.counts["tokens"] == 24


def first(evidence: Evidence) -> Generation:
    return evidence.history.generations[0]


def replace_job(evidence: Evidence, **changes: object) -> None:
    evidence.snapshot.jobs[ID] = dataclasses.replace(evidence.snapshot.jobs[ID], **changes)  # type: ignore[index,arg-type]


def lose_a_token(evidence: Evidence) -> None:
    del first(evidence).token_ids[3]


def repeat_tokens(evidence: Evidence) -> None:
    first(evidence).token_ids[8:8] = first(evidence).token_ids[:8]


def end_early(evidence: Evidence) -> None:
    first(evidence).token_ids = list(TOKENS[:16])
    first(evidence).text = "x" * 16


def lose_text(evidence: Evidence) -> None:
    first(evidence).text = "x" * 23


def change_text(evidence: Evidence) -> None:
    first(evidence).text = "x" * 10 + "y" + "x" * 13


def mix_two_logs(evidence: Evidence) -> None:
    first(evidence).hashes[2] = "00" * 8


def leave_unanswered(evidence: Evidence) -> None:
    first(evidence).outcome = Outcome.OPEN


def lose_the_result(evidence: Evidence) -> None:
    first(evidence).outcome, first(evidence).error = Outcome.LOST, "RESULT_LOST"


def lose_the_job(evidence: Evidence) -> None:
    del evidence.snapshot.jobs[ID]  # type: ignore[attr-defined]


def tell_another_end(evidence: Evidence) -> None:
    first(evidence).finish_reason = "FINISH_REASON_CANCELLED"
    first(evidence).kind = "cancel"


def cancel_unasked(evidence: Evidence) -> None:
    first(evidence).finish_reason = "FINISH_REASON_CANCELLED"


def break_the_word_of_a_cancellation(evidence: Evidence) -> None:
    first(evidence).cancel_answered, first(evidence).cancel_state = 1.0, "GENERATION_STATE_CANCELLED"


def make_two_of_one_key(evidence: Evidence) -> None:
    first(evidence).other_ids.append(ID[:-1] + "b")


def share_a_generation(evidence: Evidence) -> None:
    evidence.history.generations.append(dataclasses.replace(first(evidence)))


def store_a_key_twice(evidence: Evidence) -> None:
    evidence.snapshot.jobs[ID[:-1] + "b"] = stored_job()  # type: ignore[index]


def write_behind_the_end(evidence: Evidence) -> None:
    job = evidence.snapshot.jobs[ID]
    replace_job(evidence, log=[*job.log, changed(job.log[-1], kind=ItemKind.EVENT, sequence=5)])


def changed(event: LogEvent, *, kind: ItemKind, sequence: int) -> LogEvent:
    return LogEvent(event.chain_hash, event.epoch, sequence, event.body, kind, event.reason)


def turn_epochs_back(evidence: Evidence) -> None:
    job = evidence.snapshot.jobs[ID]
    log = list(job.log)
    log[2] = LogEvent(log[2].chain_hash, 4, log[2].sequence, log[2].body)
    replace_job(evidence, log=log)


def begin_an_epoch_twice(evidence: Evidence) -> None:
    job = evidence.snapshot.jobs[ID]
    replace_job(evidence, log=[LogEvent(GENESIS, 1, 0, None, ItemKind.STARTED, "w9"), *job.log])


def never_end(evidence: Evidence) -> None:
    replace_job(evidence, fields={**evidence.snapshot.jobs[ID].fields, "st": b"R"})


def start_after_the_deadline(evidence: Evidence) -> None:
    replace_job(evidence, fields={**evidence.snapshot.jobs[ID].fields, "sc": b"900001"})


def claim_for_ever(evidence: Evidence) -> None:
    replace_job(evidence, fields={**evidence.snapshot.jobs[ID].fields, "nc": b"65"})


def leave_it_queued(evidence: Evidence) -> None:
    evidence.snapshot.queued[1, "red"] = [ID]  # type: ignore[index]


def keep_it_for_ever(evidence: Evidence) -> None:
    replace_job(evidence, ttl_ms=-1)


def count_twice(evidence: Evidence) -> None:
    evidence.snapshot.usage["completion_tokens:key:red"] = 48  # type: ignore[index]


def answer_a_stranger(evidence: Evidence) -> None:
    evidence.history.complaints.append("I12: a stranger was answered OK")


def report_other_usage(evidence: Evidence) -> None:
    first(evidence).usage = (3, 23)


BREACHES: list[tuple[Callable[[Evidence], None], str]] = [
    (lose_a_token, "I4"),
    (repeat_tokens, "I4"),
    (end_early, "I5"),
    (lose_text, "I5"),
    (change_text, "I4"),
    (mix_two_logs, "I4"),
    (leave_unanswered, "I9"),
    (lose_the_result, "I9"),
    (lose_the_job, "I9"),
    (tell_another_end, "I6"),
    (cancel_unasked, "I6"),
    (break_the_word_of_a_cancellation, "I10"),
    (make_two_of_one_key, "idempotency"),
    (share_a_generation, "idempotency"),
    (store_a_key_twice, "idempotency"),
    (write_behind_the_end, "I1"),
    (turn_epochs_back, "I3"),
    (begin_an_epoch_twice, "I3"),
    (never_end, "I9"),
    (start_after_the_deadline, "I10"),
    (claim_for_ever, "I7"),
    (leave_it_queued, "I8"),
    (keep_it_for_ever, "I13"),
    (count_twice, "usage"),
    (answer_a_stranger, "I12"),
    (report_other_usage, "usage"),
]


@pytest.mark.parametrize(("breach", "law"), BREACHES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_law_is_seen(breach: Callable[[Evidence], None], law: str) -> None:
    evidence = make_evidence()
    breach(evidence)
    report = check(evidence)
    assert law in report.violations, str(report)


def event(sequence: int, first_token: int, *token_ids: int, digest: bytes = b"\x01" * 8) -> pb.GenerationEvent:
    delta = pb.Delta(first_token_index=first_token, token_ids=token_ids)
    return pb.GenerationEvent(sequence=sequence, chain_hash=digest, deltas=pb.Deltas(deltas=[delta]))


def test_a_caller_complains_at_once_of_gaps_repetitions_and_what_follows_the_end() -> None:
    generation = Generation("follow", "red", 0, 24)
    take_event(generation, pb.GenerationEvent(accepted=pb.Accepted(generation_id=ID)))
    take_event(generation, event(1, 0, 10, 11))
    assert not generation.complaints
    take_event(generation, event(3, 4, 14))
    take_event(generation, event(4, 0, 10))
    take_event(generation, event(2, 4, 14))
    take_event(generation, event(4, 5, 15, digest=b"\x02" * 8))
    take_event(generation, pb.GenerationEvent(accepted=pb.Accepted(generation_id=ID[:-1] + "b")))
    finished = pb.Finished(outputs=[pb.OutputEnd(finish_reason=pb.FINISH_REASON_LENGTH)])
    take_event(generation, pb.GenerationEvent(sequence=9, finished=finished))
    take_event(generation, event(9, 6, 16))
    found = " ".join(generation.complaints)
    for expected in (
        "token 4 follows 2",
        "token 0 follows",
        "go back",
        "another hash",
        "two generations",
        "after the end",
    ):
        assert expected in found
