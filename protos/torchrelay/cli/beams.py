"""Options of `torchrelay generate` for beam search."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from torchrelay.v1 import generation_pb2 as pb


class EarlyStopping(Enum):
    """When a search ends that has as many complete sequences as beams."""

    HEURISTIC = "heuristic"
    WHEN_FULL = "when-full"
    NEVER = "never"


_VALUES = {
    EarlyStopping.HEURISTIC: pb.EARLY_STOPPING_HEURISTIC,
    EarlyStopping.WHEN_FULL: pb.EARLY_STOPPING_WHEN_FULL,
    EarlyStopping.NEVER: pb.EARLY_STOPPING_NEVER,
}

NumBeamsOption = Annotated[
    int | None, typer.Option("--num-beams", min=1, help="Beam search of this width; the answer comes at the end.")
]
LengthPenaltyOption = Annotated[
    float | None, typer.Option("--length-penalty", help="With beams: above 0 favours longer answers, below 0 shorter.")
]
EarlyStoppingOption = Annotated[
    EarlyStopping | None, typer.Option("--early-stopping", help="With beams: when the search ends.")
]
RenormalizeOption = Annotated[
    bool | None, typer.Option("--renormalize-logits", help="With beams: normalize scores after all processors.")
]


def early_stopping_of(value: EarlyStopping | None) -> pb.EarlyStopping.ValueType | None:
    """Return the value as requests have it."""
    return None if value is None else _VALUES[value]
