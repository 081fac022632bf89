"""From the JSON text of one tool call to its name and pieces of its arguments."""

from __future__ import annotations

import json
from typing import Final

from common.generation import ToolCallDelta
from worker.chat.json_scan import ObjectScanner, ValuePiece

# Characters before a call's name. What followed a mark in vain is read again, once for each mark in it.
_MAX_NAMELESS: Final = 1024
_NAME = "name"
_ARGUMENTS = ("arguments", "parameters")  # Llama says parameters


class CallScanner:
    """Follows {"name": ..., "arguments": {...}}, in whatever order; further keys are read over.

    Arguments are passed on as they stand, once the name is known. Where a model writes them as a JSON string, which
    holds the object's text once more, they come whole at the string's end.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self._object = ObjectScanner()
        self._name_text = ""
        self._num_read = 0  # before the name was known
        self._arguments = ""  # not passed on yet
        self._is_string: bool | None = None
        self._has_arguments = False
        self._are_arguments_whole = False
        self._is_nameless = False
        self.name: str | None = None  # None until it is known

    @property
    def is_done(self) -> bool:
        return self._object.is_done

    @property
    def is_bad(self) -> bool:
        """Whether the text is no call; what has been returned of it stays."""
        return self._is_nameless or self._object.is_bad

    @property
    def rest(self) -> str:
        return self._object.rest

    def push(self, text: str) -> list[ToolCallDelta]:
        """Return what is new of the call."""
        if self.name is not None:
            return self._read(text)
        head, rest = text[: _MAX_NAMELESS - self._num_read], text[_MAX_NAMELESS - self._num_read :]
        self._num_read += len(head)
        deltas = self._read(head)
        if self.is_done or self.is_bad:
            self._object.rest += rest
        elif self.name is not None:
            deltas += self._read(rest)
        elif rest:
            self._is_nameless = True
        return deltas

    def _read(self, text: str) -> list[ToolCallDelta]:
        deltas: list[ToolCallDelta] = []
        for piece in self._object.push(text):
            if piece.key == _NAME and self.name is None:
                deltas += self._take_name(piece)
            elif piece.key in _ARGUMENTS:
                deltas += self._take_arguments(piece)
            if self._is_nameless:
                return []
        if self.is_done and self.name is None:
            self._is_nameless = True
        elif self.is_done and not self._has_arguments:
            deltas.append(ToolCallDelta(self.index, arguments="{}"))
        return deltas

    def _take_name(self, piece: ValuePiece) -> list[ToolCallDelta]:
        self._name_text += piece.text
        if not self._name_text.startswith('"'):
            self._is_nameless = True
            return []
        if not piece.is_end:
            return []
        name = _string(self._name_text)
        if not name:
            self._is_nameless = True
            return []
        self.name = name
        return [ToolCallDelta(self.index, name), *self._release()]

    def _take_arguments(self, piece: ValuePiece) -> list[ToolCallDelta]:
        if self._are_arguments_whole:
            return []  # a second time: the first one counts
        if self._is_string is None:
            self._is_string = piece.text.startswith('"')
        self._has_arguments = True
        self._are_arguments_whole = piece.is_end
        self._arguments += piece.text
        if self._is_string:
            if not piece.is_end:
                return []
            # What cannot be read is passed on as it is: the caller sees what the model wrote.
            self._arguments = _string(self._arguments) or self._arguments
            self._is_string = False
        return self._release() if self.name is not None else []

    def _release(self) -> list[ToolCallDelta]:
        if self._is_string or not self._arguments:
            return []
        arguments, self._arguments = self._arguments, ""
        return [ToolCallDelta(self.index, arguments=arguments)]


def _string(text: str) -> str | None:
    """Return the string that a JSON text stands for; None for another value, and for half a surrogate pair."""
    try:
        value = json.loads(text)
        if isinstance(value, str):
            value.encode()
            return value
    except (ValueError, RecursionError):  # UnicodeEncodeError too
        pass
    return None
