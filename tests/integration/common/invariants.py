"""The invariants I1 to I13 of the job protocol, checked on a copy of all keys of a shard, each by its own function.

I9 (every accepted job ends), I10 (nothing expired is handed out) and I12 (tenants do not see each other) are about what
operations do, so the state machine checks those itself; I4 to I6 need what a client has received, and take it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import redis as redis_sync

from common import keys, records
from common.chain import GENESIS, next_hash
from common.jobs import FINAL_STATES, ItemKind, JobState, LogEvent
from common.settings import QueueSettings

MAX_PREEMPTIONS = 1  # of a job, in the state machine
ATTEMPTS_IN_COMPANY = 2  # without progress, in a row; then a job runs alone


@dataclass
class Seen:
    """What a client has received: the log's events in order, and whether it was told of the end."""

    events: list[LogEvent] = field(default_factory=list)

    @property
    def sequence(self) -> int:
        return len(self.events)

    @property
    def chain_hash(self) -> bytes:
        return self.events[-1].chain_hash if self.events else b""

    @property
    def is_ended(self) -> bool:
        return bool(self.events) and self.events[-1].kind.is_terminal


@dataclass(frozen=True)
class StoredJob:
    fields: Mapping[str, bytes]
    log: list[LogEvent]  # with markers
    record: bytes | None  # its run record in its worker's hash
    ttl_ms: int
    log_ttl_ms: int

    @property
    def state(self) -> JobState:
        return JobState(self.fields["st"].decode())

    @property
    def events(self) -> list[LogEvent]:
        return [event for event in self.log if event.kind is not ItemKind.STARTED]

    def number(self, name: str) -> int:
        return int(self.fields.get(name, b"0"))


@dataclass(frozen=True)
class Snapshot:
    """All of a shard."""

    jobs: Mapping[str, StoredJob]
    queued: Mapping[tuple[int, str], list[str]]  # (class, tenant) -> ids
    isolated: Mapping[int, list[str]]  # queued, to run alone: class -> ids
    active: Mapping[int, set[str]]
    lengths: Mapping[int, int]
    live: Mapping[str, int]
    bell: int
    deadlines: set[str]
    detached: set[str]
    worker_jobs: Mapping[str, Mapping[str, bytes]]
    gateway_jobs: Mapping[str, set[str]]
    usage: Mapping[str, int]
    idempotency_ttls: Mapping[str, int]
    dead_letters: set[str]


def _names(values: object) -> set[str]:
    return {value.decode() for value in values}  # type: ignore[attr-defined]


def take_snapshot(client: redis_sync.Redis, shard: str) -> Snapshot:
    prefix = f"{{{shard}}}:"
    names = [name.decode().removeprefix(prefix) for name in client.keys(f"{prefix}*")]
    by_kind: dict[str, list[str]] = {}
    for name in names:
        by_kind.setdefault(name.partition(":")[0], []).append(name)
    worker_jobs = {
        name[2:]: {k.decode(): v for k, v in client.hgetall(prefix + name).items()} for name in by_kind.get("w", [])
    }
    pipe = client.pipeline(transaction=False)
    ids = [name[2:] for name in by_kind.get("j", []) if not name.endswith(":log")]
    for generation_id in ids:
        key = keys.job(shard, generation_id)
        pipe.hgetall(key)
        pipe.xrange(f"{key}:log")
        pipe.pttl(key)
        pipe.pttl(f"{key}:log")
    replies = iter(pipe.execute())
    jobs = {}
    for generation_id in ids:
        fields = {name.decode(): value for name, value in next(replies).items()}
        entries = [[part for pair in entry.items() for part in pair] for _, entry in next(replies)]
        log = [records.event_from_fields(entry) for entry in entries]
        ttls = next(replies), next(replies)
        if not fields:
            continue  # it has expired since its name was read
        record = worker_jobs.get(fields.get("w", b"").decode(), {}).get(generation_id)
        jobs[generation_id] = StoredJob(fields, log, record, *ttls)
    queues: dict[tuple[int, str], list[str]] = {}
    for name in by_kind.get("q", []):
        _, priority, tenant = name.split(":", 2)
        queues[int(priority), tenant] = [i.decode() for i in client.zrange(prefix + name, 0, -1)]
    usage: dict[str, int] = {}
    for name in by_kind.get("usage", []):
        for kind, amount in client.hgetall(prefix + name).items():
            usage[kind.decode()] = usage.get(kind.decode(), 0) + int(amount)
    return Snapshot(
        jobs=jobs,
        queued=queues,
        isolated={
            int(name[6:]): [i.decode() for i in client.zrange(prefix + name, 0, -1)]
            for name in by_kind.get("alone", [])
        },
        active={int(name[4:]): _names(client.zrange(prefix + name, 0, -1)) for name in by_kind.get("act", [])},
        lengths={int(k): int(v) for k, v in client.hgetall(prefix + "len").items()},
        live={k.decode(): int(v) for k, v in client.hgetall(prefix + "live").items()},
        bell=client.llen(prefix + "bell"),
        deadlines=_names(client.zrange(prefix + "dl", 0, -1)),
        detached=_names(client.zrange(prefix + "dt", 0, -1)),
        worker_jobs=worker_jobs,
        gateway_jobs={name[2:]: _names(client.smembers(prefix + name)) for name in by_kind.get("g", [])},
        usage=usage,
        idempotency_ttls={name[2:]: client.pttl(prefix + name) for name in by_kind.get("i", [])},
        dead_letters=_names(client.zrange(prefix + "failed", 0, -1)),
    )


def i1_one_terminal_and_nothing_after_it(snapshot: Snapshot) -> None:
    for job in snapshot.jobs.values():
        terminals = [i for i, event in enumerate(job.log) if event.kind.is_terminal]
        assert terminals == ([len(job.log) - 1] if job.state in FINAL_STATES else [])


def i2_events_are_numbered_without_gap_and_tokens_per_output(snapshot: Snapshot) -> None:
    for job in snapshot.jobs.values():
        assert [event.sequence for event in job.events] == list(range(1, len(job.events) + 1))
        next_token: dict[int, int] = {}
        chain_hash = GENESIS
        for event in job.events:
            assert event.body is not None
            for delta in event.body.deltas:
                assert delta.first_token_index == next_token.get(delta.output_index, 0), "tokens repeat or are missing"
                next_token[delta.output_index] = delta.first_token_index + len(delta.token_ids)
            chain_hash = next_hash(chain_hash, event.body.deltas)
            assert event.chain_hash == chain_hash
        stored = job.number("n")
        if job.record is not None:
            stored = int(job.record[:20].split(b"-")[1])
        assert stored == len(job.events)


def i3_only_the_holder_of_the_epoch_appends(snapshot: Snapshot, writer_of_token: Mapping[int, str]) -> None:
    for job in snapshot.jobs.values():
        holders: dict[int, str] = {}
        last = 0
        for event in job.log:
            assert event.epoch >= last, "epochs go back along the log"
            last = event.epoch
            if event.kind is ItemKind.STARTED:
                assert event.epoch not in holders
                holders[event.epoch] = event.reason
            elif event.body is not None:
                for delta in event.body.deltas:
                    for token in delta.token_ids:
                        assert writer_of_token[token] == holders[event.epoch], "a worker wrote in another's epoch"
        assert job.number("ep") >= last


def i4_i5_i6_a_client_sees_a_prefix_of_the_log(snapshot: Snapshot, seen: Mapping[str, Seen]) -> None:
    for generation_id, client in seen.items():
        job = snapshot.jobs[generation_id]
        assert client.events == job.events[: client.sequence], "I4: not a prefix of the log"
        if client.is_ended:
            assert client.sequence == len(job.events), "I5: the end came before all events"
            assert client.events[-1].kind.value == job.state.value, "I6: another end than the stored one"


def i7_attempts_are_bounded(snapshot: Snapshot, settings: QueueSettings) -> None:
    for job in snapshot.jobs.values():
        assert job.number("at") <= settings.max_fruitless_attempts
        assert job.number("nc") <= settings.max_claims
        assert job.number("pe") <= MAX_PREEMPTIONS
        assert job.number("ep") <= 2 * (settings.max_claims + MAX_PREEMPTIONS) + 1


def i8_a_job_is_in_exactly_one_place(snapshot: Snapshot) -> None:
    queued: list[tuple[str, object]] = [(i, place) for place, ids in snapshot.queued.items() for i in ids]
    queued += [(i, priority) for priority, ids in snapshot.isolated.items() for i in ids]
    running = [(i, wid) for wid, jobs in snapshot.worker_jobs.items() for i in jobs]
    by_tenant: dict[str, int] = {}
    for generation_id, job in snapshot.jobs.items():
        places = [place for i, place in queued if i == generation_id]
        holders = [wid for i, wid in running if i == generation_id]
        place = (job.number("c"), job.fields["t"].decode())
        home = place[0] if job.number("at") >= ATTEMPTS_IN_COMPANY else place
        assert places == ([home] if job.state is JobState.QUEUED else [])
        assert holders == ([job.fields["w"].decode()] if job.state is JobState.RUNNING else [])
        if job.record is not None:
            assert int(job.record.split(b"-")[0]) == job.number("ep")
        is_live = job.state not in FINAL_STATES
        by_tenant[place[1]] = by_tenant.get(place[1], 0) + is_live
        gateway = job.fields.get("gw", b"").decode()
        assert (generation_id in snapshot.deadlines) == is_live
        assert (generation_id in snapshot.detached) == (is_live and not gateway)
        at = {gid for gid, ids in snapshot.gateway_jobs.items() if generation_id in ids}
        assert at == ({gateway} if is_live and gateway else set())
        if job.record is not None:
            assert job.record[60:].decode().strip("-") == gateway
    assert len(queued) == sum(snapshot.lengths.values())
    for priority in range(keys.PRIORITY_CLASSES):
        waiting = {tenant for (c, tenant) in snapshot.queued if c == priority}
        assert snapshot.active.get(priority, set()) == waiting
        number = sum(len(ids) for (c, _), ids in snapshot.queued.items() if c == priority)
        number += len(snapshot.isolated.get(priority, []))
        assert snapshot.lengths.get(priority, 0) == number
    assert snapshot.live == {tenant: n for tenant, n in by_tenant.items() if n}


def i11_a_waiting_job_has_a_wake_up(snapshot: Snapshot) -> None:
    assert not (snapshot.queued or snapshot.isolated) or snapshot.bell > 0


def a_suspect_runs_alone(snapshot: Snapshot) -> None:
    """What took several workers with it in a row runs beside nothing until it makes progress, one in a shard."""
    suspects = [
        jobs
        for jobs in snapshot.worker_jobs.values()
        for generation_id, record in jobs.items()
        if snapshot.jobs[generation_id].number("at") >= ATTEMPTS_IN_COMPANY and record[20:60].split()[3] == b"0"
    ]
    assert len(suspects) <= 1, "two at a time"
    assert all(len(jobs) == 1 for jobs in suspects), "in company"


def i13_memory_is_bounded(snapshot: Snapshot, settings: QueueSettings) -> None:
    waiting = [one for ids in (*snapshot.queued.values(), *snapshot.isolated.values()) for one in ids]
    never_claimed = sum(snapshot.jobs[one].number("ep") == 0 for one in waiting)
    assert never_claimed <= settings.max_queued, "requeued ones come on top, no others"
    assert snapshot.bell <= 8
    assert len(snapshot.dead_letters) <= 1000
    for generation_id, job in snapshot.jobs.items():
        is_final = job.state in FINAL_STATES
        is_letter = job.state is JobState.FAILED and "nx" not in job.fields
        most_ms = settings.dead_letter_retention_ms if is_letter else settings.retention_ms
        assert (0 < job.ttl_ms <= most_ms) == is_final
        assert (generation_id in snapshot.dead_letters) == is_letter
        assert (job.log_ttl_ms > 0) == (is_final and bool(job.log))
        digest = job.fields["ik"].decode()
        if digest:
            # -1 is for ever; -2 that it has expired since its job was read, as both are about to at the same moment.
            assert (snapshot.idempotency_ttls.get(digest, -2) != -1) == is_final


def usage_is_counted_once(snapshot: Snapshot) -> None:
    expected: dict[str, int] = {}
    for job in snapshot.jobs.values():
        if job.state not in FINAL_STATES:
            continue
        owner = f":{job.fields['k'].decode()}:{job.fields['t'].decode()}"
        prompt = job.number("pt") if job.number("sc") else 0
        tokens = sum(len(d.token_ids) for event in job.events if event.body for d in event.body.deltas)
        cached = job.number("cp")
        kinds = {"generations": 1, "prompt_tokens": prompt, "cached_prompt_tokens": cached, "completion_tokens": tokens}
        for kind, amount in kinds.items():
            if amount:
                expected[kind + owner] = expected.get(kind + owner, 0) + amount
    assert snapshot.usage == expected


def check_all(
    snapshot: Snapshot, settings: QueueSettings, seen: Mapping[str, Seen], writer_of_token: Mapping[int, str]
) -> None:
    i1_one_terminal_and_nothing_after_it(snapshot)
    i2_events_are_numbered_without_gap_and_tokens_per_output(snapshot)
    i3_only_the_holder_of_the_epoch_appends(snapshot, writer_of_token)
    i4_i5_i6_a_client_sees_a_prefix_of_the_log(snapshot, seen)
    i7_attempts_are_bounded(snapshot, settings)
    i8_a_job_is_in_exactly_one_place(snapshot)
    i11_a_waiting_job_has_a_wake_up(snapshot)
    a_suspect_runs_alone(snapshot)
    i13_memory_is_bounded(snapshot, settings)
    usage_is_counted_once(snapshot)
