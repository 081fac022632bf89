"""Damage that the checks must see: done to a copy of the chart, or of another file, and shown to one check."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tests.deploy import checks, settings
from tests.deploy.charts import CHART, ROOT, ChartError, Helm, Rendered

_MODEL: Final = {
    "models": [{"name": "tiny", "source": {"volumeClaim": {"name": "models"}}, "autoscaling": {"enabled": True}}]
}


@dataclass(frozen=True, slots=True)
class Bench:
    """What a mutant is tried with."""

    helm: Helm
    tools: Path
    envoy_dir: Path


Check = Callable[[Bench, Path], list[str]]


@dataclass(frozen=True, slots=True)
class Mutant:
    """In a file of the chart, or else of deploy/, `old` becomes `new`; then `check` must find faults."""

    name: str
    file: str
    old: str
    new: str
    check: Check

    def damage(self, folder: Path) -> Path:
        """Make the damaged copy in a folder; return the chart, or the file outside of it."""
        inside = (CHART / self.file).exists()
        if inside:
            target = Path(shutil.copytree(CHART, folder / "chart"))
            path = target / self.file
        else:
            path = target = Path(shutil.copy(ROOT / "deploy" / self.file, folder))
        text = path.read_text()
        if self.old not in text:
            raise AssertionError(f"{self.name}: {self.file} has no {self.old!r} to damage")
        path.write_text(text.replace(self.old, self.new))
        return target


def _rendered(check: Callable[[Bench, Rendered], list[str]]) -> Check:
    """A check of what is rendered, as one of a chart: where it does not render, that is the fault."""

    def run(bench: Bench, chart: Path) -> list[str]:
        try:
            return check(bench, bench.helm.render(_MODEL, chart))
        except ChartError as error:
            return [str(error)]

    return run


def _tests(name: str) -> Check:
    """The tests of a file, of the damaged chart."""

    def run(bench: Bench, chart: Path) -> list[str]:
        env = {**os.environ, "DEPLOY_CHART": str(chart), "DEPLOY_TOOLS": str(bench.tools)}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            str(Path(__file__).with_name(name)),
        ]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{name} could not be run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]

    return run


_SCHEMAS: Final = _rendered(lambda bench, rendered: checks.kubernetes(bench.tools, rendered, checks.KUBERNETES[0]))
_CUSTOM: Final = _rendered(lambda _, rendered: checks.custom_kinds(rendered))
_POLICIES: Final = _rendered(lambda bench, rendered: checks.policies(bench.tools, rendered))
_UNREAD: Final = _rendered(lambda _, rendered: settings.unread(rendered))
_REFUSED: Final = _rendered(lambda _, rendered: settings.refused(rendered))
_RENDERS: Final = _rendered(lambda *_: [])

_GATEWAY: Final = "templates/gateway-deployment.yaml"
_WORKERS: Final = "templates/workers.yaml"
_POLICY: Final = "templates/networkpolicies.yaml"

MUTANTS: tuple[Mutant, ...] = (
    Mutant("a misspelt probe", _GATEWAY, "livenessProbe:", "livenesProbe:", _SCHEMAS),
    Mutant("a number that is text", _WORKERS, "periodSeconds: 10", 'periodSeconds: "ten"', _SCHEMAS),
    Mutant("a field of a scaler that KEDA does not have", _WORKERS, "minReplicaCount:", "minReplicas:", _CUSTOM),
    Mutant(
        "a writable root",
        "templates/_helpers.tpl",
        "readOnlyRootFilesystem: true",
        "readOnlyRootFilesystem: false",
        _POLICIES,
    ),
    Mutant("no limits", _GATEWAY, "resources: {{- toYaml $g.resources | nindent 12 }}", "resources: {}", _POLICIES),
    Mutant("rights that are kept", "templates/_helpers.tpl", "drop: [ALL]", "drop: []", _POLICIES),
    Mutant(
        "a variable that nothing reads", _GATEWAY, "TORCHRELAY_GATEWAY_DRAIN_S", "TORCHRELAY_GATEWAY_DRAIN", _UNREAD
    ),
    Mutant(
        "a worker's variable of the gateway's name",
        _WORKERS,
        "TORCHRELAY_WORKER_DEVICE",
        "TORCHRELAY_GATEWAY_DEVICE",
        _UNREAD,
    ),
    Mutant(
        "a value that the settings refuse",
        _WORKERS,
        '_QUANTIZATION" $model.quantization',
        '_QUANTIZATION" "int3"',
        _REFUSED,
    ),
    Mutant("a template without its end", _POLICY, "{{- if .Values.bootstrap.enabled }}\n---", "---", _RENDERS),
    Mutant("a key that stands twice", _GATEWAY, "enableServiceLinks: false", "serviceAccountName: x", _RENDERS),
    Mutant(
        "a grace below the drain",
        _GATEWAY,
        "{{ add $g.preStopSeconds $g.drainSeconds 15 }}",
        "30",
        _tests("test_rendered_gateway.py"),
    ),
    Mutant(
        "a start that is not waited for",
        _WORKERS,
        "failureThreshold: {{ max 1 (ceil (divf $model.startupSeconds 5)) }}",
        "failureThreshold: 30",
        _tests("test_rendered_workers.py"),
    ),
    Mutant(
        "a model's values in the next model",
        _WORKERS,
        "deepCopy $.Values.modelDefaults",
        "$.Values.modelDefaults",
        _tests("test_rendered_workers.py"),
    ),
    Mutant(
        "a policy that selects nobody",
        _POLICY,
        "{{- toYaml $of.gateway | nindent 2 }}",
        "podSelector: {matchLabels: {app: gateway}}",
        _tests("test_rendered_network.py"),
    ),
    Mutant(
        "the Hub for everybody",
        _POLICY,
        "{{- if $model.source.hub }}",
        "{{- if true }}",
        _tests("test_rendered_network.py"),
    ),
    Mutant(
        "a server that may lose what it answered",
        "templates/valkey.yaml",
        "appendfsync always",
        "appendfsync everysec",
        _tests("test_rendered_queue.py"),
    ),
    Mutant(
        "a user who may do anything",
        "templates/valkey.yaml",
        "resetchannels -@all +ping",
        "~* +@all",
        _tests("test_rendered_queue.py"),
    ),
    Mutant(
        "a token for every pod",
        "templates/serviceaccounts.yaml",
        "automountServiceAccountToken: false",
        "automountServiceAccountToken: true",
        _tests("test_rendered_everything.py"),
    ),
    Mutant(
        "rights over all Secrets",
        "templates/bootstrap.yaml",
        "    resourceNames: [{{ $secret }}]\n",
        "",
        _tests("test_rendered_bootstrap.py"),
    ),
    Mutant(
        "a schema that lets misspelt values pass",
        "values.schema.json",
        '"additionalProperties": false',
        '"additionalProperties": true',
        _tests("test_rendered_values.py"),
    ),
    Mutant(
        "a scrape of a port that is not there",
        "templates/monitoring.yaml",
        "- port: metrics",
        "- port: metric",
        _tests("test_rendered_monitoring.py"),
    ),
    Mutant(
        "values in bad style",
        "values.yaml",
        'nameOverride: ""',
        'nameOverride:   ""   ',
        lambda bench, chart: checks.yaml_style(bench.tools, [chart / "values.yaml"]),
    ),
    Mutant(
        "a Dockerfile whose program is a shell's child",
        "images/gateway.Dockerfile",
        'ENTRYPOINT ["torchrelay"]',
        "ENTRYPOINT torchrelay",
        lambda bench, file: checks.dockerfiles(bench.tools, [file]),
    ),
    Mutant(
        "an Envoy that knows no such policy",
        "examples/envoy/envoy.yaml",
        "lb_policy: LEAST_REQUEST",
        "lb_policy: LEAST_REQEST",
        lambda bench, file: checks.proxy(bench.envoy_dir, file),
    ),
)

# The chart renders without alerts, too.
if (CHART / "files" / "alerts.yaml").exists():
    MUTANTS += (
        Mutant(
            "alerts that Prometheus cannot read",
            "files/alerts.yaml",
            "expr: ",
            "expr: (",
            lambda _, chart: checks.rules(chart / "files" / "alerts.yaml"),
        ),
    )


def survivors(bench: Bench) -> list[str]:
    """Mutants that no check has seen, and checks that see damage where there is none."""
    unseen = [f"{mutant.name} ({mutant.file}) was not seen" for mutant in MUTANTS if not _faults(bench, mutant)]
    by_check = {mutant.check: replace(mutant, new=mutant.old) for mutant in MUTANTS}
    for sound in by_check.values():
        unseen += [f"the check for {sound.name} finds in a sound copy: {fault}" for fault in _faults(bench, sound)]
    return unseen


def _faults(bench: Bench, mutant: Mutant) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        return mutant.check(bench, mutant.damage(Path(folder)))
