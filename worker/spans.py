"""Spans of a worker: how long a generation waited, that it was claimed, and what was computed of it here."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.jobs import ClaimedJob, JobState, NewEvent, Swept
from common.telemetry import tracing
from common.telemetry.tracing import OWN, Tracing, claim_span_id, traceparent_of
from worker.engine.types import StepResult
from worker.metrics import kind_of

if TYPE_CHECKING:
    from opentelemetry.trace import Span


@dataclass(slots=True)
class _Running:
    span: Span
    has_tokens: bool = False
    finish_reasons: list[str] = field(default_factory=list)


class JobSpans:
    """A JobWatch that tells a collector."""

    def __init__(
        self, spans: Tracing, model: str, worker_id: str, wall_clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._spans = spans
        self._model = model
        self._worker_id = worker_id
        self._now_ns = wall_clock_ns
        self._running: dict[str, _Running] = {}

    def claimed(self, jobs: Iterable[ClaimedJob]) -> None:
        from opentelemetry.trace import SpanKind

        for job in jobs:
            now_ns = self._now_ns()
            common = self._attributes(job)
            if job.num_claims == 1:
                accepted_ns = now_ns - job.age_ms * 1_000_000
                waited = self._spans.start(
                    f"queue {self._model}", SpanKind.INTERNAL, job.body.trace, common, start_ns=accepted_ns
                )
                waited.end(now_ns)
            claim = self._spans.start(
                f"claim {self._model}",
                SpanKind.CONSUMER,
                job.body.trace,
                {**common, f"{OWN}.claim.kind": kind_of(job), f"{OWN}.claim.number": job.num_claims},
                span_id=claim_span_id(job.generation_id, job.num_claims),
                linked_span_ids=[claim_span_id(job.generation_id, job.num_claims - 1)] if job.num_claims > 1 else (),
            )
            claim.end()
            name = f"{common[tracing.OPERATION]} {self._model}"
            span = self._spans.start(name, SpanKind.INTERNAL, traceparent_of(claim), common)
            self._running[job.generation_id] = _Running(span)

    def stepped(self, result: StepResult) -> None:
        """Steps belong to many generations."""

    def tidied(self, *rounds: Swept) -> None:
        """Upkeep belongs to none."""

    def committed(self, events: Iterable[NewEvent], lost: Collection[str]) -> None:
        for event in events:
            running = self._running.get(event.generation_id)
            if running is None or event.generation_id in lost:
                continue
            for delta in event.body.deltas:
                if delta.token_ids and not running.has_tokens:
                    running.has_tokens = True
                    running.span.add_event("first token")
                if delta.finish_reason is not None:
                    running.finish_reasons.append(delta.finish_reason.value)
            if event.terminal is not None:
                del self._running[event.generation_id]
                self._end(running, event)

    def dropped(self, generation_id: str, reason: str) -> None:
        running = self._running.pop(generation_id, None)
        if running is not None:
            running.span.set_attribute(f"{OWN}.dropped", reason)
            running.span.end()

    def _end(self, running: _Running, event: NewEvent) -> None:
        from opentelemetry.trace import Status, StatusCode

        span = running.span
        span.set_attribute(tracing.OUTPUT_TOKENS, event.completion_tokens)
        span.set_attribute(f"{OWN}.cached_input_tokens", event.cached_prompt_tokens)
        if event.terminal is JobState.FAILED:
            span.set_attribute(tracing.ERROR_TYPE, str(event.reason))
            span.set_status(Status(StatusCode.ERROR))
        elif running.finish_reasons:
            span.set_attribute(tracing.FINISH_REASONS, running.finish_reasons)
        span.end()

    def _attributes(self, job: ClaimedJob) -> Mapping[str, str | int]:
        return {
            tracing.OPERATION: _operation(job),
            tracing.PROVIDER: OWN,
            tracing.REQUEST_MODEL: self._model,
            tracing.RESPONSE_ID: job.generation_id,
            tracing.INPUT_TOKENS: job.body.num_prompt_tokens,
            f"{OWN}.tenant": job.tenant,
            f"{OWN}.worker_id": self._worker_id,
        }


def _operation(job: ClaimedJob) -> str:
    task = job.body.task
    if task is None:
        return "chat" if job.body.chat is not None else "text_completion"
    tag = str(type(task).__struct_config__.tag)
    return "embeddings" if tag == "embed" else tag
