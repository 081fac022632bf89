"""What a level of load measured, request by request, and the figures that follow. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrelay.cli.bench.slo import Slo
from torchrelay.cli.bench.statistics import percentile, percentiles

# Beyond these the load generator is taken for what is measured, rather than the service.
_MOST_CPU_SHARE = 0.85
_MOST_LAG_S = 0.010
_MOST_LAG_OF_TTFT = 0.05


@dataclass(slots=True)
class Sample:
    """One request that ended well. Times are in seconds; latencies count from when it was to be sent."""

    intended_s: float  # from the beginning of the level
    lag_s: float  # how much later it was really sent
    first_token_s: float
    total_s: float
    first_tokens: int  # that came with the first message
    messages: list[tuple[float, int]]  # of each further message: time since the one before, and its tokens
    input_tokens: int = 0
    cached_input_tokens: int = 0
    queue_s: float | None = None  # by the server's clock
    num_resumes: int = 0
    num_takeovers: int = 0

    @property
    def num_tokens(self) -> int:
        return self.first_tokens + sum(tokens for _, tokens in self.messages)

    @property
    def tpot_s(self) -> float | None:
        """The mean time between two tokens; None with fewer than two."""
        others = self.num_tokens - 1
        return sum(gap for gap, _ in self.messages) / others if others > 0 else None

    def token_gaps(self) -> Iterator[float]:
        """Yield a time for each token behind those of the first message.

        Tokens that came in one message share its time evenly: what a message of four tokens took is counted four times
        as a quarter, not once as a long gap and three times as none.
        """
        for gap, tokens in self.messages:
            for _ in range(tokens):
                yield gap / tokens

    def arrivals(self) -> Iterator[tuple[float, int]]:
        """Yield when tokens came, from the beginning of the level, and how many."""
        at = self.intended_s + self.first_token_s
        yield at, self.first_tokens
        for gap, tokens in self.messages:
            at += gap
            yield at, tokens


@dataclass(frozen=True, slots=True)
class Failure:
    """One request that ended in an error."""

    intended_s: float
    lag_s: float
    total_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Level:
    """How much load: so many callers at a time, or so many arrivals a second."""

    value: float
    is_open: bool = False

    def __str__(self) -> str:
        return f"{self.value:g}/s" if self.is_open else f"{self.value:g}"

    def keys(self) -> dict[str, Any]:
        """Return what names it in a report."""
        rate = self.value if self.is_open else None
        return {"mode": "open" if self.is_open else "closed", "concurrency": _callers(self), "rate": rate}


def _callers(level: Level) -> int | None:
    return None if level.is_open else int(level.value)


@dataclass(slots=True)
class Run:
    """What one level of load measured."""

    level: Level
    elapsed_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    loop_lags_s: list[float] = field(default_factory=list)  # how late the generator's own timer was
    cpu_s: float = 0.0  # of the generator
    num_in_flight: int = 0
    peak_in_flight: int = 0

    def token_gaps(self) -> list[float]:
        return [gap for sample in self.samples for gap in sample.token_gaps()]

    def goodput(self, slo: Slo) -> dict[str, float]:
        """Return the share and the rate of requests that met every objective; one that failed met none."""
        good = sum(slo.is_met_by(sample) for sample in self.samples)
        return {
            "fraction": round(good / max(1, len(self.samples) + len(self.failures)), 4),
            "requests_per_s": round(self._rate(good), 3),
        }

    def late_sends_s(self) -> list[float]:
        """How late each request was sent, well ended or not; all zero without a schedule."""
        return [sample.lag_s for sample in self.samples] + [failure.lag_s for failure in self.failures]

    def lags_s(self) -> list[float]:
        """How late requests were sent; without a schedule, how late the generator woke for anything."""
        return self.late_sends_s() if self.level.is_open else self.loop_lags_s

    def is_generator_bound(self) -> bool:
        """Whether the load generator itself was too slow for its figures to be those of the service."""
        if self.elapsed_s and self.cpu_s / self.elapsed_s > _MOST_CPU_SHARE:
            return True
        lags = sorted(self.lags_s())
        if not lags or not self.samples:
            return False
        ttft_s = percentile(sorted(sample.first_token_s for sample in self.samples), 50)
        return percentile(lags, 99) > max(_MOST_LAG_S, _MOST_LAG_OF_TTFT * ttft_s)

    def report(self, slo: Slo | None = None) -> dict[str, Any]:
        """Return the figures, as they are printed: times in milliseconds, rates a second."""
        tokens = sum(sample.num_tokens for sample in self.samples)
        inputs = sum(sample.input_tokens for sample in self.samples)
        num_messages = sum(1 + len(sample.messages) for sample in self.samples)
        report: dict[str, Any] = self.level.keys() | {
            "elapsed_s": round(self.elapsed_s, 3),
            "num_requests": len(self.samples),
            "num_errors": len(self.failures),
            "errors": dict(Counter(failure.reason for failure in self.failures)),
            "output_tokens": tokens,
            "output_tokens_per_s": round(self._rate(tokens), 2),
            "input_tokens": inputs,
            "cached_input_tokens": sum(sample.cached_input_tokens for sample in self.samples),
            "input_tokens_per_s": round(self._rate(inputs), 2),
            "requests_per_s": round(self._rate(len(self.samples)), 3),
            "tokens_per_message": round(tokens / num_messages, 2) if num_messages else 0.0,
            "ttft_ms": percentiles([sample.first_token_s for sample in self.samples]),
            "itl_ms": percentiles(self.token_gaps()),
            "tpot_ms": percentiles([sample.tpot_s for sample in self.samples if sample.tpot_s is not None]),
            "message_gap_ms": percentiles([gap for sample in self.samples for gap, _ in sample.messages]),
            "e2e_ms": percentiles([sample.total_s for sample in self.samples]),
            "queue_ms": percentiles([sample.queue_s for sample in self.samples if sample.queue_s is not None]),
            "num_resumes": sum(sample.num_resumes for sample in self.samples),
            "num_takeovers": sum(sample.num_takeovers for sample in self.samples),
            "peak_in_flight": self.peak_in_flight,
            "generator": {
                "late_send_ms": percentiles(self.late_sends_s()) if self.level.is_open else {},
                "loop_lag_ms": percentiles(self.loop_lags_s),
                "cpu_share": round(self.cpu_s / self.elapsed_s, 3) if self.elapsed_s else 0.0,
                "is_bottleneck": self.is_generator_bound(),
            },
        }
        if slo is not None:
            report |= {"slo": slo.as_ms(), "goodput": self.goodput(slo)}
        return report

    def _rate(self, count: float) -> float:
        return count / self.elapsed_s if self.elapsed_s else 0.0


def best_level(runs: Sequence[Run], slo: Slo, target: float) -> Level | None:
    """Return the highest level of which at least `target` of all requests met the objectives; None if none did."""
    met = [run.level for run in runs if run.samples and run.goodput(slo)["fraction"] >= target]
    return max(met, key=lambda level: level.value, default=None)
