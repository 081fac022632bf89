"""Follows JSON objects as their text arrives, character by character, without waiting for their end."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

_SPACE = " \t\r\n"


class ValuePiece(NamedTuple):
    """A piece of the text of the value of one of the object's own keys."""

    key: str
    text: str
    is_end: bool  # the value is whole with it


class _At(Enum):
    START = "start"
    KEY_OR_END = "key or end"
    KEY = "key"
    COLON = "colon"
    VALUE = "value"
    INSIDE = "inside"
    COMMA_OR_END = "comma or end"
    END = "end"
    NOWHERE = "nowhere"


class ValueScanner:
    """Finds the end of one JSON value. Knows strings and brackets; what stands between them is not checked."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._is_scalar = False
        self.has_begun = False
        self.is_done = False

    def push(self, text: str) -> int:
        """Return how many of the characters belong to the value, all until it is done."""
        for index, character in enumerate(text):
            if self._take(character):
                self.is_done = True
                return index + (not self._is_scalar)
        return len(text)

    def _take(self, character: str) -> bool:
        """Return whether the value ends here: with this character, or before it if it is a bare word or number."""
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._in_string = False
                return self._depth == 0
            return False
        if character == '"' and not self._is_scalar:
            self._in_string = self.has_begun = True
        elif character in "{[" and not self._is_scalar:
            self.has_begun = True
            self._depth += 1
        elif character in "}]" and self._depth:
            self._depth -= 1
            return self._depth == 0
        elif self._depth == 0:
            if not self.has_begun:
                self.has_begun = self._is_scalar = True
            return character in _SPACE or character in ",}]"
        return False


class ObjectScanner:
    """Follows one object, as far as the text is one. `rest` is what came behind its end, or behind the fault."""

    def __init__(self) -> None:
        self._at = _At.START
        self._key = ""
        self._value = ValueScanner()
        self.rest = ""

    @property
    def is_done(self) -> bool:
        return self._at is _At.END

    @property
    def is_bad(self) -> bool:
        """Whether the text is no JSON object."""
        return self._at is _At.NOWHERE

    def push(self, text: str) -> list[ValuePiece]:
        """Return the pieces of values in it."""
        pieces: list[ValuePiece] = []
        position = 0
        while position < len(text) and not (self.is_done or self.is_bad):
            if self._at is _At.INSIDE or self._at is _At.KEY:
                position = self._inside(text, position, pieces)
            else:
                position = self._between(text, position)
        if self.is_done or self.is_bad:
            self.rest += text[position:]
        return pieces

    def _inside(self, text: str, position: int, pieces: list[ValuePiece]) -> int:
        part = text[position:]
        part = part[: self._value.push(part)]
        if self._at is _At.KEY:
            self._key += part
            if self._value.is_done:
                self._key = self._key[1:-1]
                self._at = _At.COLON
        else:
            pieces.append(ValuePiece(self._key, part, self._value.is_done))
            if self._value.is_done:
                self._at = _At.COMMA_OR_END
        return position + len(part)

    def _between(self, text: str, position: int) -> int:
        character = text[position]
        if character in _SPACE:
            return position + 1
        match self._at, character:
            case _At.START, "{":
                self._at = _At.KEY_OR_END
            case ((_At.KEY_OR_END | _At.COMMA_OR_END), "}"):
                self._at = _At.END
            case _At.KEY_OR_END, '"':
                self._at, self._key, self._value = _At.KEY, "", ValueScanner()
                return position
            case _At.COLON, ":":
                self._at, self._value = _At.VALUE, ValueScanner()
            case _At.COMMA_OR_END, ",":
                self._at = _At.KEY_OR_END
            case _At.VALUE, _ if character not in ",}]:":
                self._at = _At.INSIDE
                return position
            case _:
                self._at = _At.NOWHERE
                return position
        return position + 1
