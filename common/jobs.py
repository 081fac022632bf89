"""What crosses the queue: jobs, log events, reply items, and what the two sides get back. Pure data, no I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec

from common import keys
from common.errors import InvalidRequest
from common.generation import EventBody, JobBody, Usage

MAX_TENANT_BYTES: Final = 256
MAX_KEY_ID_BYTES: Final = 64
MAX_IDEMPOTENCY_KEY_BYTES: Final = 128


class JobState(StrEnum):
    """Where a generation is. The last four are final."""

    QUEUED = "Q"
    RUNNING = "R"
    DONE = "D"  # ended by the worker; every output has a finish reason
    FAILED = "F"  # given up: dead letter, or an error that its log names
    CANCELLED = "C"
    EXPIRED = "E"  # its deadline passed

    @property
    def is_final(self) -> bool:
        return self in FINAL_STATES


FINAL_STATES: Final = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})


class ItemKind(StrEnum):
    """What a log entry or reply item says besides its events. Final states use the letter of the state."""

    EVENT = ""
    STARTED = "T"  # a worker took the job: `sequence` events stand before it
    REQUEUED = "Q"  # reply only: the job waits again (worker lost, or released)
    SUPERSEDED = "S"  # reply only: another gateway has attached
    DONE = "D"
    FAILED = "F"
    CANCELLED = "C"
    EXPIRED = "E"

    @property
    def is_terminal(self) -> bool:
        return self in _TERMINAL_KINDS


_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_TERMINAL_KINDS: Final = frozenset({ItemKind.DONE, ItemKind.FAILED, ItemKind.CANCELLED, ItemKind.EXPIRED})


class LogEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One entry of a generation's log: event `sequence` (1 to n), the last of them terminal."""

    chain_hash: bytes  # over the token ids up to and including this event (common/chain.py)
    epoch: int
    sequence: int
    body: EventBody | bytes | None = None  # None in a STARTED marker; bytes as stored, where it is sealed
    kind: ItemKind = ItemKind.EVENT
    reason: str = ""  # of a terminal: see Reason


class ReplyItem(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One item of a gateway's reply stream: a copy of a log event, or news about a job.

    A copy whose `body` is None was too large for the reply stream: it must be read from the log. One that is bytes is
    sealed.
    """

    generation_id: str
    chain_hash: bytes
    epoch: int
    sequence: int
    body: EventBody | bytes | None = None
    kind: ItemKind = ItemKind.EVENT
    reason: str = ""


class Reason(StrEnum):
    """Why a generation reached its terminal event, where the state alone does not say.

    A reason that only a later version knows reads as NONE: the state says enough to go on.
    """

    NONE = ""
    CANCELLED = "CANCELLED"  # C: asked for
    DISCONNECTED = "DISCONNECTED"  # C: the caller was away for longer than its grace
    NEVER_STARTED = "NEVER_STARTED"  # E: no worker ever took it
    TIME_LIMIT = "TIME_LIMIT"  # E: the deadline passed after it had started
    ATTEMPTS_EXHAUSTED = "ATTEMPTS_EXHAUSTED"  # F: the dead letter
    LOG_LIMIT = "LOG_LIMIT"  # F: its events outgrew the bound
    WORKER_FAILED = "WORKER_FAILED"  # F: a worker gave it up
    GRAMMAR_INVALID = "GRAMMAR_INVALID"  # F: the worker's library does not take its structured output
    GRAMMAR_TOO_COMPLEX = "GRAMMAR_TOO_COMPLEX"  # F: the same, or it outgrew the limits of a step
    GRAMMAR_STUCK = "GRAMMAR_STUCK"  # F: its structured output came to where no token may follow
    STRUCTURED_OUTPUT_UNSUPPORTED = "STRUCTURED_OUTPUT_UNSUPPORTED"  # F: the worker has no grammars
    ADAPTER_NOT_FOUND = "ADAPTER_NOT_FOUND"  # F: its adapter was removed or changed, or the worker serves none
    ALL_TOKENS_FORBIDDEN = "ALL_TOKENS_FORBIDDEN"  # F: its own parameters left no token to choose

    @classmethod
    def _missing_(cls, value: object) -> Reason:
        return cls.NONE

    @property
    def is_of_grammar(self) -> bool:
        """Whether the request's structured output is what it failed by."""
        return self in _GRAMMAR_REASONS


_GRAMMAR_REASONS: Final = frozenset(
    {
        Reason.GRAMMAR_INVALID,
        Reason.GRAMMAR_TOO_COMPLEX,
        Reason.GRAMMAR_STUCK,
        Reason.STRUCTURED_OUTPUT_UNSUPPORTED,
    }
)


class LostReason(StrEnum):
    """Why a worker no longer holds a job."""

    CANCELLED = "cancelled"
    EXPIRED = "expired"
    TAKEN = "taken"  # requeued, or held at another epoch
    ENDED = "ended"
    GONE = "gone"  # nothing is known of it: expired, or lost by the server
    DIVERGED = "diverged"  # the stored log is not the one that this worker wrote: lost by the server


class NewJob(msgspec.Struct, frozen=True, kw_only=True):
    """A generation to queue. Durations are in milliseconds from now on the server's clock.

    Raises InvalidRequest for a tenant, key id or idempotency key that does not fit the store.
    """

    tenant: str
    body: JobBody
    key_id: str = ""  # whose usage it is
    priority: int = 1  # 0 is served first, PRIORITY_CLASSES - 1 last
    weight: float = 1.0  # the tenant's share of the service against other tenants'
    time_limit_ms: int | None = None  # default: the queue's lifetime for jobs
    disconnect_grace_ms: int = 0
    attended: bool = True  # False: nobody listens from the start, and it lives as long as its time limit
    kv_tokens: int  # KV slots needed to begin: prompt plus one block per output
    peak_kv_tokens: int  # most KV slots it may ever need
    idempotency_key: str | None = None
    request_digest: bytes = b""  # what must be equal when the key is used again
    echo: bytes = b""  # the caller's own record, returned by attach and get (the effective config)
    generation_id: str | None = None  # chosen beforehand, when the body depends on it
    retention_ms: int | None = None  # how long the result is kept, if that is shorter than the queue's own time
    max_queued: int = 0  # most waiting jobs of the tenant, if that is fewer than the queue's own bound; 0: it is not
    max_live: int = 0  # most waiting and running jobs of the tenant, likewise
    quota_id: str = ""  # by which the next two count
    max_queued_of_key: int = 0  # 0: none
    max_live_of_key: int = 0
    has_reservation: bool = False  # quota was reserved under the generation's id: its end is to be settled

    def __post_init__(self) -> None:
        _check_bytes("tenant", self.tenant, 1, MAX_TENANT_BYTES)
        _check_bytes("key_id", self.key_id, 0, MAX_KEY_ID_BYTES)
        if ":" in self.key_id:
            raise InvalidRequest("key_id must not contain ':'", field="key_id")
        if self.idempotency_key is not None:
            _check_bytes("idempotency_key", self.idempotency_key, 1, MAX_IDEMPOTENCY_KEY_BYTES)
        if not 0 <= self.priority < keys.PRIORITY_CLASSES:
            raise InvalidRequest("no such priority class", field="priority", limit=keys.PRIORITY_CLASSES - 1)
        if not self.weight > 0:
            raise InvalidRequest("weight must be above 0", field="weight")
        if not 0 < self.kv_tokens <= self.peak_kv_tokens:
            raise InvalidRequest("kv_tokens must be above 0 and at most peak_kv_tokens", field="kv_tokens")


def _check_bytes(name: str, value: str, low: int, high: int) -> None:
    # What can be printed holds none; to ask so is cheaper than to search.
    if not low <= len(value.encode()) <= high or not (value.isprintable() or not _CONTROL.search(value)):
        raise InvalidRequest(f"{name} must be {low} to {high} bytes without control characters", field=name, limit=high)


class Enqueued(msgspec.Struct, frozen=True):
    """An accepted generation."""

    generation_id: str
    duplicate: bool  # an earlier request with the same idempotency key made it
    place: int  # about how many jobs are served before it, plus one; 0 when it does not wait
    state: JobState
    expected_wait_ms: int | None = None  # until a worker takes it; None when it does not wait, or nobody knows


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRecord:
    """What is stored about a generation. Times are server time in ms since the epoch, 0 where it has not happened."""

    generation_id: str
    state: JobState
    reason: Reason
    tenant: str
    key_id: str
    priority: int
    epoch: int
    attempts: int  # epochs in a row that ended without progress
    num_claims: int
    sequence: int  # events in the log
    usage: Usage  # so far
    place: int  # as in Enqueued
    worker_id: str  # "" unless running
    gateway_id: str  # where events go; "" when detached
    created_ms: int
    started_ms: int  # first claim
    first_token_ms: int  # first commit with a token
    ended_ms: int
    deadline_ms: int
    disconnect_grace_ms: int
    echo: bytes
    expected_wait_ms: int | None = None  # as in Enqueued

    @property
    def started(self) -> bool:
        return self.started_ms > 0


@dataclass(frozen=True, slots=True)
class Attachment:
    """A generation's record and its log after the event asked for, oldest first, markers left out.

    `more` says that the log goes on: read on after the last event here.
    """

    record: GenerationRecord
    events: tuple[LogEvent, ...]
    more: bool


class ClaimedJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job handed to a worker. `events` is its log so far: not empty after a takeover."""

    generation_id: str
    epoch: int
    sequence: int
    chain_hash: bytes
    remaining_ms: int  # until its deadline
    priority: int
    attempts: int  # fruitless ones before this
    tenant: str
    usage: Usage  # reported so far
    body: JobBody
    events: tuple[LogEvent, ...]
    weight: float = 1.0  # as in NewJob
    num_preemptions: int = 0  # times that it was given back to make room for a higher class
    by_share: bool = False  # handed out for its class's share while a higher class waited: not to be preempted
    age_ms: int = 0  # since it was accepted
    num_claims: int = 1  # times that a worker was given it, this one included


class NewEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker commits for one held job: several engine steps may be merged into one event.

    Token counts are totals over the generation, not increments, so that a repeat changes nothing.
    """

    generation_id: str
    body: EventBody
    completion_tokens: int
    cached_prompt_tokens: int = 0
    progress: bool = True  # the work went further than ever, if only inside (a beam): the epoch was not fruitless
    terminal: JobState | None = None  # DONE, or FAILED with a reason
    reason: Reason = Reason.NONE


class CommitResult(msgspec.Struct, frozen=True):
    """Answer to a commit or heartbeat."""

    lost: Mapping[str, LostReason] = msgspec.field(default_factory=dict)  # held no longer: stop computing them
    queued: tuple[int, ...] = (0,) * keys.PRIORITY_CLASSES  # waiting jobs of each class
    has_unknown_jobs: bool = False  # the server counts more jobs as ours than we hold: call `owned`
    drain_requested_by: str = ""  # of a heartbeat: the operator who has asked this worker to drain


@dataclass(frozen=True, slots=True)
class Settlement:
    """What an ended generation used of the quota that it had reserved."""

    generation_id: str
    used_tokens: int
    tenant: str
    member: bytes = b""  # as stored

    @classmethod
    def from_member(cls, member: bytes) -> Settlement:
        generation_id, used, tenant = member.decode().split(" ", 2)
        return cls(generation_id, int(used), tenant, member)


@dataclass(frozen=True, slots=True)
class Swept:
    """What one reap or sweep did."""

    requeued: int = 0
    dead_lettered: int = 0
    expired: int = 0
    cancelled: int = 0
    detached: int = 0  # jobs of gateways whose lease ended
    generations: tuple[tuple[str, str], ...] = ()  # what became of which: a field's name above, and the id


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker tells about itself with each heartbeat."""

    model: str = ""
    revision: str = ""
    host: str = ""  # host name and process id
    device: str = ""  # "cpu", "cuda:0 NVIDIA H100"
    versions: dict[str, str] = {}  # package -> version
    started_ms: int = 0  # wall clock of the worker
    draining: bool = False
    num_running: int = 0
    num_waiting: int = 0
    stats: dict[str, float] = {}  # further figures of the engine, by name with unit


@dataclass(frozen=True, slots=True)
class LiveWorker:
    """A worker that has a lease on a shard."""

    worker_id: str
    lease_left_ms: int  # negative: its lease has ended but nobody has reaped it yet
    num_jobs: int
    info: WorkerInfo | None
    reported_ms: int = 0  # when `info` came, by the server's clock; 0: the worker's version does not tell
    drain_requested_by: str = ""  # the operator who has asked it to drain


@dataclass(frozen=True, slots=True)
class WaitingClass:
    """What waits in one priority class of a shard."""

    priority: int
    num_waiting: int
    oldest_ms: int | None  # since the oldest was accepted; None when nothing waits
    expected_wait_ms: int | None  # of the last in line, as in Enqueued; None when nothing waits, or nobody knows


@dataclass(frozen=True, slots=True)
class WaitingTenant:
    """What waits of one tenant in one priority class of a shard."""

    priority: int
    tenant: str
    num_waiting: int
    oldest_ms: int  # since the oldest was accepted


@dataclass(frozen=True, slots=True)
class QueueShape:
    """What waits in a shard, what runs, and what failed, at one moment."""

    time_ms: int  # the server's clock
    classes: tuple[WaitingClass, ...]  # every class, by priority
    tenants: tuple[WaitingTenant, ...]  # by priority; no more than were asked for
    has_more_tenants: bool  # not all were looked at: `tenants` and the oldest ages may lack some
    num_running: int
    num_dead_letters: int

    @property
    def num_waiting(self) -> int:
        return sum(one.num_waiting for one in self.classes)

    @property
    def expected_wait_ms(self) -> int | None:
        """Of the last in line of all classes; None when nothing waits, or nobody knows."""
        return max((one.expected_wait_ms for one in self.classes if one.expected_wait_ms is not None), default=None)
