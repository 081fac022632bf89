"""When an output ends and which of its text may be shown. A pure function of the output's token ids.

Text is held back in two cases: inside a character whose bytes are not all there (the detokenizer's business), and while
the end of the text may be the beginning of a stop string:

    stop string "\\nUser:"      tokens  "Sure" "." "\\n" "Use" " it"
                               text    "Sure" "." ""    ""    "\\nUse it"

Since the state depends on nothing but the ids, a takeover pushes the emitted ids once more, drops the text that comes
out, and goes on exactly where the log ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.generation import FinishReason, SamplingParams, ToolCallDelta
from worker.engine.grammar import Matcher
from worker.engine.types import Parts


class Detokenizer(Protocol):
    """Token ids in, text out; see `worker.detokenizer`."""

    def push(self, token_id: int) -> str:
        """Return the text that is complete with this token."""
        ...

    def flush(self) -> str:
        """Return what is held back; nothing is pushed afterwards."""
        ...


class TextParser(Protocol):
    """Text in, its parts out; see `worker.chat.parser`."""

    @property
    def num_calls(self) -> int:
        """Tool calls that are whole."""
        ...

    @property
    def has_enough(self) -> bool:
        """Whether the output ends here, since as many tools were called as may be."""
        ...

    def push(self, text: str) -> Parts: ...
    def flush(self) -> Parts:
        """Return what is held back; nothing is pushed afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """What one token did to an output."""

    text: str = ""
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None
    reasoning_text: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class StopStringFilter:
    """Passes text on, up to the first occurrence of a stop string."""

    def __init__(self, stop_strings: Sequence[str], *, include: bool = False) -> None:
        """`include` passes that occurrence on too."""
        self._include = include
        self._stop_strings = tuple(s for s in stop_strings if s)
        self._longest = max((len(s) for s in self._stop_strings), default=0)
        self._held = ""  # a proper prefix of some stop string, or empty
        self._num_early = 0  # of the held characters, those that came when the text might not end

    def push(self, text: str, *, may_end: bool = True) -> tuple[str, str | None]:
        """Return the text that can no longer be part of a stop string, and the stop string that was found.

        Of several in the same text the one that begins first wins, then the one named first. One that is complete while
        the text may not end is ordinary text; one that is begun then counts.
        """
        if not self._stop_strings:
            return text, None
        buffer = self._held + text
        early = self._num_early if may_end else len(buffer)
        found = [(start, s) for s in self._stop_strings if (start := _find(buffer, s, early)) >= 0]
        if found:
            start, stop_string = min(found, key=lambda match: match[0])
            self._held = ""
            return buffer[: start + len(stop_string) if self._include else start], stop_string
        keep = self._first_possible_start(buffer)
        self._held = buffer[keep:]
        self._num_early = max(0, early - keep)
        return buffer[:keep], None

    def flush(self) -> str:
        """The text ends here: what was held back is ordinary text."""
        held, self._held = self._held, ""
        return held

    def _first_possible_start(self, buffer: str) -> int:
        for start in range(max(0, len(buffer) - self._longest + 1), len(buffer)):
            tail = buffer[start:]
            if any(s.startswith(tail) for s in self._stop_strings):
                return start
        return len(buffer)


def _find(text: str, stop_string: str, num_early: int) -> int:
    """Where it first stands and ends behind the first `num_early` characters; -1 if nowhere."""
    return text.find(stop_string, max(0, num_early - len(stop_string) + 1))


class StopState:
    """Follows one output, token by token, until it ends."""

    def __init__(
        self,
        sampling: SamplingParams,
        max_tokens: int,
        detokenizer: Detokenizer,
        parser: TextParser | None = None,
        matcher: Matcher | None = None,
    ) -> None:
        """`max_tokens` is the request's, cut to what the model's context leaves; `matcher` follows the output.

        Without a parser text is text.
        """
        self._matcher = matcher
        self._stop_token_ids = frozenset(sampling.stop_token_ids)
        self._min_tokens = sampling.min_tokens
        self._max_tokens = max_tokens
        self._detokenizer = detokenizer
        self._filter = StopStringFilter(sampling.stop_strings, include=sampling.include_stop)
        self._parser = parser
        self._num_tokens = 0
        self.finished: Progress | None = None

    def push(self, token_id: int) -> Progress:
        """Take the next token. The first of these ends the output: a stop id, a stop string, as many tool calls as may
        be, a grammar that allows nothing more, the last token allowed.

        A stop id adds no text of its own; what was held back before it is shown. Before min_tokens no stop string ends
        the output; the sampler then chooses no stop id. Raises GrammarFailure for a token that the grammar does not
        allow; the output cannot go on then.
        """
        assert self.finished is None, "the output has ended"
        self._num_tokens += 1
        if token_id in self._stop_token_ids:
            return self._finish(Parts(), FinishReason.STOP, token_id)
        if self._matcher is not None:
            self._matcher.push(token_id)
        may_end = self._num_tokens >= self._min_tokens
        text, stop_string = self._filter.push(self._detokenizer.push(token_id), may_end=may_end)
        parts = self._parse(text)
        if stop_string is not None:
            return self._end(parts, FinishReason.STOP, stop_string)
        if self._parser is not None and self._parser.has_enough:
            return self._end(parts, FinishReason.TOOL_CALLS)
        if self._matcher is not None and self._matcher.is_complete:
            return self._finish(parts, FinishReason.STOP)
        if self._num_tokens >= self._max_tokens:
            return self._finish(parts, FinishReason.LENGTH)
        return Progress(parts.text, reasoning_text=parts.reasoning, tool_calls=parts.calls)

    def end(self, reason: FinishReason) -> Progress:
        """End the output from outside: its time is over, or it was cancelled."""
        assert self.finished is None, "the output has ended"
        return self._finish(Parts(), reason)

    def _finish(self, parts: Parts, reason: FinishReason, stop_match: int | None = None) -> Progress:
        """End with all that is held back, unless that holds a stop string."""
        may_end = self._num_tokens >= self._min_tokens
        rest, stop_string = self._filter.push(self._detokenizer.flush(), may_end=may_end)
        if stop_string is not None:
            return self._end(parts + self._parse(rest), FinishReason.STOP, stop_string)
        return self._end(parts + self._parse(rest + self._filter.flush()), reason, stop_match)

    def _end(self, parts: Parts, reason: FinishReason, stop_match: str | int | None = None) -> Progress:
        if self._parser is not None:
            parts += self._parser.flush()
            if reason is FinishReason.STOP and not isinstance(stop_match, str) and self._parser.num_calls:
                reason, stop_match = FinishReason.TOOL_CALLS, None  # the model waits for what the tools answer
        self.finished = Progress(parts.text, reason, stop_match, parts.reasoning, parts.calls)
        return self.finished

    def _parse(self, text: str) -> Parts:
        return Parts(text) if self._parser is None else self._parser.push(text)
