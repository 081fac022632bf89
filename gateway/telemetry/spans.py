"""A span for each call at the gateway, under the caller's own if it brings a traceparent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from common.telemetry import tracing
from common.telemetry.tracing import OWN, Tracing
from gateway.identity.caller import Caller, CallInfo

if TYPE_CHECKING:
    from opentelemetry.trace import Span

# What handlers note of a call for its record, by the attribute that it becomes.
_OF_NOTES: Final = {
    "generation_id": tracing.RESPONSE_ID,
    "model": tracing.REQUEST_MODEL,
    "prompt_tokens": tracing.INPUT_TOKENS,
    "max_tokens": tracing.MAX_TOKENS,
    "priority": f"{OWN}.priority",
    "num_outputs": f"{OWN}.num_outputs",
}
# By the end of a method's name; others are no operation on a model.
_OPERATIONS: Final = {
    "Generate": "text_completion",
    "StreamGenerate": "text_completion",
    "SubmitGeneration": "text_completion",
    "ResumeGeneration": "text_completion",
    "Embed": "embeddings",
}


class CallTracer(Protocol):
    """Is told of each call where it arrives and where it ends."""

    def begin(self, method: str, call: CallInfo) -> Any:
        """A call has arrived: what its jobs belong to is set for the task that serves it. Returns what `end` takes."""
        ...

    def end(
        self, span: Any, caller: Caller | None, notes: Mapping[str, str | int], status: str, reason: str
    ) -> None: ...


class PassingTracer:
    """Passes the caller's trace on to whoever computes, and tells nothing of its own."""

    def begin(self, method: str, call: CallInfo) -> Any:
        tracing.set_current_trace(_traceparent(call))

    def end(self, span: Any, caller: Caller | None, notes: Mapping[str, str | int], status: str, reason: str) -> None:
        pass


class SpanTracer:
    """Makes a server span of each call."""

    def __init__(self, spans: Tracing) -> None:
        self._spans = spans

    def begin(self, method: str, call: CallInfo) -> Span:
        from opentelemetry.trace import SpanKind

        service, _, name = method.lstrip("/").partition("/")
        attributes = {tracing.RPC_SYSTEM: "grpc", tracing.RPC_SERVICE: service, tracing.RPC_METHOD: name}
        if name in _OPERATIONS:
            attributes |= {tracing.OPERATION: _OPERATIONS[name], tracing.PROVIDER: OWN}
        span = self._spans.start(method.lstrip("/"), SpanKind.SERVER, _traceparent(call), attributes)
        tracing.set_current_trace(tracing.traceparent_of(span))
        return span

    def end(self, span: Any, caller: Caller | None, notes: Mapping[str, str | int], status: str, reason: str) -> None:
        from grpc import StatusCode
        from opentelemetry.trace import Status
        from opentelemetry.trace import StatusCode as SpanStatus

        for note, attribute in _OF_NOTES.items():
            if note in notes:
                span.set_attribute(attribute, notes[note])
        if caller is not None:
            span.set_attribute(f"{OWN}.tenant", caller.tenant)
        span.set_attribute(tracing.RPC_STATUS, StatusCode[status].value[0])
        if status != "OK":
            span.set_attribute(tracing.ERROR_TYPE, reason or status)
            span.set_status(Status(SpanStatus.ERROR))
        span.end()


def make_call_tracer(spans: Tracing | None) -> CallTracer:
    return PassingTracer() if spans is None else SpanTracer(spans)


def _traceparent(call: CallInfo) -> str:
    values = call.values(tracing.TRACEPARENT)
    return tracing.valid_traceparent(values[0]) if len(values) == 1 else ""
