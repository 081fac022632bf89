"""What callers saw and what was done to the system: written down while it happens, judged afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

_AFTERMATH_S: Final = 6.0


class Outcome(StrEnum):
    """How a generation ended for its caller."""

    OPEN = "open"  # not known yet
    FINISHED = "finished"  # Finished was received
    FAILED = "failed"  # an error that says that the generation failed
    REFUSED = "refused"  # never accepted
    LEFT = "left"  # the caller went away on purpose
    LOST = "lost"  # the caller gave up, or was told something that must not happen


@dataclass(slots=True)
class Generation:
    """One generation as its caller saw it. Times are seconds of the monotonic clock."""

    kind: str  # of caller
    tenant: str
    prompt: int  # index into the truth
    max_tokens: int
    idempotency_key: str = ""
    grace_s: float = 0.0
    generation_id: str = ""
    other_ids: list[str] = field(default_factory=list)  # what repeats with the same key were given
    gateway: str = ""  # that its call is at now
    started: float = 0.0
    accepted: float = 0.0
    ended: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    last_sequence: int = 0
    hashes: dict[int, str] = field(default_factory=dict)  # of the last event of each message, by sequence
    finish_reason: str = ""
    usage: tuple[int, int] = (0, 0)  # prompt and completion tokens, as Finished said
    num_takeovers: int = 0
    num_resumes: int = 0
    num_begins: int = 0  # calls until it was accepted
    cancel_answered: float = 0.0
    cancel_state: str = ""
    outcome: Outcome = Outcome.OPEN
    error: str = ""  # reason of the error that it ended with
    faults: list[str] = field(default_factory=list)  # that hit a process it was in flight on
    complaints: list[str] = field(default_factory=list)  # laws that its caller saw broken at once

    @property
    def is_in_flight(self) -> bool:
        return bool(self.generation_id) and self.outcome is Outcome.OPEN


@dataclass(slots=True)
class Fault:
    """One thing that was done to the system."""

    kind: str
    target: str
    began: float
    ended: float = 0.0
    num_in_flight: int = 0  # generations on the process that was hit

    def overlaps(self, began: float, ended: float) -> bool:
        """Whether it, or what followed from it for a lease or two, falls into a time."""
        return self.began <= ended and began <= (self.ended or self.began) + _AFTERMATH_S


@dataclass(slots=True)
class History:
    """Everything of one run."""

    generations: list[Generation] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)  # seen by nobody's generation, such as a stranger's answer
    num_stranger_calls: int = 0

    def in_flight(self) -> Iterable[Generation]:
        """Return the generations that have been accepted and have not ended for their callers."""
        return [generation for generation in self.generations if generation.is_in_flight]

    def write(self, path: Path) -> None:
        """Write it down, one JSON object per line, for whoever looks for the cause of a violation."""
        with path.open("w") as file:
            for fault in self.faults:
                file.write(json.dumps({"fault": asdict(fault)}) + "\n")
            for generation in self.generations:
                file.write(json.dumps({"generation": asdict(generation)}) + "\n")
