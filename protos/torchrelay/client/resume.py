"""When a broken stream is picked up again, and where. Pure: no gRPC channel, no clock."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from torchrelay.client.errors import RelayError
from torchrelay.v1 import generation_pb2 as pb

_RNG: Final = random.Random()  # seeding one takes longer than all else that a call needs here


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a client tries. Delays grow by doubling and are drawn between 0 and the bound (full jitter)."""

    initial_delay_s: float = 0.1
    max_delay_s: float = 5.0
    give_up_after_s: float = 120.0  # without any event
    first_contact_s: float = 120.0  # the same, before a call has had any answer at all

    def delay(self, attempt: int, rng: random.Random) -> float:
        """Return the pause before retry number `attempt`, from 0."""
        return rng.uniform(0, min(self.max_delay_s, self.initial_delay_s * 2 ** min(attempt, 32)))


@dataclass(slots=True)
class StreamPosition:
    """How far a stream has come: what resuming needs. Feed it every event and every failure."""

    policy: RetryPolicy
    rng: random.Random = _RNG
    generation_id: str = ""
    sequence: int = 0
    chain_hash: bytes = b""
    finished: bool = False
    num_resumes: int = 0
    _attempt: int = 0
    _last_progress: float | None = None
    _was_answered: bool = False

    def on_event(self, event: pb.GenerationEvent, now: float) -> bool:
        """Take an event; return whether the caller should see it: a resumed stream repeats Accepted.

        Only what is new counts: a server that accepts and breaks at once is tried ever more slowly, and given up.
        """
        kind = event.WhichOneof("event")
        if kind == "accepted" and self.generation_id:
            return False
        if kind == "accepted":
            self.generation_id = event.accepted.generation_id
        if kind in ("accepted", "finished") or event.sequence > self.sequence:
            self._attempt = 0
        if event.sequence > self.sequence:
            self.sequence, self.chain_hash = event.sequence, event.chain_hash
        self._last_progress = now
        self._was_answered = True
        self.finished = self.finished or kind == "finished"
        return True

    def on_error(self, error: RelayError, now: float) -> float:
        """Return how many seconds to wait before trying again.

        Raises the error itself if trying again is useless, unsafe, or has gone on for too long.
        """
        error.generation_id = error.generation_id or self.generation_id
        if self._last_progress is None:
            self._last_progress = now
        if not (error.is_resumable if self.generation_id else error.is_retryable):
            raise error
        # Behind the server's own delay too: all whom it told the same must not come back at the same moment.
        delay = (error.retry_delay_s or 0.0) + self.policy.delay(self._attempt, self.rng)
        patience = self.policy.give_up_after_s if self._was_answered else self.policy.first_contact_s
        if now + delay - self._last_progress > patience:
            raise error
        self._attempt += 1
        if self.generation_id:
            self.num_resumes += 1
        return delay

    def resume_request(self) -> pb.ResumeGenerationRequest | None:
        """Return the request that continues the stream; None if it was never accepted, so that it is sent again."""
        if not self.generation_id:
            return None
        return pb.ResumeGenerationRequest(
            generation_id=self.generation_id, after_sequence=self.sequence, chain_hash=self.chain_hash
        )
