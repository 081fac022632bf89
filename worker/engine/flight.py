"""A step from its launch to its landing: what it computes is on its way, and what the next step may know of it.

On a GPU a launch takes the host a fraction of what the step takes the device. So while a step is in flight the next one
is planned and launched behind it, and only then are its tokens looked at, turned into text and committed, while the
device computes on:

    host      | plan 1, launch 1 | plan 2, launch 2 | land 1 | plan 3, launch 3 | land 2 | ...
    device                       | step 1 ................. | step 2 ................. | ...

That needs nothing of step 1 but its shape: each sequence goes on by one token, whose place is held, and whose id step 2
reads where the device has put it. What ends in step 1 computes a row in vain in step 2; its blocks may be handed out
anew meanwhile, since whoever gets them is launched later, hence writes later. Where the next step depends on the tokens
themselves (edited scores, grammars, beams, forks, drafts), it is not launched before they are known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from common.generation import PromptScores
from worker.engine.batch import TokensInFlight
from worker.engine.beam_request import Continuations
from worker.engine.plan import DraftRow, Plan
from worker.engine.sampler import PendingTokens
from worker.engine.sequence import Sequence

SampledRow: TypeAlias = Sequence | DraftRow


@dataclass(slots=True)
class Flight:
    """A step that has been launched."""

    plan: Plan
    rows: list[SampledRow]  # that tokens are chosen for
    sampled: PendingTokens
    scores: list[tuple[Sequence, PromptScores]]
    continuations: dict[str, Continuations]  # of beams, by request id
    void: set[Sequence] = field(default_factory=set)  # whose rows were computed from another token than theirs

    def hold_places(self) -> TokensInFlight:
        """Let the next step be planned as if this one's tokens were known; return where it finds them."""
        assert self.plan.is_predictable
        for sequence in self.plan.sampled:
            if sequence not in self.void and not sequence.num_pending:  # one that failed holds its place still
                sequence.hold_place()
        return TokensInFlight(
            self.sampled.token_ids, {row: i for i, row in enumerate(self.rows) if isinstance(row, Sequence)}
        )

    def has(self, sequence: SampledRow) -> bool:
        return any(chunk.sequence is sequence for chunk in self.plan.chunks)
