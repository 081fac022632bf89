"""Who is told what becomes of the generations that a worker holds: metrics, spans."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from common.jobs import ClaimedJob, NewEvent, Swept
from worker.engine.types import StepResult


class JobWatch(Protocol):
    """Is told what becomes of the generations that a worker holds. `held` ones are told of once more, by `dropped`."""

    def claimed(self, jobs: Sequence[ClaimedJob]) -> None:
        """The worker was given these."""
        ...

    def stepped(self, result: StepResult) -> None:
        """The engine has taken a step."""
        ...

    def committed(self, events: Sequence[NewEvent], lost: Collection[str]) -> None:
        """These are stored, but for those of generations that turn out to be lost."""
        ...

    def tidied(self, *rounds: Swept) -> None:
        """Upkeep has done this."""
        ...

    def dropped(self, generation_id: str, reason: str) -> None:
        """The worker holds it no longer, and it has not ended here: PREEMPTED, RELEASED, or a LostReason's name."""
        ...


class Watches:
    """Several at once, in order."""

    def __init__(self, *watches: JobWatch) -> None:
        self._watches = watches

    def claimed(self, jobs: Sequence[ClaimedJob]) -> None:
        for watch in self._watches:
            watch.claimed(jobs)

    def stepped(self, result: StepResult) -> None:
        for watch in self._watches:
            watch.stepped(result)

    def committed(self, events: Sequence[NewEvent], lost: Collection[str]) -> None:
        for watch in self._watches:
            watch.committed(events, lost)

    def tidied(self, *rounds: Swept) -> None:
        for watch in self._watches:
            watch.tidied(*rounds)

    def dropped(self, generation_id: str, reason: str) -> None:
        for watch in self._watches:
            watch.dropped(generation_id, reason)
