"""The text of a chat's answer: as any text, but with the special tokens that its formats are marked by."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Tokenizer

from common.chat_formats import marks_of
from common.generation import ChatParsing
from worker.chat.parser import ChatParser
from worker.detokenizer import IncrementalDetokenizer


class MarkedDetokenizer:
    """Shows some special tokens; all others leave no trace."""

    def __init__(self, tokenizer: Tokenizer, marks: Mapping[int, str]) -> None:
        """`marks` are the special tokens to show, with their texts."""
        self._tokenizer = tokenizer
        self._marks = marks
        self._inner = IncrementalDetokenizer(tokenizer)

    def push(self, token_id: int) -> str:
        mark = self._marks.get(token_id)
        if mark is None:
            return self._inner.push(token_id)
        text = self._inner.flush()
        self._inner = IncrementalDetokenizer(self._tokenizer)
        return text + mark

    def flush(self) -> str:
        return self._inner.flush()


class ChatReader:
    """Makes what reads the answers of a model's chats."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}

    def __call__(self, parsing: ChatParsing) -> tuple[MarkedDetokenizer, ChatParser]:
        """Return what makes an answer's text and what takes it apart. Raises ValueError for an unknown format."""
        parser = ChatParser(parsing)
        wanted = marks_of(parsing.reasoning_format, parsing.tool_format)
        marks = {token_id: text for token_id, text in self._special.items() if text in wanted}
        return MarkedDetokenizer(self._tokenizer, marks), parser
