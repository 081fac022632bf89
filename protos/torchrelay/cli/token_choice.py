"""Options of `torchrelay generate` that change how tokens are chosen, and how their values are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import typer

_T = TypeVar("_T")

MinTokensOption = Annotated[int | None, typer.Option("--min-tokens", help="The answer does not end before.")]
MinLengthOption = Annotated[int | None, typer.Option("--min-length", help="Likewise, the prompt included.")]
MaxLengthOption = Annotated[int | None, typer.Option("--max-length", help="Most tokens, the prompt included.")]
IgnoreEosOption = Annotated[bool | None, typer.Option("--ignore-eos", help="The model's own ends do not end.")]
StopTokenIdOption = Annotated[list[int] | None, typer.Option("--stop-token-id", help="Ends the answer; repeatable.")]
TypicalPOption = Annotated[float | None, typer.Option("--typical-p", help="Typical sampling; 1 is off.")]
EpsilonCutoffOption = Annotated[float | None, typer.Option("--epsilon-cutoff", help="Least probability; 0 is off.")]
EtaCutoffOption = Annotated[float | None, typer.Option("--eta-cutoff", help="Least, by the entropy; 0 is off.")]
TopHOption = Annotated[float | None, typer.Option("--top-h", help="Share of the entropy; 0 is off.")]
PresencePenaltyOption = Annotated[float | None, typer.Option("--presence-penalty", help="0 is off.")]
FrequencyPenaltyOption = Annotated[float | None, typer.Option("--frequency-penalty", help="0 is off.")]
BadWordOption = Annotated[list[str] | None, typer.Option("--bad-word", help="Does not occur; repeatable.")]
BadWordsIdsOption = Annotated[
    list[str] | None, typer.Option("--bad-words-ids", metavar="ID,ID...", help="Do not occur; repeatable.")
]
LogitBiasOption = Annotated[
    list[str] | None, typer.Option("--logit-bias", metavar="ID=BIAS", help="Added to a score; repeatable.")
]
SequenceBiasOption = Annotated[
    list[str] | None,
    typer.Option("--sequence-bias", metavar="ID,ID...=BIAS", help="Added to the last id's score; repeatable."),
]
SuppressTokenOption = Annotated[list[int] | None, typer.Option("--suppress-token", help="Never chosen; repeatable.")]
BeginSuppressTokenOption = Annotated[
    list[int] | None, typer.Option("--begin-suppress-token", help="Not chosen first; repeatable.")
]
ExponentialDecayOption = Annotated[
    str | None,
    typer.Option("--exponential-decay-length-penalty", metavar="START,FACTOR", help="Ends grow likelier."),
]
ForcedEosOption = Annotated[int | None, typer.Option("--forced-eos-token-id", help="The last token of a full answer.")]
ForcedBosOption = Annotated[int | None, typer.Option("--forced-bos-token-id", help="The answer's first token.")]
EncoderRepetitionPenaltyOption = Annotated[
    float | None, typer.Option("--encoder-repetition-penalty", help="Favours the prompt's tokens; 1 is off.")
]
EncoderNGramOption = Annotated[
    int | None, typer.Option("--encoder-no-repeat-ngram-size", help="N-grams of the prompt; 0 is off.")
]


def phrases_of(values: Sequence[str] | None) -> list[list[int]] | None:
    """Read "5,6,7"."""
    return _each(values, "--bad-words-ids", _ids)


def biases_of(values: Sequence[str] | None) -> dict[int, float] | None:
    """Read "5=1.5"; of equal ids the last one counts."""
    found = _each(values, "--logit-bias", lambda text: (int(_split(text)[0]), float(_split(text)[1])))
    return None if found is None else dict(found)


def phrase_biases_of(values: Sequence[str] | None) -> list[tuple[list[int], float]] | None:
    """Read "5,6=1.5"."""
    return _each(values, "--sequence-bias", lambda text: (_ids(_split(text)[0]), float(_split(text)[1])))


def decay_of(value: str | None) -> tuple[int, float] | None:
    """Read "20,1.1"."""
    if value is None:
        return None
    (found,) = _each([value], "--exponential-decay-length-penalty", _pair) or []
    return found


def _pair(text: str) -> tuple[int, float]:
    start, factor = text.split(",")
    return int(start), float(factor)


def _ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _split(text: str) -> tuple[str, str]:
    ids, bias = text.split("=")
    return ids, bias


def _each(values: Sequence[str] | None, option: str, read: Callable[[str], _T]) -> list[_T] | None:
    """Raises typer.BadParameter. None stays None, and nothing given is None."""
    if not values:
        return None
    try:
        return [read(value) for value in values]
    except ValueError:
        raise typer.BadParameter("is not written as the help says", param_hint=option) from None
