"""Sets a model's reasoning apart from its answer."""

from __future__ import annotations

from common.chat_formats import ReasoningFormat
from worker.chat.marks import num_undecided
from worker.engine.types import Parts


class ReasoningSplitter:
    """Follows an answer that may begin with reasoning; later marks are plain text.

    Newlines next to the marks are neither's: chat templates put them back when the parts come as a message again.
    Reasoning that the output's end cuts off is reasoning. What is held back for long is not looked at again, so that an
    answer of nothing but white space costs no more than another.
    """

    def __init__(self, format_: ReasoningFormat, *, inside: bool) -> None:
        """`inside` says that the prompt ends behind the mark of the beginning."""
        self._format = format_
        self._blanks: list[str] = []  # white space before anything else, in pieces
        self._num_newlines = 0  # held back: the reasoning's, if more of it follows
        self._held = ""  # what may be a mark, behind all of these
        self._is_open = inside
        self._has_content = False  # of the part that we are in
        self._is_before = not inside  # nothing but white space has come yet

    @property
    def is_over(self) -> bool:
        """Whether all further text is the answer's."""
        return not self._is_before and not self._is_open

    def push(self, text: str) -> Parts:
        """Return the answer's text and the reasoning that are certain now."""
        self._held += text
        if self._is_before:
            self._look_for_beginning()
        reasoning = self._take_reasoning() if self._is_open else ""
        answer = self._take_answer() if self.is_over else ""
        return Parts(answer, reasoning)

    def flush(self) -> Parts:
        """The output ends: return what was held back."""
        held, self._held = self._held, ""
        return Parts(reasoning=self._certain(held)) if self._is_open else Parts(self._take_blanks() + held)

    def _look_for_beginning(self) -> None:
        begin = self._format.begin
        stripped = self._held.lstrip()
        if len(stripped) < len(self._held):  # nothing else is held: what may be a mark has no white space in it
            self._blanks.append(self._held[: len(self._held) - len(stripped)])
            self._held = stripped
        if stripped.startswith(begin):
            self._blanks = []
            self._held = stripped[len(begin) :]
            self._is_before, self._is_open = False, True
        elif not begin.startswith(stripped):
            self._held = self._take_blanks() + stripped
            self._is_before, self._has_content = False, True  # an answer at once: its white space is its own

    def _take_blanks(self) -> str:
        taken, self._blanks = "".join(self._blanks), []
        return taken

    def _take_reasoning(self) -> str:
        end = self._format.end
        at = self._held.find(end)
        if at >= 0:
            taken, self._held = self._certain(self._held[:at]), self._held[at + len(end) :]
            self._is_open = self._has_content = False
            return taken
        decided = len(self._held) - num_undecided(self._held, (end,))
        certain, self._held = self._held[:decided], self._held[decided:]
        return self._certain(certain)

    def _certain(self, text: str) -> str:
        """Return what is reasoning now of the newlines held back and this text; hold the newlines that it ends with."""
        content = text.rstrip("\n")
        num_newlines, self._num_newlines = self._num_newlines, len(text) - len(content)
        if not content:
            self._num_newlines += num_newlines
            return ""
        return self._begun("\n" * num_newlines + content)

    def _take_answer(self) -> str:
        taken, self._held = self._held, ""
        return self._begun(taken)

    def _begun(self, text: str) -> str:
        """Return the text, without newlines at the beginning of its part."""
        if not self._has_content:
            text = text.lstrip("\n")
            self._has_content = bool(text)
        return text
