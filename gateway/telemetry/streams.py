"""What callers feel of their streams: the time to the first token, and between tokens, as they leave this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram

from common.telemetry import buckets
from torchrelay.v1 import generation_pb2 as pb


class Opening(StrEnum):
    """How a stream came about."""

    NEW = "new"
    REPEATED = "repeated"  # by the idempotency key of an earlier call
    RESUMED = "resumed"


class StreamMetrics:
    """Streams of one gateway. Without a registry nothing is exported."""

    def __init__(self, registry: CollectorRegistry | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        labels = ["model_name"]
        self.opened = Counter(
            "torchrelay_streams_opened",
            "Streams opened: new, repeated by an idempotency key, or resumed.",
            ["model_name", "kind"],
            registry=registry,
        )
        self.first_token = Histogram(
            "torchrelay_gateway_time_to_first_token_seconds",
            "From a call's arrival at this gateway to its first token.",
            labels,
            buckets=buckets.FIRST_TOKEN,
            registry=registry,
        )
        self.token_gap = Histogram(
            "torchrelay_gateway_inter_token_latency_seconds",
            "Between two messages of a stream, per token of the second.",
            labels,
            buckets=buckets.TOKEN,
            registry=registry,
        )

    def watch(self, model: str, kind: Opening, began_at: float | None) -> StreamWatch:
        """Watch a stream of a model; `began_at` is when its call arrived, by `clock`, None if nobody waits for it."""
        self.opened.labels(model, kind.value).inc()
        is_timed = kind is Opening.NEW and began_at is not None
        return StreamWatch(self, model, began_at if is_timed else None)


class StreamWatch:
    """One stream. What is replayed or waited for by nobody is not timed."""

    __slots__ = ("_began_at", "_last_at", "_metrics", "_model")

    def __init__(self, metrics: StreamMetrics, model: str, began_at: float | None) -> None:
        self._metrics = metrics
        self._model = model
        self._began_at = began_at
        self._last_at: float | None = None

    def saw(self, event: pb.GenerationEvent) -> None:
        """An event goes out."""
        if self._began_at is None or not event.HasField("deltas"):
            return
        num_tokens = sum(len(delta.token_ids) for delta in event.deltas.deltas)
        if not num_tokens:
            return
        now = self._metrics.clock()
        if self._last_at is None:
            self._metrics.first_token.labels(self._model).observe(now - self._began_at)
        else:
            self._metrics.token_gap.labels(self._model).observe((now - self._last_at) / num_tokens)
        self._last_at = now
