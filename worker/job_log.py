"""A line of log for each change of a generation's state on this worker: ids and counts, never text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import structlog

from common.jobs import ClaimedJob, NewEvent, Swept
from common.late_log import late_log
from common.telemetry.upkeep import log_upkeep
from worker.engine.types import StepResult

log = structlog.get_logger()

_EVENTS: Final = {"PREEMPTED": "job.preempted", "RELEASED": "job.released"}


class JobLog:
    """A JobWatch that writes the log. For use in an event loop."""

    def __init__(self) -> None:
        self._held: set[str] = set()

    def claimed(self, jobs: Sequence[ClaimedJob]) -> None:
        for job in jobs:
            self._held.add(job.generation_id)
            late_log.info(
                log,
                "job.claimed",
                generation_id=job.generation_id,
                epoch=job.epoch,
                claim=job.num_claims,
                events=len(job.events),
                waited_ms=job.age_ms,
            )

    def stepped(self, result: StepResult) -> None:
        """A step changes no state that others see."""

    def committed(self, events: Sequence[NewEvent], lost: Collection[str]) -> None:
        for event in events:
            if event.terminal is None or event.generation_id in lost or event.generation_id not in self._held:
                continue
            self._held.discard(event.generation_id)
            late_log.info(
                log,
                "job.ended",
                generation_id=event.generation_id,
                state=event.terminal.name,
                reason=str(event.reason),
                tokens=event.completion_tokens,
            )

    def tidied(self, *rounds: Swept) -> None:
        log_upkeep(*rounds)

    def dropped(self, generation_id: str, reason: str) -> None:
        if generation_id in self._held:
            self._held.discard(generation_id)
            late_log.info(log, _EVENTS.get(reason, "job.lost"), generation_id=generation_id, reason=reason.lower())
