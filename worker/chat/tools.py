"""Finds tool calls in an answer's text, in each of the formats of `common/chat_formats.py`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final, Protocol

from common.generation import ToolCallDelta
from worker.chat.calls import CallScanner
from worker.chat.json_scan import ValueScanner
from worker.chat.marks import find_first, num_undecided
from worker.engine.types import Parts


class ToolParser(Protocol):
    """Text in, text and tool calls out. What turns out to be no call is text, as it stands."""

    @property
    def num_calls(self) -> int:
        """Calls that are whole."""
        ...

    def push(self, text: str) -> Parts: ...
    def flush(self) -> Parts:
        """The output ends."""
        ...


class _Blanks:
    """White space that is held back: text's, if more text follows, and nobody's before a call."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def before(self, text: str) -> str:
        """Return what of the blanks and this text is certain; hold what it ends with."""
        certain = text.rstrip()
        if certain:
            certain = self.take() + certain
        if blanks := text[len(text.rstrip()) :]:
            self._pieces.append(blanks)
        return certain

    def take(self) -> str:
        """Return the blanks, and hold none."""
        taken, self._pieces = "".join(self._pieces), []
        return taken


class HermesParser:
    """Calls between marks; plain text may stand around them, white space between calls is nobody's."""

    _BEGIN: Final = "<tool_call>"
    _END: Final = "</tool_call>"

    def __init__(self) -> None:
        self._held = ""  # outside a call: what may be a mark; inside: what the scanner has not taken
        self._blanks = _Blanks()
        self._mark = ""  # of the call's beginning, with the white space before it
        self._raw = ""  # that, and all that followed it
        self._scanner: CallScanner | None = None
        self.num_calls = 0

    def push(self, text: str) -> Parts:
        self._held += text
        parts = Parts()
        is_moving = True
        while is_moving:
            step, is_moving = self._outside() if self._scanner is None else self._inside(self._scanner)
            parts += step
        return parts

    def flush(self) -> Parts:
        held, self._held = self._held, ""
        if self._scanner is None:
            return Parts(self._blanks.take() + held)
        if self._scanner.name is None:
            raw, self._raw = self._raw, ""
            return Parts(raw + held)
        return Parts()

    def _outside(self) -> tuple[Parts, bool]:
        at = self._held.find(self._BEGIN)
        if at < 0:
            decided = len(self._held) - num_undecided(self._held, (self._BEGIN,))
            text, self._held = self._held[:decided], self._held[decided:]
            return Parts(self._blanks.before(text)), False
        before = self._blanks.before(self._held[:at])
        self._mark = self._raw = self._blanks.take() + self._BEGIN
        self._held = self._held[at + len(self._BEGIN) :]
        self._scanner = CallScanner(self.num_calls)
        return Parts(before), True

    def _inside(self, scanner: CallScanner) -> tuple[Parts, bool]:
        if scanner.is_done or scanner.is_bad:
            return Parts(), self._skip_to_end()
        text, self._held = self._held, ""
        self._raw += text
        deltas = scanner.push(text)
        if scanner.name is None and (scanner.is_bad or scanner.is_done):
            # Not the call that the mark promised: all of it is text, and the search goes on behind the mark.
            self._scanner = None
            self._held = self._raw[len(self._mark) :]
            return Parts(self._mark), True
        is_over = scanner.is_done or scanner.is_bad  # of a bad one the caller sees what the model wrote
        if is_over:
            self.num_calls += 1
            self._held = scanner.rest
        return Parts(calls=tuple(deltas)), is_over

    def _skip_to_end(self) -> bool:
        """Read over what stands before the mark of the end; return whether it was found."""
        at = self._held.find(self._END)
        if at < 0:
            keep = num_undecided(self._held, (self._END,))
            self._held = self._held[len(self._held) - keep :]
            return False
        self._held = self._held[at + len(self._END) :]
        self._scanner = None
        return True


class LlamaParser:
    """An answer that is nothing but objects, each the call of a tool that was offered; anything else is text."""

    _MARK: Final = "<|python_tag|>"
    _BETWEEN: Final = " \t\r\n;,"

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._raw: list[str] = []  # from where a call may have begun, to be given back as text
        self._begun = ""  # of that, what may be a mark or a call, without what stands before it
        self._is_marked = False
        self._scanner: CallScanner | None = None
        self._is_text = False
        self.num_calls = 0

    def push(self, text: str) -> Parts:
        if self._is_text:
            return Parts(text)
        self._raw.append(text)
        if self._scanner is not None:
            return self._scan(self._scanner, text)
        begun = self._strip(self._begun + text)
        if not self._is_marked and begun.startswith(self._MARK):
            self._is_marked = True
            begun = self._strip(begun[len(self._MARK) :])
        self._begun = begun
        if begun.startswith("{"):
            self._scanner = CallScanner(self.num_calls)
            return self._scan(self._scanner, begun)
        is_undecided = not begun or (not self._is_marked and self._MARK.startswith(begun))
        return Parts() if is_undecided else self._give_back()

    def flush(self) -> Parts:
        raw = self._take()
        return Parts() if self.num_calls and not raw.strip(self._BETWEEN) else Parts(raw)

    def _strip(self, text: str) -> str:
        return text.lstrip(self._BETWEEN if self.num_calls and not self._is_marked else None)

    def _take(self) -> str:
        """Return what would be given back; from now on it is nobody's."""
        taken, self._raw, self._begun, self._is_marked = "".join(self._raw), [], "", False
        return taken

    def _scan(self, scanner: CallScanner, text: str) -> Parts:
        deltas = scanner.push(text)
        if scanner.name is None:
            return self._give_back() if scanner.is_bad else Parts()
        if scanner.name not in self._names:
            return self._give_back()
        self._take()
        parts = Parts(calls=tuple(deltas))
        if scanner.is_bad:
            self.num_calls += 1  # its caller sees what the model made of the arguments
            self._is_text = True
            parts += Parts(scanner.rest)
        elif scanner.is_done:
            self.num_calls += 1
            self._scanner = None
            parts += self.push(scanner.rest)
        return parts

    def _give_back(self) -> Parts:
        self._is_text = True
        return self.flush()


class MistralParser:
    """Calls behind a mark: an array of objects, or a name, a second mark and its arguments."""

    _MARK: Final = "[TOOL_CALLS]"
    _CALL_ID: Final = "[CALL_ID]"
    _ARGS: Final = "[ARGS]"
    _MAX_NAME: Final = 256

    def __init__(self) -> None:
        self._held = ""
        self._blanks = _Blanks()
        self._mark = ""  # with the white space before it
        self._raw = ""  # that, and all that followed it, while it may turn out to be text
        self._scanner: CallScanner | None = None
        self._arguments: ValueScanner | None = None
        self._in_array = False
        self._state: Callable[[], Parts | None] = self._outside  # takes of what is held; None: needs more text
        self.num_calls = 0

    def push(self, text: str) -> Parts:
        self._held += text
        self._raw += text if self._raw else ""
        parts = Parts()
        while (step := self._state()) is not None:
            parts += step
        return parts

    def flush(self) -> Parts:
        held, self._held = self._held, ""
        if self._state == self._outside:
            return Parts(self._blanks.take() + held)
        raw, self._raw = self._raw, ""
        return Parts(raw)

    def _outside(self) -> Parts | None:
        at = self._held.find(self._MARK)
        if at >= 0:
            before = self._blanks.before(self._held[:at])
            self._mark = self._blanks.take() + self._MARK
            self._raw = self._mark + self._held[at + len(self._MARK) :]
            self._held = self._held[at + len(self._MARK) :]
            self._state = self._behind_mark
            return Parts(before)
        decided = len(self._held) - num_undecided(self._held, (self._MARK,))
        text, self._held = self._held[:decided], self._held[decided:]
        certain = self._blanks.before(text)
        return Parts(certain) if certain else None

    def _behind_mark(self) -> Parts | None:
        self._held = self._held.lstrip()
        if not self._held:
            return None
        self._in_array = self._held.startswith("[")
        if self._in_array:
            self._held = self._held[1:]
            self._state = self._between
        else:
            self._state = self._between if self._held.startswith("{") else self._name
        return Parts()

    def _between(self) -> Parts | None:
        """Before the first object, or behind one of an array."""
        self._held = self._held.lstrip(" \t\r\n,")
        if not self._held:
            return None
        if self._held.startswith("{"):
            self._scanner = CallScanner(self.num_calls)
            self._state = self._object
            if not self._raw:  # a later one of an array
                self._mark, self._raw = "", self._held
            return Parts()
        if self._raw:
            return self._give_back()
        self._held = self._held.removeprefix("]")
        self._state = self._outside
        return Parts()

    def _object(self) -> Parts | None:
        scanner = self._scanner
        assert scanner is not None
        if not self._held:
            return None
        text, self._held = self._held, ""
        deltas = scanner.push(text)
        if scanner.name is None:
            return self._give_back() if scanner.is_bad else Parts()
        self._raw = ""
        if scanner.is_done or scanner.is_bad:
            self.num_calls += 1
            self._held = scanner.rest
            self._state = self._between if self._in_array and scanner.is_done else self._outside
        return Parts(calls=tuple(deltas))

    def _name(self) -> Parts | None:
        at, mark = find_first(self._held, (self._ARGS, "{"))
        if at < 0:
            return self._give_back() if len(self._held) > self._MAX_NAME else None
        name = self._held[:at].split(self._CALL_ID)[0].strip()
        if not name or len(name) > self._MAX_NAME or any(character.isspace() for character in name):
            return self._give_back()
        self._held = self._held[at + len(mark) :] if mark == self._ARGS else self._held[at:]
        self._raw, self._arguments, self._state = "", ValueScanner(), self._behind_name
        return Parts(calls=(ToolCallDelta(self.num_calls, name),))

    def _behind_name(self) -> Parts | None:
        assert self._arguments is not None
        if not self._arguments.has_begun:
            self._held = self._held.lstrip()
        if not self._held:
            return None
        num_taken = self._arguments.push(self._held)
        piece, self._held = self._held[:num_taken], self._held[num_taken:]
        call = ToolCallDelta(self.num_calls, arguments=piece)
        if self._arguments.is_done:
            self.num_calls += 1
            self._state = self._outside
        return Parts(calls=(call,))

    def _give_back(self) -> Parts:
        """What followed the mark is no call: all of it is text, and the search goes on behind it."""
        self._held = self._raw[len(self._mark) :]
        self._raw, self._state = "", self._outside
        return Parts(self._mark)


def make_tool_parser(name: str, tool_names: Collection[str]) -> ToolParser:
    """Return the parser of a format."""
    match name:
        case "hermes" | "generic":
            return HermesParser()
        case "llama3":
            return LlamaParser(tool_names)
        case "mistral" | "mistral11":
            return MistralParser()
        case _:
            raise ValueError(f"no such tool format: {name}")
