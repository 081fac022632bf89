"""How long a worker claims nothing because it could not open what it was given: the fault is its own. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

FIRST_S: Final = 5.0  # long enough for any other worker to take the job first
LONGEST_S: Final = 60.0  # each claim and return grows the log of a job: few of them, where no worker has the key


class ClaimPause:
    """A pause that doubles with each failure in a row. `monotonic` is the clock, in seconds."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._next_s = FIRST_S
        self._until = float("-inf")

    def begin(self) -> float:
        """Pause from now on; return for how many seconds."""
        pause_s, self._next_s = self._next_s, min(LONGEST_S, 2 * self._next_s)
        self._until = self._monotonic() + pause_s
        return pause_s

    def succeeded(self) -> None:
        """What was given could be opened: the next pause is a short one again."""
        self._next_s = FIRST_S

    @property
    def left_s(self) -> float:
        """Seconds that are left of it; 0 without one."""
        return max(0.0, self._until - self._monotonic())
