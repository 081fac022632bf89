"""Wheels for a build without a package index: what the locks name for one Python, fetched outside of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement


def entries(lock: str) -> list[str]:
    """The requirements of a lock, each with its hashes on one line."""
    return [line for line in lock.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def wanted(lock: str, python: str) -> list[str]:
    """The requirements of a lock that hold for a Python here (`3.11.2`), with hashes and without conditions."""
    environment = {**default_environment(), "python_full_version": python, "python_version": short(python)}
    found = []
    for entry in entries(lock):
        head, *hashes = entry.split(" --hash=")
        requirement = Requirement(head.strip())
        if requirement.marker is None or requirement.marker.evaluate(environment):
            requirement.marker = None
            found.append(" ".join((str(requirement), *(f"--hash={digest.strip()}" for digest in hashes))))
    return found


def short(python: str) -> str:
    """3.11 of 3.11.2."""
    return ".".join(python.split(".")[:2])


def fetch(locks: Iterable[Path], python: str, folder: Path) -> None:
    """Fetch the wheels of locks into a folder. Raises CalledProcessError."""
    folder.mkdir(parents=True, exist_ok=True)
    requirements = folder / "requirements.txt"
    requirements.write_text("\n".join(line for lock in locks for line in wanted(lock.read_text(), python)) + "\n")
    _download(python, folder, ["--require-hashes", "-r", str(requirements)])
    requirements.unlink()


def fetch_torch(version: str, index: str, python: str, folder: Path) -> None:
    """Fetch torch for CPUs: from PyTorch's index, else from where pip is set up to find files. Raises as `fetch`."""
    if list(folder.glob(f"torch-{version}*.whl")):
        return
    try:
        _download(python, folder, ["--timeout", "5", "--retries", "0", "--index-url", index, f"torch=={version}"])
    except subprocess.CalledProcessError:
        _download(python, folder, ["--no-index", f"torch=={version}"])


def _download(python: str, folder: Path, what: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-qq", "--no-deps"]
    command += ["--only-binary", ":all:", "--python-version", short(python), "-d", str(folder), *what]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL if "--index-url" in what else None)
