"""Texts and pairs of texts as encoder models read them: cut to length, in windows, with where their tokens stand. Pure.

A tokenizer cuts by settings of its own, which one call must not change for others, so what it made is cut here: tokens
of a text leave at its end, those that the tokenizer put around and between texts stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from tokenizers import Encoding, Tokenizer

from common.tasks import EncodedText, TokenSpans, pack_ids

_OUTSIDE: Final = -1


class Cut(Enum):
    """Which text of a pair gives way where both are too long."""

    LONGEST = "longest"
    SECOND = "second"


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a tokenizer made of a text or a pair. All of equal length."""

    ids: list[int]
    types: list[int]
    owners: list[int | None]  # 0: of the first text, 1: of the second, None: of neither
    offsets: list[tuple[int, int]]  # in characters of the owner

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, encoding: Encoding) -> Tokens:
        return cls(encoding.ids, encoding.type_ids, encoding.sequence_ids, encoding.offsets)

    def count(self, owner: int | None) -> int:
        """How many tokens are a text's, or of neither text."""
        return self.owners.count(owner)

    def keep(self, kept: Sequence[int]) -> Tokens:
        """Return the tokens at these places alone."""
        return Tokens(
            [self.ids[i] for i in kept],
            [self.types[i] for i in kept],
            [self.owners[i] for i in kept],
            [self.offsets[i] for i in kept],
        )

    def encoded(self) -> EncodedText:
        """Return them as they are stored."""
        return EncodedText(pack_ids(self.ids), bytes(self.types) if any(self.types) else b"")

    def places(self, owner: int) -> list[int]:
        """Return where a text's tokens stand."""
        return [i for i, one in enumerate(self.owners) if one == owner]


def whole(encoding: Encoding) -> EncodedText:
    """Return what a tokenizer made as it is stored, where nothing of it is cut and nobody asks where tokens stand."""
    types = encoding.type_ids
    return EncodedText(pack_ids(encoding.ids), bytes(types) if any(types) else b"")


def cut(tokens: Tokens, max_tokens: int, side: Cut = Cut.LONGEST, *, at_start: bool = False) -> Tokens:
    """Return at most `max_tokens`, without the last ones of a text, or the first; of a pair by the rule of `side`.

    As tokenizers do it (`truncate_encodings`, LongestFirst and OnlySecond). A text that is not to give way may leave
    more than that.
    """
    if len(tokens) <= max_tokens:
        return tokens
    room = max(0, max_tokens - tokens.count(None))
    first, second = tokens.count(0), tokens.count(1)
    rooms = (first, max(0, room - first)) if side is Cut.SECOND else _longest_first(first, second, room)
    kept: list[int] = []
    for owner in (0, 1):
        places = tokens.places(owner)
        kept += places[len(places) - rooms[owner] :] if at_start else places[: rooms[owner]]
    around = [place for place, owner in enumerate(tokens.owners) if owner is None]
    return tokens.keep(sorted([*kept, *around]))


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of each text stay."""
    is_swapped = first > second
    short, long = sorted((first, second))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (long, short) if is_swapped else (short, long)


def windows(tokens: Tokens, max_tokens: int, overlap: int) -> list[Tokens]:
    """Return a pair in pieces of at most `max_tokens`: the first text in each, of the second overlapping parts.

    `overlap` is less than the room that is left for the second text.
    """
    second = tokens.places(1)
    width = max_tokens - (len(tokens) - len(second))
    if len(second) <= width:
        return [tokens]
    pieces = []
    for start in range(0, len(second) - overlap, width - overlap):
        inside = set(second[start : start + width])
        pieces.append(tokens.keep([i for i, owner in enumerate(tokens.owners) if owner != 1 or i in inside]))
    return pieces


class WordMarks:
    """Where words begin, as far as a tokenizer's tokens tell it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        model = tokenizer.model
        # WordPiece marks what goes on with a word; other models' tokens do not say it, so that blanks have to.
        self._prefix = getattr(model, "continuing_subword_prefix", None) or ""

    def spans(self, tokens: Tokens, owner: int, text: str) -> TokenSpans:
        """Return where the tokens of `text`, which is the one of this number, stand in it."""
        starts, ends, begins = [], [], bytearray()
        for token_id, one, (start, end) in zip(tokens.ids, tokens.owners, tokens.offsets, strict=True):
            is_own = one == owner
            starts.append(start if is_own else _OUTSIDE)
            ends.append(end if is_own else _OUTSIDE)
            begins.append(is_own and self._begins_word(token_id, start, text))
        return TokenSpans(pack_ids(starts), pack_ids(ends), bytes(begins))

    def _begins_word(self, token_id: int, start: int, text: str) -> bool:
        if self._prefix:
            token = self._tokenizer.id_to_token(token_id)
            return token is None or not token.startswith(self._prefix)
        return start == 0 or any(character.isspace() for character in text[start - 1 : start + 1])
