"""`make sbom`: what is installed here, as CycloneDX JSON, held against what the interpreter itself finds installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

OUTPUT: Final = Path("build/sbom.json")
_ALWAYS: Final = ("torch", "grpcio", "redis")  # whatever else changes, these carry the service


def normal(name: str) -> str:
    """Return a distribution's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def faults(sbom: Mapping[str, Any], installed: Mapping[str, str]) -> list[str]:
    """Return what is wrong with an SBOM of the distributions `installed`, versions by normal name."""
    listed = {normal(component["name"]): component for component in sbom.get("components", ())}
    found = [f"{name} is not installed" for name in _ALWAYS if name not in installed]
    for name, version in sorted(installed.items()):
        component = listed.get(name)
        if component is None:
            found.append(f"{name} is missing")
        elif component.get("version") != version:
            found.append(f"{name} stands as {component.get('version')}, and {version} is installed")
        elif not is_identified(component, name):
            found.append(f"{name} has neither a package URL nor hashes")
    return found


def is_identified(component: Mapping[str, Any], name: str) -> bool:
    """Whether a scanner can tell which package it is."""
    return bool(component.get("hashes")) or str(component.get("purl", "")).startswith(f"pkg:pypi/{name}@")


def installed_here(own: Iterable[str] = ("torchrelay", "torchrelay-client")) -> dict[str, str]:
    """Return the versions of this environment's distributions; our own have no package URL, being folders."""
    versions = {normal(item.metadata["Name"]): item.version for item in metadata.distributions()}
    return {name: version for name, version in versions.items() if name not in own}


def main(program: str) -> int:
    """Write the SBOM with the program `cyclonedx-py`, print one JSON line, return the exit status."""
    OUTPUT.parent.mkdir(exist_ok=True)
    subprocess.run(
        [program, "environment", "--of", "JSON", "--pyproject", "pyproject.toml", "-o", str(OUTPUT), sys.executable],
        check=True,
    )
    sbom = json.loads(OUTPUT.read_text())
    installed = installed_here()
    wrong = faults(sbom, installed)
    report = {
        "target": "sbom",
        "file": str(OUTPUT),
        "spec_version": sbom.get("specVersion"),
        "components": len(sbom.get("components", ())),
        "installed": len(installed),
        "with_purl": sum("purl" in component for component in sbom.get("components", ())),
        "faults": wrong,
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
