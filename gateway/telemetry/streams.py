"""What callers feel of their streams: the time to the first token, and between tokens, as passed on here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram

from common.telemetry import buckets


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
        # A look-up by labels costs more than counting.
        self._of_model: dict[tuple[str, Opening], tuple[Counter, Histogram, Histogram]] = {}
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
        found = self._of_model.get((model, kind))
        if found is None:
            found = self._of_model[model, kind] = (
                self.opened.labels(model, kind.value),
                self.first_token.labels(model),
                self.token_gap.labels(model),
            )
        opened, first_token, token_gap = found
        opened.inc()
        is_timed = kind is Opening.NEW and began_at is not None
        return StreamWatch(self.clock, first_token, token_gap, began_at if is_timed else None)


class StreamWatch:
    """One stream. What is replayed or waited for by nobody is not timed."""

    __slots__ = ("_began_at", "_clock", "_first_token", "_last_at", "_token_gap")

    def __init__(
        self, clock: Callable[[], float], first_token: Histogram, token_gap: Histogram, began_at: float | None
    ) -> None:
        self._clock = clock
        self._first_token = first_token
        self._token_gap = token_gap
        self._began_at = began_at
        self._last_at: float | None = None

    def passed(self, num_tokens: int) -> None:
        """A message with so many tokens is on its way to the caller. To be called in an event loop."""
        if self._began_at is None or not num_tokens:
            return
        now = self._clock()
        if self._last_at is None:  # counted once the message is gone: it waits for whatever is done before
            asyncio.get_running_loop().call_soon(self._first_token.observe, now - self._began_at)
        else:
            self._token_gap.observe((now - self._last_at) / num_tokens)
        self._last_at = now
