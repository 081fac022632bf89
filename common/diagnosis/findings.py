"""What a check finds, and where it looks. Pure data."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias

from torchrelay.cli.connection import DEFAULT_ADDRESS, DEFAULT_ADMIN_ADDRESS, Connection


class Level(StrEnum):
    """How bad it is. A failure keeps something from working; a warning will, or keeps it from working well."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line that says how it is, and where that is not well, one that says what to do."""

    check: str
    level: Level
    what: str
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Where checks look. `root` is where /proc and /sys are."""

    environment: Mapping[str, str] = field(default_factory=dict)
    connection: Connection = field(default_factory=lambda: Connection(DEFAULT_ADDRESS, None))
    admin_address: str = DEFAULT_ADMIN_ADDRESS
    admin_key: str | None = None
    data_dir: Path = Path()  # of `torchrelay serve`
    root: Path = Path("/")
    wall_clock: Callable[[], float] = time.time

    def is_set(self, variable: str) -> bool:
        return variable in map(str.upper, self.environment)


Check: TypeAlias = Callable[[Surroundings], Awaitable[Sequence[Finding]]]


def ok(check: str, what: str) -> Finding:
    return Finding(check, Level.OK, what)


def warning(check: str, what: str, fix: str) -> Finding:
    return Finding(check, Level.WARNING, what, fix)


def failure(check: str, what: str, fix: str) -> Finding:
    return Finding(check, Level.FAILURE, what, fix)
