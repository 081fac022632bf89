"""Sets a model's reasoning apart from its answer."""

from __future__ import annotations

from common.chat_formats import ReasoningFormat
from worker.chat.marks import num_undecided
from worker.engine.types import Parts


class ReasoningSplitter:
    """Follows an answer that may begin with reasoning; later marks are plain text.

    Newlines next to the marks are neither's: chat templates put them back when the parts come as a message again.
    Reasoning that the output's end cuts off is reasoning.
    """

    def __init__(self, format_: ReasoningFormat, *, inside: bool) -> None:
        """`inside` says that the prompt ends behind the mark of the beginning."""
        self._format = format_
        self._held = ""  # what may be a mark or its newlines
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
        if self._is_open:
            return Parts(reasoning=held.rstrip("\n") if self._has_content else held.strip("\n"))
        return Parts(held)

    def _look_for_beginning(self) -> None:
        begin = self._format.begin
        stripped = self._held.lstrip()
        if stripped.startswith(begin):
            self._held = stripped[len(begin) :]
            self._is_before, self._is_open = False, True
        elif not begin.startswith(stripped):
            self._is_before, self._has_content = False, True  # an answer at once: its white space is its own

    def _take_reasoning(self) -> str:
        end = self._format.end
        at = self._held.find(end)
        if at >= 0:
            taken, self._held = self._held[:at].rstrip("\n"), self._held[at + len(end) :]
            taken = taken if self._has_content else taken.lstrip("\n")
            self._is_open = self._has_content = False
            return taken
        certain = self._held[: len(self._held) - num_undecided(self._held, (end,))].rstrip("\n")
        self._held = self._held[len(certain) :]
        return self._begun(certain)

    def _take_answer(self) -> str:
        taken, self._held = self._held, ""
        return self._begun(taken)

    def _begun(self, text: str) -> str:
        """Return the text, without newlines at the beginning of its part."""
        if not self._has_content:
            text = text.lstrip("\n")
            self._has_content = bool(text)
        return text
