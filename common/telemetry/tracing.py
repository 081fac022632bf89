"""Spans to an OpenTelemetry collector, where one is set; and the trace context that travels with each job.

One trace holds a generation from its caller's span on: the call at the gateway, the wait in the queue, each claim by a
worker, and what was computed under it. A claim is a span of its own that ends at once, so that it is told even of a
worker that is killed a moment later; a takeover's links to the claim before it, whose id both workers derive from the
generation. No span holds text of a caller or a model.

Names of attributes are OpenTelemetry's for generative models (status: development, so they stand here alone) and for
RPC.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, TypeAlias

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanKind

Attributes: TypeAlias = Mapping[str, str | int | float | bool | Sequence[str]]

OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
MAX_TOKENS: Final = "gen_ai.request.max_tokens"
RESPONSE_ID: Final = "gen_ai.response.id"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
ERROR_TYPE: Final = "error.type"
RPC_SYSTEM: Final = "rpc.system"
RPC_SERVICE: Final = "rpc.service"
RPC_METHOD: Final = "rpc.method"
RPC_STATUS: Final = "rpc.grpc.status_code"
OWN: Final = "torchrelay"  # prefix of attributes that nobody else has

TRACEPARENT: Final = "traceparent"
_TRACEPARENT: Final = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
_EXPORT_S: Final = 5
_DELAY_MS: Final = 500  # until a span goes out: what ended before a worker was killed is to be told

# Of the call that is being served, as a traceparent (W3C Trace Context, level 1); empty: it has none.
_CURRENT: ContextVar[str] = ContextVar("torchrelay_trace", default="")


class TracingSettings(BaseSettings):
    """Where spans go, from TORCHRELAY_TRACING_* variables."""

    model_config = SettingsConfigDict(env_prefix="TORCHRELAY_TRACING_", frozen=True)
    endpoint: str = Field(
        default="", description="OTLP over gRPC, http://host:4317 or https://; empty: no spans, traces pass through."
    )
    sample_ratio: float = Field(
        default=1.0, ge=0, le=1, description="Part of the traces that begin here; a caller's own trace says for itself."
    )


def current_trace() -> str:
    """Return the trace context of the call that is being served, to be stored with its job; empty without one."""
    return _CURRENT.get()


def set_current_trace(traceparent: str) -> None:
    """Every job that the call makes belongs to this trace."""
    _CURRENT.set(traceparent)


def valid_traceparent(value: str) -> str:
    """Return a traceparent of the version that is known here, or nothing: a caller's may be anything."""
    return value if _TRACEPARENT.fullmatch(value) else ""


def claim_span_id(generation_id: str, num_claims: int) -> int:
    """Return the id of the span of a generation's n-th claim: equal wherever it is asked for, never 0."""
    digest = hashlib.sha256(f"{generation_id} {num_claims}".encode()).digest()
    return int.from_bytes(digest[:8], "big") or 1


class Tracing:
    """Starts spans of one process. For one thread at a time."""

    def __init__(self, provider: TracerProvider, ids: ChosenIds) -> None:
        self._provider = provider
        self._ids = ids
        self._tracer = provider.get_tracer("torchrelay")

    def start(
        self,
        name: str,
        kind: SpanKind,
        parent: str,
        attributes: Attributes,
        *,
        start_ns: int | None = None,
        span_id: int | None = None,
        linked_span_ids: Sequence[int] = (),
    ) -> Span:
        """Start a span under a traceparent, a new trace without; links are to spans of the same trace.

        `start_ns` is since the epoch, by default now.
        """
        from opentelemetry import trace

        context, links = None, []
        if found := _TRACEPARENT.fullmatch(parent):
            trace_id, flags = int(found[1], 16), trace.TraceFlags(int(found[3], 16))
            above = trace.SpanContext(trace_id, int(found[2], 16), is_remote=True, trace_flags=flags)
            context = trace.set_span_in_context(trace.NonRecordingSpan(above))
            links = [
                trace.Link(trace.SpanContext(trace_id, other, is_remote=True, trace_flags=flags))
                for other in linked_span_ids
            ]
        self._ids.next_span_id = span_id
        try:
            return self._tracer.start_span(
                name, context=context, kind=kind, attributes=attributes, links=links, start_time=start_ns
            )
        finally:
            self._ids.next_span_id = None

    def close(self) -> None:
        """Send what is left, for some seconds at most. Blocks."""
        self._provider.force_flush(_EXPORT_S * 1000)
        self._provider.shutdown()


def traceparent_of(span: Span) -> str:
    """Return a span's context, for what happens under it elsewhere."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def make_tracing(settings: TracingSettings, role: str, attributes: Attributes) -> Tracing | None:
    """Return what starts spans of a process of this role; None where no endpoint is set.

    Raises ValueError where the packages are missing. A collector that does not answer costs spans and nothing else.
    """
    if not settings.endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError:
        raise ValueError(
            "TORCHRELAY_TRACING_ENDPOINT is set, but OpenTelemetry is not installed: pip install 'torchrelay[otel]'"
        ) from None
    ids = make_ids()
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
        resource=Resource.create(
            {"service.name": f"torchrelay-{role}", "service.namespace": "torchrelay", **attributes}
        ),
        id_generator=ids,  # type: ignore[arg-type]  # made in a function, since its base may not be installed
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(
        endpoint=settings.endpoint, insecure=settings.endpoint.startswith("http://"), timeout=_EXPORT_S
    )
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_DELAY_MS))
    return Tracing(provider, ids)


class ChosenIds:
    """Draws ids of traces and spans, but for a span whose id is chosen beforehand."""

    next_span_id: int | None = None


def make_ids() -> ChosenIds:
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class Ids(ChosenIds, RandomIdGenerator):
        def generate_span_id(self) -> int:
            return self.next_span_id or super().generate_span_id()

    return Ids()
