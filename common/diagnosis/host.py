"""This machine: settings, versions, disk, memory."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Final

from common import configuration
from common.diagnosis import interpreter
from common.diagnosis.findings import Finding, Surroundings, failure, ok, warning
from common.settings import PREFIX

_GB: Final = 10**9
_LOW_DISK_BYTES: Final = 5 * _GB
_NO_DISK_BYTES: Final = _GB // 2
_LOW_MEMORY_SHARE: Final = 0.05
_EXTRA: Final = re.compile(r"""extra\s*==\s*['"]""")
_NAME: Final = re.compile(r"[A-Za-z0-9._-]+")


async def check_settings(where: Surroundings) -> Sequence[Finding]:
    """What is set, as `torchrelay config check` says it."""
    found = configuration.problems(configuration.programs(), where.environment)
    if found:
        return [failure("settings", problem.what, problem.fix) for problem in found]
    number = sum(name.upper().startswith(PREFIX) for name in where.environment)
    return [ok("settings", f"{number} variables are set, and all are understood")]


async def check_software(where: Surroundings) -> Sequence[Finding]:
    """Versions of Python and of what we need; whether server and client belong together."""
    own, client = metadata.version("torchrelay"), metadata.version("torchrelay-client")
    found = [ok("software", f"torchrelay {own}, Python {platform.python_version()} on {platform.machine()}")]
    if own != client:
        found = [
            failure(
                "software",
                f"torchrelay {own} and torchrelay-client {client} do not belong together",
                f"pip install torchrelay-client=={own}",
            )
        ]
    missing = missing_packages("torchrelay")
    if missing:
        found.append(
            failure(
                "software",
                f"packages are missing or of another version: {', '.join(missing)}",
                f"{sys.executable} -m pip install --upgrade torchrelay=={own}",
            )
        )
    if not interpreter.is_profiled():
        found.append(
            warning(
                "software",
                "this Python was compiled without a profile of itself, and takes a fifth longer over the same code",
                "install into a distribution's Python, or one that was configured with --enable-optimizations",
            )
        )
    return found


def missing_packages(distribution: str) -> list[str]:
    """What a distribution needs, extras apart, and is not installed in a version that it allows."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # it comes with the worker's packages; without it only the names are looked at
        return [one for one in _needed(distribution) if not _is_installed(_name_of(one))]
    wrong = []
    for text in _needed(distribution):
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(text)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{text} (is {version})")
    return wrong


def _needed(distribution: str) -> list[str]:
    return [one for one in metadata.requires(distribution) or () if not _EXTRA.search(one)]


def _name_of(requirement: str) -> str:
    match = _NAME.match(requirement)
    return match[0] if match else requirement


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


async def check_disk(where: Surroundings) -> Sequence[Finding]:
    """Room for the queue of `torchrelay serve`, where there is one on this machine."""
    folder = where.data_dir / "queue"
    if not folder.is_dir():
        return []
    free = shutil.disk_usage(folder).free
    what = f"{free / _GB:.1f} GB are free where the queue is kept ({folder})"
    fix = "make room, or keep it elsewhere with `torchrelay serve --data-dir`; a full disk stops all work"
    if free < _NO_DISK_BYTES:
        return [failure("disk", what, fix)]
    return [warning("disk", what, fix) if free < _LOW_DISK_BYTES else ok("disk", what)]


async def check_memory(where: Surroundings) -> Sequence[Finding]:
    """Memory that is left on this machine."""
    total, available = memory_of(where.root)
    if not total:
        return []
    what = f"{available / _GB:.1f} of {total / _GB:.1f} GB of memory are available"
    if available < _LOW_MEMORY_SHARE * total:
        fix = "end something, or give a worker less: TORCHRELAY_ENGINE_KV_CACHE_BYTES, or a smaller model"
        return [warning("memory", what, fix)]
    return [ok("memory", what)]


def memory_of(root: Path) -> tuple[int, int]:
    """All memory and what is available, in bytes; zeros where the system does not tell."""
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:
        return 0, 0
    found = {name: int(amount) * 1024 for name, amount in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return found.get("MemTotal", 0), found.get("MemAvailable", 0)


def kernel_findings(root: Path) -> list[Finding]:
    """What the queue's server needs of the kernel of its machine."""
    found = []
    if _read(root / "proc/sys/vm/overcommit_memory") == "0":
        found.append(
            warning(
                "kernel",
                "vm.overcommit_memory is 0: the queue's server may fail to write its append-only file anew",
                "sysctl vm.overcommit_memory=1, and in /etc/sysctl.conf",
            )
        )
    if "[always]" in _read(root / "sys/kernel/mm/transparent_hugepage/enabled"):
        found.append(
            warning(
                "kernel",
                "transparent huge pages are always used: the queue's server pauses while it saves",
                "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, at each start of the machine",
            )
        )
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def is_readable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.R_OK)
