"""The worker's side of the queue: claim, commit, give back, heartbeat.

`JobClaims` knows where each held job's log stands (epoch, event number, chain hash), so that the caller only says what
is new. One commit is in flight at a time; one whose outcome is unknown is sent again, byte for byte, before anything
else.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import structlog

from common import keys, records
from common.chain import next_hash
from common.claim_pause import ClaimPause
from common.errors import SealBroken, ServingError
from common.generation import EventBody
from common.jobs import ClaimedJob, CommitResult, JobState, LostReason, NewEvent, Reason, Swept, WorkerInfo
from common.redis import Redis, Retry
from common.scripts import ScriptRunner, as_list
from common.sealing import PLAIN, GenerationSealer, Sealer
from common.settings import QueueSettings
from common.upkeep import Upkeep
from common.wire import Argument

log = structlog.get_logger()

_BELL_S: Final = 1  # backstop: a wake-up that was lost costs no more than this
_MAX_PAUSE_S: Final = 0.5
_ID_WIDTH: Final = 20  # of the run record, see scripts/lib_jobs.lua
_COUNTERS_WIDTH: Final = 40
_PARAMETERS_UNKNOWN: Final = "PARAMETERS_UNKNOWN"
# Another worker may open such a record, or know what it asks for.
_OWN_FAULT: Final = frozenset({"ENCRYPTION_KEY_MISSING", "NOT_SEALED", _PARAMETERS_UNKNOWN})


@dataclass(slots=True)
class _Held:
    """Where a held job's log stands, as far as this worker has committed it."""

    epoch: int
    sequence: int
    chain_hash: bytes
    log_bytes: int
    progress: bool
    sealer: GenerationSealer

    @property
    def record_id(self) -> str:
        return f"{self.epoch}-{self.sequence}".ljust(_ID_WIDTH)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A commit that has been sent: its arguments, and where the logs stand once it has taken effect."""

    args: tuple[Argument, ...]
    after: dict[str, _Held | None]  # None: the job has ended


class JobClaims:
    """One worker incarnation on one shard; `worker_id` is `keys.random_id()` of this process.

    Calls of several tasks take turns; only `heartbeat`, `reap`, `sweep` and the wait of `claim` run beside the others.
    Methods raise BackendUnavailable, BackendFull and BackendRefused (see `Retry`) besides what they name.
    """

    def __init__(
        self,
        redis: Redis,
        shard: str,
        worker_id: str,
        settings: QueueSettings,
        *,
        retry: Retry | None = None,
        scripts: ScriptRunner | None = None,
        sealer: Sealer = PLAIN,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._shard = keys.check_shard(shard)
        self._worker_id = keys.check_incarnation(worker_id)
        self._settings = settings
        self._retry = retry or Retry()
        self._scripts = scripts or ScriptRunner(redis)
        self._upkeep = Upkeep(self._run_on, settings)
        self._sealer = sealer
        self._held: dict[str, _Held] = {}
        self._pending: _Pending | None = None  # sent, outcome unknown
        self._backlog: deque[list[tuple[int, NewEvent]]] = deque()  # to be sent after it, each with its epoch
        self._unreported: dict[str, LostReason] = {}  # lost jobs found on the way, for the next commit's answer
        self._lock = asyncio.Lock()  # held by every change of `_held`
        self._num_changes = 0
        self._claim_call: str | None = None
        self._pause_s = 0.0
        self._pause = ClaimPause(monotonic)

    @property
    def worker_id(self) -> str:
        return self._worker_id

    @property
    def held(self) -> frozenset[str]:
        """The generations that this worker holds, as far as it knows."""
        return frozenset(self._held)

    @property
    def is_paused(self) -> bool:
        """Whether nothing is claimed for a while, since this worker could not open what it was given."""
        return self._pause.left_s > 0

    async def _run_on(self, name: str, shard: str, *args: Argument) -> Any:
        return await self._retry.call(lambda: self._scripts.run(name, keys.meta(shard), *args))

    async def _run(self, name: str, *args: Argument) -> Any:
        return await self._run_on(name, self._shard, self._worker_id, *args)

    async def claim(
        self, max_jobs: int, free_kv_tokens: int, total_kv_tokens: int, *, wait: bool = False
    ) -> list[ClaimedJob]:
        """Take jobs that fit into `free_kv_tokens` now, and could never need more than `total_kv_tokens`.

        When the reply is lost for good (BackendUnavailable), the next call gets the same jobs. `events` of a job that
        another worker began holds its log; `remaining_ms` is the time to its deadline. A job that this worker still
        computes may be among them, at a higher epoch: it was lost meanwhile, and begins anew from its log. Jobs that
        this worker cannot open for a fault of its own go back, and nothing is claimed for a while (`is_paused`).

        With `wait`, for an idle worker, it waits for the bell before: until a job may be there, or at most a second.
        When the last claim found only jobs that this worker cannot take, the bell rings at once; so it pauses first,
        longer each time up to half a second. While claiming is paused, the bell is left to other workers.
        """
        if wait and (pause_s := max(self._pause_s, self._pause.left_s)):
            await asyncio.sleep(pause_s)
        async with self._lock:
            await self._flush()
            if self.is_paused:
                return []
            arguments = self._claim_arguments(max_jobs, free_kv_tokens, total_kv_tokens)
            if not wait:
                return await self._claimed(await self._run("claim", *arguments))
        # Others need not wait as long. A heartbeat or a commit may find what the server has handed out before the reply
        # is read: then `owned` adopts it, and what follows here does not adopt it again.
        reply = await self._run_when_rung("claim", *arguments)
        async with self._lock:
            await self._flush()
            return await self._claimed(reply)

    def _claim_arguments(self, max_jobs: int, free_kv_tokens: int, total_kv_tokens: int) -> tuple[Argument, ...]:
        settings = self._settings
        self._claim_call = self._claim_call or keys.random_id()
        return (
            self._claim_call,
            settings.worker_lease_ms,
            max_jobs,
            free_kv_tokens,
            total_kv_tokens,
            settings.max_claim_bytes,
            settings.deadline_slack_ms,
            settings.expected_completion_tokens,
            settings.bypass_kv_tokens,
            settings.priority_floor,
        )

    async def _run_when_rung(self, name: str, *args: Argument) -> Any:
        """Run a script once the bell has rung. Only the first try waits: that of a lost reply may have been rung."""
        bell, key = keys.bell(self._shard), keys.meta(self._shard)
        tries = 0

        async def one_try() -> Any:
            nonlocal tries
            tries += 1
            if tries > 1:
                return await self._scripts.run(name, key, self._worker_id, *args)
            wait = ("BLPOP", bell, _BELL_S)
            return await self._scripts.run_after(self._redis, wait, name, key, self._worker_id, *args)

        return await self._retry.call(one_try)

    async def _claimed(self, reply: Any) -> list[ClaimedJob]:
        self._claim_call = None
        found, *queued = as_list(reply)
        jobs = await self._adopt(found)
        self._pause_s = min(_MAX_PAUSE_S, self._pause_s * 2 or 0.01) if not jobs and any(queued) else 0.0
        return jobs

    async def owned(self, max_jobs: int = 1024) -> list[ClaimedJob]:
        """Adopt jobs that the server counts as ours but that we do not hold, after a lost reply.

        To be called when a commit says `has_unknown_jobs`, and after BackendUnavailable.
        """
        async with self._lock:
            await self._flush()
            found = await self._run("owned", max_jobs, self._settings.max_claim_bytes, *self._held)
            return await self._adopt(as_list(found))

    async def _adopt(self, found: Iterable[Sequence[Any]]) -> list[ClaimedJob]:
        """Hold what the server says is ours, and return what can be computed of it.

        A job that cannot be read ends as failed: it would come back to worker after worker. As a dead letter it can be
        sent again once it can be read. Where this worker lacks the key, or takes no plain records, or does not know a
        parameter that is in force, the job goes back.
        """
        jobs: list[ClaimedJob] = []
        unreadable: list[tuple[int, NewEvent]] = []
        unopened: list[Argument] = []  # id, epoch, id, epoch ...
        fault = ""
        self._num_changes += 1
        for reply in found:
            head = records.claim_head(reply)
            known = self._held.get(head.generation_id)
            if known is not None and known.epoch >= head.epoch:
                continue
            sealer = self._sealer.of(head.tenant, head.generation_id)
            reason, job = "MALFORMED", None
            try:
                job = records.job_from_reply(reply, sealer)
            except SealBroken as error:
                reason = error.reason
            except records.UnknownParameters as error:
                reason = _PARAMETERS_UNKNOWN
                log.error("job.parameters_unknown", generation_id=head.generation_id, parameters=str(error))
            except msgspec.DecodeError:
                pass
            if job is None and reason in _OWN_FAULT:
                # Not held: what was computed of it at an older epoch, the next commit's answer calls lost.
                fault = reason
                unopened += (head.generation_id, head.epoch)
                continue
            self._held[head.generation_id] = _Held(
                head.epoch, head.sequence, head.chain_hash, head.log_bytes, head.progress, sealer
            )
            self._unreported.pop(head.generation_id, None)
            if job is not None:
                jobs.append(job)
                continue
            log.error("job.unreadable", generation_id=head.generation_id, reason=reason)
            failed = NewEvent(
                generation_id=head.generation_id,
                body=EventBody(),
                completion_tokens=head.completion_tokens,
                terminal=JobState.FAILED,
                reason=Reason.WORKER_FAILED,
            )
            unreadable.append((head.epoch, failed))
        if unopened:
            log.error("claims.paused", reason=fault, jobs=len(unopened) // 2, pause_s=self._pause.begin())
            with contextlib.suppress(ServingError):  # then they are found again as jobs that are counted as ours
                await self._run("release", 0, *unopened)
        elif jobs:
            self._pause.succeeded()
        if unreadable:
            self._pending = self._prepare(unreadable)
            with contextlib.suppress(ServingError):  # it stays pending then, and the readable ones are still to be done
                await self._send(self._pending)
        return jobs

    async def commit(self, events: Sequence[NewEvent] = ()) -> CommitResult:
        """Append one event to each of some held jobs, renew the lease, and learn which held jobs were lost.

        At most one event for each generation; events of jobs not held any more are dropped. Raises BackendUnavailable
        when the outcome stays unknown: all events passed so far are then kept and sent first by the next call, so do
        not pass them again. Lost and ended jobs are held no longer afterwards.
        """
        # With the epoch of now: a job that is lost and claimed again before these are sent begins anew from its log.
        held = self._held
        self._backlog.append(
            [(held[event.generation_id].epoch, event) for event in events if event.generation_id in held]
        )
        async with self._lock:
            result = await self._flush()
            while self._backlog:
                self._pending = self._prepare(self._backlog.popleft())
                result = await self._send(self._pending)
            lost, self._unreported = self._unreported, {}
        return CommitResult(lost, result.queued, result.has_unknown_jobs)

    def _prepare(self, events: Iterable[tuple[int, NewEvent]]) -> _Pending:
        after: dict[str, _Held | None] = {}
        appended: list[Argument] = []
        ended: list[Argument] = []
        num_events = 0
        for epoch, event in events:
            generation_id = event.generation_id
            held = self._held.get(generation_id)
            if held is None or held.epoch != epoch:
                continue
            if generation_id in after:
                raise ValueError("one event of a generation in one commit")
            state, reason, body = event.terminal, event.reason, event.body
            new_hash = next_hash(held.chain_hash, body.deltas)
            sequence = held.sequence + 1
            entry = records.encode_entry(new_hash, held.epoch, sequence, body, held.sealer)
            log_bytes = held.log_bytes + len(entry)
            if log_bytes > self._settings.max_log_bytes:
                state, reason, body, new_hash = JobState.FAILED, Reason.LOG_LIMIT, EventBody(), held.chain_hash
                entry = records.encode_entry(new_hash, held.epoch, sequence, body, held.sealer)
            progress = held.progress or event.progress
            new = _Held(held.epoch, sequence, new_hash, log_bytes, progress, held.sealer)
            entry_id = f"{held.epoch}-{sequence}"
            counters = f"{event.completion_tokens} {event.cached_prompt_tokens} {log_bytes} {int(progress)}"
            record = entry_id.ljust(_ID_WIDTH) + counters.ljust(_COUNTERS_WIDTH)
            if state is None:
                num_events += 1
                after[generation_id] = new
                appended += (generation_id, entry_id, held.record_id, record, entry)
            else:
                if state not in (JobState.DONE, JobState.FAILED):
                    raise ValueError("a worker ends a generation as DONE or FAILED")
                after[generation_id] = None
                ended += (generation_id, entry_id, held.record_id, record, entry, state.value, reason.value)
        rest = [part for name, held in self._held.items() if name not in after for part in (name, f"{held.epoch}-")]
        num_ended = len(after) - num_events
        lease_ms = self._settings.worker_lease_ms
        return _Pending((lease_ms, num_events, num_ended, *appended, *ended, *rest), after)

    async def _flush(self) -> CommitResult:
        """Send the commit whose outcome is unknown, if there is one."""
        return CommitResult() if self._pending is None else await self._send(self._pending)

    async def _send(self, pending: _Pending) -> CommitResult:
        """Send a commit and record what it did; it stays pending if this raises."""
        result = records.commit_from_reply(as_list(await self._run("commit", *pending.args)))
        self._pending = None
        self._num_changes += 1
        for generation_id, held in pending.after.items():
            if held is None:
                self._held.pop(generation_id, None)
            elif generation_id in self._held:  # else a heartbeat has found it lost meanwhile
                self._held[generation_id] = held
        for generation_id in result.lost:
            self._held.pop(generation_id, None)
        self._unreported.update(result.lost)
        return result

    async def release(self, generation_ids: Iterable[str]) -> int:
        """Give held jobs back to the head of their queue; no attempt is counted. Returns how many were still ours."""
        return await self._give_back("release", self._settings.max_claims, generation_ids)

    async def preempt(self, generation_ids: Iterable[str], max_preemptions: int) -> int:
        """As `release`, to make room for a higher class: neither an attempt nor a claim is counted.

        Jobs that were preempted so often already, or handed out by their class's share, stay ours on the server: they
        are found again as jobs that it counts as ours (see `owned`).
        """
        return await self._give_back("preempt", max_preemptions, generation_ids)

    async def _give_back(self, script: str, limit: int, generation_ids: Iterable[str]) -> int:
        async with self._lock:
            await self._flush()
            given = [name for name in generation_ids if name in self._held]
            if not given:
                return 0
            pairs = [part for name in given for part in (name, self._held[name].epoch)]
            count = int(await self._run(script, limit, *pairs))
            self._num_changes += 1
            for name in given:
                self._held.pop(name, None)
            return count

    async def wanted(self, total_kv_tokens: int) -> int:
        """KV slots to begin the first waiting job of the highest class that such a worker could hold; 0: none."""
        return int(await self._run_on("wanted", self._shard, total_kv_tokens))

    async def heartbeat(self, info: WorkerInfo) -> CommitResult:
        """Renew the lease without a step, publish `info`, learn which held jobs were lost. Every fifth of a lease."""
        num_changes = self._num_changes
        epochs = {name: held.epoch for name, held in self._held.items()}
        pairs = [part for name, epoch in epochs.items() for part in (name, f"{epoch}-")]
        packed = msgspec.msgpack.encode(info)
        reply = await self._run("beat_worker", self._settings.worker_lease_ms, packed, *pairs)
        result = records.commit_from_reply(as_list(reply))
        lost = {}
        for generation_id, reason in result.lost.items():
            held = self._held.get(generation_id)
            if held is not None and held.epoch == epochs[generation_id]:  # not ended or claimed anew meanwhile
                lost[generation_id] = reason
                del self._held[generation_id]
        is_quiet = num_changes == self._num_changes and not self._lock.locked()
        has_unknown_jobs = result.has_unknown_jobs and is_quiet
        return CommitResult(lost, result.queued, has_unknown_jobs, result.drain_requested_by)

    async def reap(self) -> Swept:
        """Requeue the jobs of workers whose lease ended. Idle workers run it each second, as gateways do."""
        return await self._upkeep.reap(self._shard)

    async def sweep(self) -> Swept:
        """End expired and abandoned jobs. Idle workers run it each second, as gateways do."""
        return await self._upkeep.sweep(self._shard)

    async def leave(self) -> int:
        """Go for good, after `release`. Returns how many jobs were left behind: the next reap takes them at once."""
        return int(await self._run("leave"))
