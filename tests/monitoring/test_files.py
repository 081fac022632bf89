"""Dashboard and alerts as files: they name metrics that exist, and say what to do. No Prometheus is needed for that."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterable

import pytest
from prometheus_client import CollectorRegistry

from common.jobs import QueueShape, WaitingClass
from common.registry import ModelCard
from common.settings import MetricsSettings
from gateway.telemetry.assembly import GatewayMetrics
from gateway.telemetry.queues import ModelQueue
from tests.monitoring import rules
from worker.engine.types import EngineStats
from worker.engine_figures import EngineFigures
from worker.metrics import WorkerMetrics


def exported(registry: CollectorRegistry) -> Iterable[str]:
    """The names of all series that a registry can have, those that have none yet included."""
    for family in registry.collect():
        kinds = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        yield from (f"{family.name}{suffix}" for suffix in kinds)


@pytest.fixture(scope="module")
def names() -> set[str]:
    """All metrics of gateways and workers."""
    gateway = GatewayMetrics(MetricsSettings())
    gateway.count_open([], [])
    classes = tuple(WaitingClass(index, 0, None, None) for index in range(3))
    shape = QueueShape(0, classes, (), has_more_tenants=False, num_running=0, num_dead_letters=0)
    gateway.queues.update([ModelQueue("m", 1, shape)], 0.0)
    worker = CollectorRegistry()
    WorkerMetrics(worker, "m", 1)
    card = ModelCard(name="m", revision="r", shard="s", vocab_size=1, context_tokens=1, max_output_tokens=1)
    worker.register(EngineFigures(card, "cpu", "1", EngineStats, lambda: (0, 0)))
    return {*exported(gateway.registry), *exported(worker), "up"}


def test_every_query_of_the_dashboard_names_metrics_that_exist(names: set[str]) -> None:
    for panel, queries in rules.queries().items():
        for query in queries:
            found = rules.metrics_of(query)
            assert found, f"{panel}: {query}"
            assert found <= names, f"{panel}: {found - names}"


def test_every_alert_names_metrics_that_exist_and_says_what_to_do(names: set[str]) -> None:
    assert len(rules.alerts()) > 10
    for rule in rules.alerts():
        found = rules.metrics_of(rule["expr"])
        assert found, rule["alert"]
        assert found <= names, f"{rule['alert']}: {found - names}"
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"], rule["alert"]
        assert len(rule["annotations"]["runbook"]) > 40, rule["alert"]


def test_every_alert_has_a_test_that_sees_it_fire() -> None:
    assert rules.untested() == set()


def test_a_misspelt_metric_is_seen() -> None:
    assert rules.metrics_of("sum(rate(torchrelay_nothing_total[5m])) > 0") == {"torchrelay_nothing_total"}


def test_the_dashboard_is_the_one_that_its_source_makes() -> None:
    source = rules.FILES.parent.parent / "dashboard.py"
    made = runpy.run_path(str(source))["dashboard"]()
    assert json.loads(rules.DASHBOARD.read_text()) == made, "run make dashboard"
