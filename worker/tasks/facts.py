"""What an encoder model is for: what its forward pass gives, and what answers are made of that. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from common.tasks import ScoreFunction, TaskName


class Head(StrEnum):
    """What a model's last layer gives of a text of T tokens."""

    VECTOR = "vector"  # [dimensions]: the text as a whole
    LABELS = "labels"  # [num_labels]: logits of the text as a whole
    TOKEN_LABELS = "token_labels"  # [T, num_labels]: logits of each token
    SPANS = "spans"  # [T, 2]: logits that the answer begins with a token, and ends with it


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderFacts:
    """Of one model."""

    head: Head
    labels: tuple[str, ...] = ()  # in the order of the logits
    function: ScoreFunction = ScoreFunction.SOFTMAX  # what turns logits into scores by default
    normalizes: bool = False  # its vectors have length 1 by default
    dimensions: int = 0  # of its vectors

    @property
    def tasks(self) -> tuple[TaskName, ...]:
        """What it can do."""
        match self.head:
            case Head.VECTOR:
                return (TaskName.EMBED,)
            case Head.LABELS if len(self.labels) == 1:
                return (TaskName.CLASSIFY, TaskName.RERANK)
            case Head.LABELS:
                return (TaskName.CLASSIFY,)
            case Head.TOKEN_LABELS:
                return (TaskName.CLASSIFY_TOKENS,)
            case Head.SPANS:
                return (TaskName.ANSWER_QUESTION,)
