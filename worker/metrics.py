"""What a worker measures of the generations that it computes, for Prometheus. Names after vLLM's, with our prefix.

Every generation is counted where it ends, once: a takeover's first worker has counted its claim, not its end. Times to
the first token and to the end begin when the generation was accepted, by the server's clock up to the claim and by this
process's monotonic clock from there on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

from common.generation import EventBody, FinishReason
from common.jobs import ClaimedJob, JobState, NewEvent, Swept
from common.telemetry import buckets
from common.telemetry.labels import BoundedLabel
from common.telemetry.upkeep import UpkeepCounters
from worker.engine.types import StepResult

_SIZE_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_STEP_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 5.12)

_RECENT: Final = 512
_RECENT_S: Final = 60.0


@dataclass(slots=True)
class _Times:
    """Of one held generation; monotonic seconds."""

    read: Counter  # its tenant's counters of tokens read and generated
    generated: Counter
    accepted_at: float
    claimed_at: float
    prompt_tokens: int
    is_first: bool  # nobody has computed it before
    is_task: bool
    first_token_at: float | None = None
    last_token_at: float | None = None
    finish_reason: FinishReason | None = None


class WorkerMetrics:
    """Counters and histograms of one worker, and recent times for its heartbeat. Used from one event loop."""

    def __init__(
        self,
        registry: CollectorRegistry,
        model_name: str,
        max_tenants: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._tenant = BoundedLabel(max_tenants)
        self._held: dict[str, _Times] = {}
        self._model = model_name
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT)  # when a first token came, and after how long
        self._busy_s = 0.0
        self._busy_before = (clock(), 0.0)

        def histogram(name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
            made = Histogram(f"torchrelay_{name}", text, ["model_name"], registry=registry, buckets=bounds)
            return made.labels(model_name)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"torchrelay_{name}", text, ["model_name", *labels], registry=registry)

        self._queue_time = histogram(
            "request_queue_time_seconds", "From acceptance to the first claim by a worker.", buckets.REQUEST
        )
        self._first_token = histogram(
            "time_to_first_token_seconds", "From acceptance to the first stored token.", buckets.FIRST_TOKEN
        )
        self._token_gap = histogram(
            "inter_token_latency_seconds", "Between stored tokens of one generation, per token.", buckets.TOKEN
        )
        self._prefill = histogram(
            "request_prefill_time_seconds", "From the claim to the first stored token.", buckets.FIRST_TOKEN
        )
        self._decode = histogram("request_decode_time_seconds", "From the first token to the end.", buckets.REQUEST)
        self._total = histogram("e2e_request_latency_seconds", "From acceptance to the end.", buckets.REQUEST)
        self._prompt_size = histogram(
            "request_prompt_tokens", "Tokens of the prompts of ended requests.", _SIZE_BUCKETS
        )
        self._answer_size = histogram(
            "request_generation_tokens", "Tokens of the answers of ended ones.", _SIZE_BUCKETS
        )
        self._step_time = histogram("step_duration_seconds", "Time of one engine step.", _STEP_BUCKETS)
        self._step_tokens = histogram("iteration_tokens", "Tokens computed in one engine step.", _SIZE_BUCKETS)
        self._batch = histogram("step_batch_size", "Sequences in one engine step.", _SIZE_BUCKETS)
        self._busy = counter("engine_busy_seconds", "Time that the engine spent in steps.").labels(model_name)
        self._succeeded = counter("request_success", "Generations that ended well here.", "finished_reason")
        self._failed = counter("request_failure", "Generations that failed here.", "reason")
        self._upkeep = UpkeepCounters(registry)
        claims = counter("claims", "Generations taken from the queue: first, takeover, or after a preemption.", "kind")
        self._dropped = counter("jobs_dropped", "Generations given up before their end, by reason.", "reason")
        self._tenant_tokens = counter("tenant_tokens", "Tokens read and generated for each tenant.", "tenant", "kind")
        # A look-up by labels costs as much as counting.
        self._claims_by = {kind: claims.labels(model_name, kind) for kind in ("first", "takeover", "preempted")}
        self._tokens_by: dict[str, tuple[Counter, Counter]] = {}  # tenants' as read and as generated

    # -- as a JobWatch -------------------------------------------------------------------------------------------------

    def claimed(self, jobs: Iterable[ClaimedJob]) -> None:
        now = self._clock()
        for job in jobs:
            self._claims_by[kind_of(job)].inc()
            is_first = job.num_claims == 1
            if is_first:
                self._queue_time.observe(job.age_ms / 1000)
            read, generated = self._tokens_of(job.tenant)
            self._held[job.generation_id] = _Times(
                read=read,
                generated=generated,
                accepted_at=now - job.age_ms / 1000,
                claimed_at=now,
                prompt_tokens=job.body.num_prompt_tokens,
                is_first=is_first,
                is_task=job.body.task is not None,
            )

    def stepped(self, result: StepResult) -> None:
        self._step_time.observe(result.duration_s)
        self._busy.inc(result.duration_s)
        self._busy_s += result.duration_s
        if result.num_sequences:
            self._step_tokens.observe(result.num_tokens)
            self._batch.observe(result.num_sequences)

    def committed(self, events: Iterable[NewEvent], lost: Collection[str]) -> None:
        now = self._clock()
        for event in events:
            times = self._held.get(event.generation_id)
            if times is None or event.generation_id in lost:
                continue
            self._note_tokens(times, event.body, now)
            if event.terminal is not None:
                del self._held[event.generation_id]
                self._note_end(times, event, now)

    def dropped(self, generation_id: str, reason: str) -> None:
        if self._held.pop(generation_id, None) is not None:
            self._dropped.labels(self._model, reason).inc()

    def tidied(self, *rounds: Swept) -> None:
        self._upkeep.count(self._model, *rounds)

    # -- what is observed -----------------------------------------------------------------------------------------

    def _note_tokens(self, times: _Times, body: EventBody, now: float) -> None:
        num_tokens = 0
        for delta in body.deltas:
            num_tokens += len(delta.token_ids)
            times.finish_reason = delta.finish_reason or times.finish_reason
        if not num_tokens:
            return
        if times.first_token_at is None:
            times.first_token_at = now
            self._prefill.observe(now - times.claimed_at)
            if times.is_first:
                self._first_token.observe(now - times.accepted_at)
                self._recent.append((now, now - times.accepted_at))
                times.read.inc(times.prompt_tokens)
        elif times.last_token_at is not None:
            self._token_gap.observe((now - times.last_token_at) / num_tokens)
        times.last_token_at = now
        times.generated.inc(num_tokens)

    def _note_end(self, times: _Times, event: NewEvent, now: float) -> None:
        if event.terminal is JobState.FAILED:
            self._failed.labels(self._model, str(event.reason) or "OTHER").inc()
            return
        reason = "done" if times.finish_reason is None else times.finish_reason.value
        self._succeeded.labels(self._model, reason).inc()
        self._total.observe(now - times.accepted_at)
        self._prompt_size.observe(times.prompt_tokens)
        if times.is_task:
            times.read.inc(times.prompt_tokens)
            return
        self._answer_size.observe(event.completion_tokens)
        if times.first_token_at is not None:
            self._decode.observe(now - times.first_token_at)

    def _tokens_of(self, tenant: str) -> tuple[Counter, Counter]:
        label = self._tenant(tenant)
        found = self._tokens_by.get(label)
        if found is None:
            of_tenant = [self._tenant_tokens.labels(self._model, label, kind) for kind in ("prompt", "generation")]
            found = self._tokens_by[label] = (of_tenant[0], of_tenant[1])
        return found

    # -- for the heartbeat ----------------------------------------------------------------------------------------

    def busy_ratio(self) -> float:
        """Return which part of the time since the last call the engine spent in steps."""
        (at, busy_s), now = self._busy_before, self._clock()
        self._busy_before = (now, self._busy_s)
        return min(1.0, (self._busy_s - busy_s) / (now - at)) if now > at else 0.0

    def recent_first_tokens(self) -> dict[str, float]:
        """Return median and 95th percentile, in ms, of the times to first tokens of the last minute; empty without."""
        since = self._clock() - _RECENT_S
        values = sorted(took for at, took in self._recent if at >= since)
        if not values:
            return {}
        return {
            f"ttft_p{percent}_ms": values[max(0, -(-len(values) * percent // 100) - 1)] * 1000 for percent in (50, 95)
        }


def kind_of(job: ClaimedJob) -> str:
    """Return whether a claim is the first, a takeover, or follows a preemption: every earlier one ended so."""
    if job.num_claims == 1:
        return "first"
    return "preempted" if job.num_preemptions >= job.num_claims - 1 else "takeover"
