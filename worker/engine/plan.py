"""What one step computes, and which rows of its logits mean what. Pure."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from common.generation import SamplingParams
from worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` tokens of one sequence: uncomputed ones, and behind its last one possibly drafts."""

    sequence: Sequence
    num_tokens: int  # drafts included
    is_last: bool  # reaches the sequence's last known token, so that its logits give the next one
    drafts: array[int] = field(default_factory=lambda: array("i"))  # guesses of the tokens behind the last one
    num_scored_rows: int = 0  # whose logits say how probable the prompt's next tokens were

    @property
    def num_source_tokens(self) -> int:
        """Tokens of a source that are read for it in this step."""
        return self.sequence.num_source_tokens_to_read

    @property
    def is_prefill(self) -> bool:
        """Whether it is more than a decode with its drafts."""
        return self.num_tokens > 1 + len(self.drafts) or self.num_source_tokens > 0

    @property
    def num_sampled_rows(self) -> int:
        """Rows whose logits give a new token: of the last known token and of every draft."""
        return 1 + len(self.drafts) if self.is_last else 0

    @property
    def num_logit_rows(self) -> int:
        """Rows whose logits are needed, the chunk's last ones: those to be scored, then those to be sampled."""
        return self.num_scored_rows + self.num_sampled_rows


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """The content of one block is needed in another one."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class DraftRow:
    """A draft's row of logits, as the sampler sees it: like the sequence, were the drafts up to this one its tokens."""

    sequence: Sequence
    num_drafts: int

    @property
    def sampling(self) -> SamplingParams:
        return self.sequence.sampling

    @property
    def output_index(self) -> int:
        return self.sequence.output_index

    @property
    def num_tokens(self) -> int:
        return self.sequence.num_tokens + self.num_drafts

    @property
    def history(self) -> None:
        """Sequences with a history do not draft."""
        return None

    @property
    def matcher(self) -> None:
        """Nor do sequences with a matcher."""
        return None

    @property
    def group(self) -> None:
        """Nor do beams."""
        return None


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: decodes first, then prefills."""

    chunks: tuple[Chunk, ...]
    num_tokens: int
    copies: tuple[BlockCopy, ...] = ()  # to be made before it is computed, all at once

    @property
    def is_predictable(self) -> bool:
        """Whether the next step can be planned, and computed, before this one's tokens are known: each sequence goes on
        by one token, and what is done to its scores does not depend on which.
        """
        return not any(chunk.num_scored_rows or (chunk.is_last and _is_special(chunk)) for chunk in self.chunks)

    @property
    def forks(self) -> list[Sequence]:
        """The sequences that begin with this step, behind the parents whose logits give their first tokens."""
        return [fork for chunk in self.chunks if chunk.is_last for fork in chunk.sequence.forks]

    @property
    def sampled_indices(self) -> list[int] | None:
        """Which rows of logits `logit_rows` and then `forks` are sampled from; None if each has one, in order."""
        if not any(chunk.num_scored_rows or (chunk.is_last and chunk.sequence.forks) for chunk in self.chunks):
            return None  # as in nearly every step
        own: list[int] = []
        of_forks: list[int] = []
        num_rows = 0
        for chunk in self.chunks:
            num_rows += chunk.num_logit_rows
            own += range(num_rows - chunk.num_sampled_rows, num_rows)
            if chunk.is_last:
                of_forks += [num_rows - chunk.num_sampled_rows] * len(chunk.sequence.forks)
        return [*own, *of_forks]

    @property
    def scored(self) -> list[tuple[Chunk, range]]:
        """The chunks of prompts to be scored, with their rows of logits."""
        found: list[tuple[Chunk, range]] = []
        num_rows = 0
        for chunk in self.chunks:
            if chunk.num_scored_rows:
                found.append((chunk, range(num_rows, num_rows + chunk.num_scored_rows)))
            num_rows += chunk.num_logit_rows
        return found

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """The sequences that get new tokens, in the order of their rows."""
        return tuple(chunk.sequence for chunk in self.chunks if chunk.is_last)

    @property
    def logit_rows(self) -> list[Sequence | DraftRow]:
        """What the sampler chooses a token for, row by row: `num_sampled_rows` of each chunk."""
        rows: list[Sequence | DraftRow] = []
        for chunk in self.chunks:
            if chunk.is_last:
                rows.append(chunk.sequence)
                rows += [DraftRow(chunk.sequence, k) for k in range(1, chunk.num_sampled_rows)]
        return rows


def _is_special(chunk: Chunk) -> bool:
    sequence = chunk.sequence
    return bool(
        chunk.drafts
        or sequence.forks
        or sequence.history is not None
        or sequence.matcher is not None
        or sequence.group is not None
    )
