"""Calls counted and timed. Names and labels of gRPC's as in the go-grpc-prometheus family, which dashboards know."""

from __future__ import annotations

from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram

from common.telemetry.labels import BoundedLabel
from gateway.identity.caller import Caller

CALL_BUCKETS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1200,
)  # fmt: skip

UNARY: Final = "unary"
SERVER_STREAM: Final = "server_stream"
CLIENT_STREAM: Final = "client_stream"


class CallMeter(Protocol):
    """Is told of each call. `method` is gRPC's full name, `/package.Service/Method`, `kind` one of the above."""

    def began(self, method: str, kind: str) -> None: ...

    def sent(self, method: str, kind: str) -> None:
        """A message of a stream has gone out."""
        ...

    def ended(
        self, method: str, kind: str, caller: Caller | None, status: str, reason: str, duration_s: float
    ) -> None: ...


class NoMeter:
    """Counts nothing."""

    def began(self, method: str, kind: str) -> None:
        pass

    def sent(self, method: str, kind: str) -> None:
        pass

    def ended(self, method: str, kind: str, caller: Caller | None, status: str, reason: str, duration_s: float) -> None:
        pass


class TenantCalls:
    """Calls by tenant and status, whatever door they came by."""

    def __init__(self, registry: CollectorRegistry, max_tenants: int) -> None:
        self._label = BoundedLabel(max_tenants)
        self._calls = Counter(
            "torchrelay_tenant_calls", "Calls of each tenant.", ["tenant", "grpc_code"], registry=registry
        )

    def count(self, caller: Caller | None, status: str) -> None:
        if caller is not None and caller.tenant:
            self._calls.labels(self._label(caller.tenant), status).inc()


class GrpcMeter:
    """Calls by gRPC, of both ports."""

    def __init__(self, registry: CollectorRegistry, tenants: TenantCalls) -> None:
        labels = ["grpc_type", "grpc_service", "grpc_method"]
        self._tenants = tenants
        self._started = Counter("grpc_server_started", "Calls begun.", labels, registry=registry)
        self._handled = Counter("grpc_server_handled", "Calls ended.", [*labels, "grpc_code"], registry=registry)
        self._sent = Counter("grpc_server_msg_sent", "Messages sent in streams.", labels, registry=registry)
        # By method: a look-up by labels costs more than counting.
        self._started_by: dict[str, Counter] = {}
        self._sent_by: dict[str, Counter] = {}
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "From a call's arrival to its end.",
            labels,
            buckets=CALL_BUCKETS,
            registry=registry,
        )
        self._errors = Counter(
            "torchrelay_call_errors",
            "Calls that did not end with OK, by the reason in their ErrorInfo.",
            ["grpc_service", "grpc_method", "grpc_code", "reason"],
            registry=registry,
        )

    def began(self, method: str, kind: str) -> None:
        counter = self._started_by.get(method)
        if counter is None:
            counter = self._started_by[method] = self._started.labels(kind, *_names(method))
        counter.inc()

    def sent(self, method: str, kind: str) -> None:
        counter = self._sent_by.get(method)
        if counter is None:
            counter = self._sent_by[method] = self._sent.labels(kind, *_names(method))
        counter.inc()

    def ended(self, method: str, kind: str, caller: Caller | None, status: str, reason: str, duration_s: float) -> None:
        service, name = _names(method)
        self._handled.labels(kind, service, name, status).inc()
        self._seconds.labels(kind, service, name).observe(duration_s)
        self._tenants.count(caller, status)
        if status != "OK":
            self._errors.labels(service, name, status, reason).inc()


class OpenAiMeter:
    """Requests at OpenAI's door, by the method of gRPC that they come down to."""

    def __init__(self, registry: CollectorRegistry, tenants: TenantCalls) -> None:
        self._tenants = tenants
        self._requests = Counter(
            "torchrelay_openai_requests",
            "Requests at OpenAI's door that ended.",
            ["grpc_method", "grpc_code", "reason"],
            registry=registry,
        )
        self._seconds = Histogram(
            "torchrelay_openai_request_seconds",
            "From a request's arrival to its end.",
            ["grpc_method"],
            buckets=CALL_BUCKETS,
            registry=registry,
        )

    def began(self, method: str, kind: str) -> None:
        """They are counted where they end."""

    def sent(self, method: str, kind: str) -> None:
        """Chunks are not counted."""

    def ended(self, method: str, kind: str, caller: Caller | None, status: str, reason: str, duration_s: float) -> None:
        name = _names(method)[1]
        self._requests.labels(name, status, reason).inc()
        self._seconds.labels(name).observe(duration_s)
        self._tenants.count(caller, status)


def _names(method: str) -> tuple[str, str]:
    service, _, name = method.lstrip("/").partition("/")
    return service, name
