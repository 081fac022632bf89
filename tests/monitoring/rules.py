"""Alert rules held to their tests by promtool, and dashboard queries read from their file."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import yaml

HERE: Final = Path(__file__).parent
FILES: Final = HERE.parent.parent / "deploy" / "chart" / "files"
ALERTS: Final = FILES / "alerts.yaml"
DASHBOARD: Final = FILES / "dashboard.json"
ALERT_TESTS: Final = HERE / "alerts_test.yaml"

_OWN: Final = re.compile(r"\b(?:torchrelay|grpc_server|process|python)_[a-z0-9_]+|\bup\b(?=\{)")


def alerts() -> list[dict[str, Any]]:
    """Return the alerts, as they stand in their file."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> dict[str, list[str]]:
    """Return the dashboard's queries by panel, with the row's title before the panel's."""
    found: dict[str, list[str]] = {}
    row = ""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        else:
            found[f"{row}: {panel['title']}"] = [target["expr"] for target in panel["targets"]]
    return found


def metrics_of(query: str) -> set[str]:
    """Return the names of the metrics that a query reads."""
    return set(_OWN.findall(query))


def untested() -> set[str]:
    """Return the alerts that no test sees firing."""
    tests = yaml.safe_load(ALERT_TESTS.read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    return {rule["alert"] for rule in alerts()} - fired


def mutants() -> dict[str, str]:
    """Return broken rules that the tests must see, by what is broken."""
    text = ALERTS.read_text()
    changes = {
        "a threshold that is ten times too high": ("}) > 60", "}) > 600"),
        "an alert that waits for too long": ("for: 1m", "for: 30m"),
        "a model without workers that nobody needs": ("(torchrelay_queue_jobs)) > 0", "(torchrelay_queue_jobs)) >= 0"),
        "a metric that does not exist": ("torchrelay_kv_cache_usage_perc", "torchrelay_gpu_cache_usage_perc"),
        "another severity": ("labels: {severity: page}", "labels: {severity: ticket}"),
    }
    for name, (part, _) in changes.items():
        assert part in text, name
    return {name: text.replace(part, other) for name, (part, other) in changes.items()}


def check(folder: Path, rules: str | None = None) -> list[str]:
    """Run promtool over the rules and their tests in a folder of their own; return what it found fault with.

    `rules` stand in the place of the file's, for a mutant.
    """
    text = ALERTS.read_text() if rules is None else rules
    faults = []
    (folder / "whole.yaml").write_text(text)
    content = yaml.safe_load(text)
    for group in content["groups"]:
        for rule in group["rules"]:
            rule.pop("annotations", None)
    (folder / "alerts.yaml").write_text(yaml.safe_dump(content))
    (folder / "test.yaml").write_text(ALERT_TESTS.read_text())
    for command in (["check", "rules", "whole.yaml"], ["test", "rules", "test.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            faults.append(f"promtool {' '.join(command)}:\n{done.stdout}{done.stderr}")
    return faults
