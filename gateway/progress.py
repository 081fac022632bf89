"""How far a call has come in its generation's log, and what may follow. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from common.chain import GENESIS, next_hash
from common.errors import ResultLost
from common.generation import EventBody, FinishReason, OutputDelta
from common.jobs import ItemKind, LogEvent, ReplyItem


class Verdict(Enum):
    """What to do with an item."""

    DELIVER = "deliver"
    DROP = "drop"  # already delivered, or of an epoch that is over
    READ_LOG = "read the log"  # something before it is missing, or its body is only in the log
    NEWS = "news"  # changes the state, adds no event


@dataclass(slots=True)
class LogPosition:
    """Last event delivered to a caller. `chain_hash` None: the caller did not say, so the first event sets it."""

    sequence: int = 0
    chain_hash: bytes | None = GENESIS
    epoch: int = 0
    ends: dict[int, OutputDelta] = field(default_factory=dict)  # last delta of each output that ended

    def copy(self) -> LogPosition:
        """Return the position as it is now; how outputs ended is shared."""
        return LogPosition(self.sequence, self.chain_hash, self.epoch, self.ends)

    def judge(self, item: ReplyItem) -> Verdict:
        """Say what to do with an item of the reply stream; changes nothing but the highest epoch seen.

        What the log holds is not judged: it is the truth, even with lower epochs after a server lost its tail. An item
        of such an epoch is not taken, but tells that the log is to be read.
        """
        if item.epoch < self.epoch:
            return Verdict.READ_LOG if item.sequence > self.sequence else Verdict.DROP
        self.epoch = item.epoch
        if item.kind in (ItemKind.STARTED, ItemKind.REQUEUED):
            return Verdict.READ_LOG if item.sequence > self.sequence else Verdict.NEWS
        if item.sequence <= self.sequence:
            return Verdict.DROP
        if item.sequence > self.sequence + 1 or item.body is None:
            return Verdict.READ_LOG
        return Verdict.DELIVER

    def advance(self, item: LogEvent | ReplyItem) -> EventBody:
        """Take the next event and return its body. Raises ResultLost if it does not continue what was delivered."""
        body = item.body
        assert isinstance(body, EventBody)  # opened before it came here
        assert item.sequence == self.sequence + 1
        if self.chain_hash is not None and next_hash(self.chain_hash, body.deltas) != item.chain_hash:
            raise ResultLost
        self.sequence = item.sequence
        self.chain_hash = item.chain_hash
        self.note_ends(body.deltas)
        return body

    def note_ends(self, deltas: Iterable[OutputDelta]) -> None:
        """Remember how outputs ended."""
        for delta in deltas:
            if delta.finish_reason is not None:
                self.ends[delta.output_index] = delta

    def end_of(self, output_index: int, otherwise: FinishReason) -> OutputDelta:
        """Return an output's last delta; one that says `otherwise` if the generation ended before the output did."""
        known = self.ends.get(output_index)
        return known or OutputDelta(output_index=output_index, first_token_index=0, finish_reason=otherwise)
