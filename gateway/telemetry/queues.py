"""The queues and the server behind them as this gateway saw them last. All gateways tell the same: take the maximum."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.jobs import QueueShape

PRIORITIES: Final = ("high", "normal", "low")
_STALE_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class ModelQueue:
    """One revision of a model: its name, its workers, its queue."""

    model: str
    num_workers: int
    shape: QueueShape


class QueueFigures(Collector):
    """Gauges of what the last round of upkeep found; what is older than some seconds is not told any more."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._queues: tuple[ModelQueue, ...] = ()
        self._memory_share = 0.0
        self._is_up = False
        self._read_at = clock()

    def update(self, queues: Iterable[ModelQueue], memory_share: float) -> None:
        """`memory_share` is of the server's maxmemory; 0 without one."""
        self._queues, self._memory_share = tuple(queues), memory_share
        self._is_up, self._read_at = True, self._clock()

    def lose(self) -> None:
        """The server does not answer."""
        self._is_up = False

    def collect(self) -> Iterable[Metric]:
        # A round that hangs in its retries has not lost the server yet by its own word.
        age = self._clock() - self._read_at
        up = GaugeMetricFamily("torchrelay_redis_up", "Whether the queue's server answered this gateway last time.")
        up.add_metric([], float(self._is_up and age < _STALE_S))
        yield up
        if age >= _STALE_S:
            return
        memory = GaugeMetricFamily(
            "torchrelay_redis_memory_used_ratio", "Part of the server's maxmemory in use; 0 without maxmemory."
        )
        memory.add_metric([], self._memory_share)
        yield memory
        yield from _families(_by_model(self._queues))


def _by_model(queues: Iterable[ModelQueue]) -> Mapping[str, list[ModelQueue]]:
    found: dict[str, list[ModelQueue]] = {}
    for queue in queues:
        found.setdefault(queue.model, []).append(queue)
    return found


def _families(models: Mapping[str, list[ModelQueue]]) -> Iterable[Metric]:
    """Gauges by model; revisions of one model, as during an upgrade, together."""
    workers = _gauge("workers", "Live workers.")
    running = _gauge("jobs_running", "Generations that workers hold.")
    dead = _gauge("dead_letters", "Generations that failed and can be sent again.")
    wait = _gauge(
        "queue_expected_wait_seconds",
        "How long a generation of normal priority that arrives now will wait for a worker; while nobody knows and some "
        "wait, the age of the oldest.",
    )
    jobs = _gauge("queue_jobs", "Generations that wait.", "priority")
    oldest = _gauge("queue_oldest_age_seconds", "How long the oldest one has waited; 0 if none does.", "priority")
    for model, queues in models.items():
        workers.add_metric([model], sum(queue.num_workers for queue in queues))
        running.add_metric([model], sum(queue.shape.num_running for queue in queues))
        dead.add_metric([model], sum(queue.shape.num_dead_letters for queue in queues))
        wait.add_metric([model], max(_expected_wait_s(queue.shape) for queue in queues))
        for index, priority in enumerate(PRIORITIES):
            classes = [queue.shape.classes[index] for queue in queues]
            jobs.add_metric([model, priority], sum(each.num_waiting for each in classes))
            oldest.add_metric([model, priority], max(each.oldest_ms or 0 for each in classes) / 1000)
    return (workers, running, dead, wait, jobs, oldest)


def _expected_wait_s(shape: QueueShape) -> float:
    if not shape.num_waiting:
        return 0.0
    if shape.expected_wait_ms is not None:
        return shape.expected_wait_ms / 1000
    return max(each.oldest_ms or 0 for each in shape.classes) / 1000


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"torchrelay_{name}", text, labels=["model_name", *labels])
