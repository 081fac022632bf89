"""`make deploy-check`: the chart and what stands beside it, judged by tools, by tests, and by damage that must be seen.

Its last line is one JSON object; the exit status is 0 only if nothing was found.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.deploy import checks, settings
from tests.deploy.charts import CHART, ROOT, Helm, Rendered, label, value_sets
from tests.deploy.mutants import MUTANTS, Bench, survivors

_TOOLS: Final = ("checkov", "hadolint", "kubernetes-validate", "yamllint")


@dataclass
class Report:
    """What was found, check by check, and what was counted."""

    faults: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)

    def check(self, name: str, run: Callable[[], list[str]]) -> None:
        """Run a check and print how it went."""
        started = time.monotonic()
        try:
            found = run()
        except checks.ToolMissing as error:
            found = [str(error)]
        self.faults.setdefault(name, []).extend(found)
        for fault in found:
            sys.stdout.write(f"{name}: {fault}\n")
        sys.stdout.write(f"{name}: {len(found)} faults, {time.monotonic() - started:.1f} s\n")
        sys.stdout.flush()

    def line(self) -> str:
        found = {name: len(faults) for name, faults in self.faults.items()}
        return json.dumps({"target": "deploy-check", **self.counts, "faults": found, "faults_in_all": self.num_faults})

    @property
    def num_faults(self) -> int:
        return sum(map(len, self.faults.values()))


def examples(report: Report, helm: Helm, tools: Path) -> None:
    """Render every example, and hold it against everything that can judge it."""
    sets = value_sets()
    rendered: dict[str, Rendered] = {}
    for name, values in sets.items():
        report.check(f"lint {name}", lambda values=values: helm.lint(values))
        rendered[name] = helm.render(values)

    def all_of(judge: Callable[[Rendered], list[str]]) -> list[str]:
        return [f"{name}: {fault}" for name, each in rendered.items() for fault in judge(each)]

    for version in checks.KUBERNETES:
        report.check(
            f"kubernetes {version}",
            lambda version=version: all_of(lambda each: checks.kubernetes(tools, each, version)),
        )
    report.check("custom kinds", lambda: all_of(checks.custom_kinds))
    report.check("variables", lambda: all_of(lambda each: settings.unread(each) + settings.refused(each)))

    def policies() -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            for name, each in rendered.items():
                (Path(folder) / name).mkdir()
                checks.write(Path(folder) / name, each.manifests)
            return checks.policies_of_files(tools, Path(folder))

    report.check("policies", policies)
    manifests = [manifest for each in rendered.values() for manifest in each.manifests]
    report.counts |= {
        "examples": len(sets),
        "manifests": len(manifests),
        "of_operators": sum(map(checks.is_custom, manifests)),
        "kubernetes": list(checks.KUBERNETES),
        "containers": sum(1 for each in rendered.values() for _ in each.containers()),
        "policies_skipped": dict(checks.SKIPPED),
    }
    sys.stdout.write(f"rendered {', '.join(sorted({label(manifest).split()[0] for manifest in manifests}))}\n")


def tests(report: Report, tools: Path) -> None:
    """The tests of tests/deploy, those that need Helm among them."""

    def run() -> list[str]:
        env = {**os.environ, "DEPLOY_TOOLS": str(tools)}
        command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent)]
        done = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        sys.stdout.write(done.stdout)
        report.counts["tests"] = done.stdout.strip().splitlines()[-1]
        return [] if done.returncode == 0 else [f"pytest ended with status {done.returncode}"]

    report.check("tests", run)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tools", type=Path, required=True, help="the programs' folder of the venv of tools")
    parser.add_argument("--envoy", type=Path, default=Path("build/envoy"), help="where Envoy is, or is installed")
    parser.add_argument("--no-mutants", action="store_true", help="leave out the damage: a minute less")
    options = parser.parse_args()
    tools = options.tools.absolute()
    missing = [name for name in _TOOLS if not (tools / name).exists()]
    if missing:
        sys.stderr.write(f"{tools} has no {', '.join(missing)}: run make deploy-check\n")
        return 1
    report = Report()
    with Helm(tools) as helm:
        examples(report, helm, tools)
        report.check("YAML", lambda: checks.yaml_style(tools))
        report.check("Dockerfiles", lambda: checks.dockerfiles(tools))
        report.check("alerts", checks.rules)
        report.counts["alerts"] = (CHART / "files" / "alerts.yaml").exists()
        report.check("Envoy", lambda: checks.proxy(options.envoy.absolute()))
        tests(report, tools)
        if not options.no_mutants:
            report.counts["mutants"] = len(MUTANTS)
            report.check("mutants", lambda: survivors(Bench(helm, tools, options.envoy.absolute())))
    sys.stdout.write(report.line() + "\n")
    return 1 if report.num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
