"""What Prometheus, its operator and Grafana are given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.deploy import checks
from tests.deploy.builders import model
from tests.deploy.charts import CHART, Helm
from tests.deploy.conftest import Render

ON = {"serviceMonitor": {"enabled": True, "interval": "30s", "labels": {"release": "prometheus"}}}
EXTRAS = {"rules": {"enabled": True}, "dashboard": {"enabled": True}}


def test_nothing_of_operators_is_there_until_it_is_asked_for(render: Render) -> None:
    assert not [manifest for manifest in render(models=[model()]).manifests if checks.is_custom(manifest)]


def test_gateways_are_scraped_through_the_headless_service(render: Render) -> None:
    rendered = render(metrics=ON)
    monitor = rendered.get("ServiceMonitor", "gateway")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    wanted = monitor["spec"]["selector"]["matchLabels"]
    chosen = [service for service in rendered.all("Service") if wanted.items() <= service["metadata"]["labels"].items()]
    assert [service["metadata"]["name"] for service in chosen] == ["demo-torchrelay-gateway-headless"]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert (endpoint["path"], endpoint["interval"]) == ("/metrics", "30s")
    ports = {port["name"]: port["port"] for port in chosen[0]["spec"]["ports"]}
    address = rendered.container("Deployment", "gateway").env["TORCHRELAY_GATEWAY_METRICS_ADDRESS"]
    assert address == f"0.0.0.0:{ports[endpoint['port']]}"
    assert rendered.names("PodMonitor") == set()


def test_workers_of_all_models_are_scraped_by_pod(render: Render) -> None:
    rendered = render(metrics=ON, models=[model("a"), model("b")])
    spec = rendered.get("PodMonitor", "worker")["spec"]
    wanted = spec["selector"]["matchLabels"]
    chosen = [
        of["metadata"]["name"] for of, pod in rendered.pods() if wanted.items() <= pod["metadata"]["labels"].items()
    ]
    assert chosen == ["demo-torchrelay-worker-a", "demo-torchrelay-worker-b"]
    (endpoint,) = spec["podMetricsEndpoints"]
    ports = {port["name"] for port in rendered.container("Deployment", "worker-a").spec["ports"]}
    assert endpoint["port"] in ports


@pytest.fixture
def chart(tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(CHART, tmp_path / "chart"))


def test_alerts_are_shipped_as_they_are_with_their_own_templates(helm: Helm, chart: Path) -> None:
    rule = {"alert": "Down", "expr": "up == 0", "for": "5m", "annotations": {"summary": "{{ $labels.pod }} is down"}}
    (chart / "files" / "alerts.yaml").write_text(yaml.safe_dump({"groups": [{"name": "tests", "rules": [rule]}]}))
    rendered = helm.render({"metrics": EXTRAS}, chart)
    assert rendered.get("PrometheusRule", "")["spec"]["groups"][0]["rules"] == [rule]
    assert checks.custom_kinds(rendered) == []
    assert helm.render({}, chart).names("PrometheusRule") == set()


def test_a_dashboard_is_found_by_grafanas_sidecar(helm: Helm, chart: Path) -> None:
    dashboard = {"title": "torchrelay", "panels": [{"legend": "{{model_name}}"}]}
    (chart / "files" / "dashboard.json").write_text(json.dumps(dashboard, indent=2))
    config = helm.render({"metrics": EXTRAS}, chart).get("ConfigMap", "dashboard")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(config["data"]["torchrelay.json"]) == dashboard
    names = helm.render({}, chart).names("ConfigMap")
    assert "demo-torchrelay-dashboard" not in names


def test_a_chart_without_these_files_renders_without_them(helm: Helm, chart: Path) -> None:
    for name in ("alerts.yaml", "dashboard.json"):
        (chart / "files" / name).unlink(missing_ok=True)
    rendered = helm.render({"metrics": EXTRAS}, chart)
    assert rendered.names("PrometheusRule") == set()
    assert rendered.names("ConfigMap") == {"demo-torchrelay-valkey"}
