"""What the engine keeps of a request from its arrival to its end."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.generation import Usage
from worker.engine.beam_request import BeamRequest
from worker.engine.sequence import Sequence
from worker.engine.stopping import StopState
from worker.engine.types import GenerationRequest


@dataclass(slots=True)
class OutputState:
    """One output that is not finished yet."""

    sequence: Sequence
    stop: StopState


@dataclass(slots=True)
class RequestState:
    """A request that is not finished yet."""

    request: GenerationRequest
    first: Sequence | None = None  # of the sequences that share the prompt, the one admitted first
    outputs: dict[int, OutputState] = field(default_factory=dict)  # by output index; of beams their root, as the first
    beams: BeamRequest | None = None
    num_completion_tokens: int = 0

    @property
    def usage(self) -> Usage:
        num_prompt_tokens = len(self.request.source_token_ids or self.request.prompt_token_ids)
        num_hit_tokens = 0 if self.first is None else self.first.num_hit_tokens or 0
        return Usage(num_prompt_tokens, min(num_hit_tokens, num_prompt_tokens), self.num_completion_tokens)

    def has(self, sequence: Sequence) -> bool:
        """Whether the sequence is one of its outputs, or beams, still."""
        if self.beams is not None:
            return sequence.group is self.beams.group
        output = self.outputs.get(sequence.output_index)
        return output is not None and output.sequence is sequence
