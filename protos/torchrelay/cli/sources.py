"""Options of `torchrelay generate` that have a text translated or summarized."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Final

import typer

from torchrelay.client import make_summarization, make_translation, requests
from torchrelay.v1 import generation_pb2 as pb


class Truncation(StrEnum):
    """What is left out of a text that is too long for the model."""

    END = "end"
    START = "start"


_VALUES: Final[Mapping[Truncation, requests.Truncation]] = {Truncation.END: "end", Truncation.START: "start"}

TranslateToOption = Annotated[
    str | None, typer.Option("--translate-to", help="Translate into this language, as the model names it.")
]
TranslateFromOption = Annotated[str | None, typer.Option("--translate-from", help="The language of the text.")]
SummarizeOption = Annotated[bool, typer.Option("--summarize", help="Summarize the text.")]
TruncateOption = Annotated[
    Truncation | None, typer.Option("--truncate", help="Leave this out of a text that is too long for its encoder.")
]


def input_of(
    text: str, to: str | None, source: str | None, truncate: Truncation | None, *, summarize: bool
) -> pb.GenerationInput | None:
    """Return what was asked for; None where it is neither a translation nor a summary. Empty languages are the model's.

    Raises BadParameter for options that do not go together.
    """
    cut = None if truncate is None else _VALUES[truncate]
    if summarize:
        for option, value in (("--translate-to", to), ("--translate-from", source)):
            if value is not None:
                raise typer.BadParameter("not together with --summarize", param_hint=option)
        return make_summarization(text, truncation=cut)
    if to is not None or source is not None:
        return make_translation(text, to or "", source or "", truncation=cut)
    if truncate is not None:
        raise typer.BadParameter("needs --translate-to or --summarize", param_hint="--truncate")
    return None
