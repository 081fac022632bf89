"""Upkeep counted and logged: gateways do it, and workers that have nothing else to do."""

from __future__ import annotations

import structlog
from prometheus_client import CollectorRegistry, Counter

from common.jobs import Swept

log = structlog.get_logger()


class UpkeepCounters:
    """What this process has ended or moved on, since nobody else did."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._acted = Counter(
            "torchrelay_upkeep_jobs",
            "Generations that upkeep requeued, gave up, let expire, cancelled, or found without a listener.",
            ["model_name", "outcome"],
            registry=registry,
        )

    def count(self, model: str, *rounds: Swept) -> None:
        for found in rounds:
            for outcome in ("requeued", "dead_lettered", "expired", "cancelled", "detached"):
                if number := getattr(found, outcome):
                    self._acted.labels(model, outcome).inc(number)


def log_upkeep(*rounds: Swept) -> None:
    """Write a line for each generation whose state upkeep has changed."""
    for found in rounds:
        for outcome, generation_id in found.generations:
            log.info(f"job.{outcome}", generation_id=generation_id)
