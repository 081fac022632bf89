"""An answer of a chat, taken apart as it arrives. A pure function of its text, hence of its token ids."""

from __future__ import annotations

from common.chat_formats import REASONING_FORMATS
from common.generation import ChatParsing
from worker.chat.reasoning import ReasoningSplitter
from worker.chat.tools import make_tool_parser
from worker.engine.types import Parts


class ChatParser:
    """First reasoning, then text and tool calls; what looks like a call inside the reasoning is reasoning."""

    def __init__(self, parsing: ChatParsing) -> None:
        """Raises ValueError for a format that is not known here."""
        if parsing.reasoning_format and parsing.reasoning_format not in REASONING_FORMATS:
            raise ValueError(f"no such reasoning format: {parsing.reasoning_format}")
        self._reasoning = (
            ReasoningSplitter(REASONING_FORMATS[parsing.reasoning_format], inside=parsing.in_reasoning)
            if parsing.reasoning_format
            else None
        )
        self._tools = make_tool_parser(parsing.tool_format, parsing.tool_names) if parsing.tool_format else None
        self._max_calls = parsing.max_tool_calls

    @property
    def num_calls(self) -> int:
        """Tool calls that are whole."""
        return self._tools.num_calls if self._tools is not None else 0

    @property
    def has_enough(self) -> bool:
        """Whether as many tools were called as may be."""
        return 0 < self._max_calls <= self.num_calls

    def push(self, text: str) -> Parts:
        """Return what may be shown now."""
        parts = Parts(text) if self._reasoning is None else self._reasoning.push(text)
        return parts if self._tools is None or not parts.text else _answer(self._tools.push(parts.text), parts)

    def flush(self) -> Parts:
        """The output ends: return what was held back."""
        parts = Parts() if self._reasoning is None else self._reasoning.flush()
        if self._tools is None:
            return parts
        pushed = self._tools.push(parts.text)
        return _answer(pushed + self._tools.flush(), parts)


def _answer(answer: Parts, parts: Parts) -> Parts:
    return Parts(answer.text, parts.reasoning, answer.calls)
