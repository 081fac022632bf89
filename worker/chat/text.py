"""The text of a chat's answer: as any text, but with the special tokens that its formats are marked by."""

from __future__ import annotations

import copy

from tokenizers import Tokenizer

from common.chat_formats import marks_of
from common.generation import ChatParsing
from worker.chat.parser import ChatParser
from worker.detokenizer import IncrementalDetokenizer


class MarkedDetokenizer:
    """Shows some special tokens; all others leave no trace.

    What follows a mark is decoded with it, since it is not the text's beginning: decoders of sentencepiece's kind drop
    the space of a first token.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]) -> None:
        """`hidden` are the special tokens that are not shown."""
        self._hidden = hidden
        self._inner = IncrementalDetokenizer(tokenizer, shows_special=True)

    def __copy__(self) -> MarkedDetokenizer:
        other = object.__new__(MarkedDetokenizer)
        other._hidden, other._inner = self._hidden, copy.copy(self._inner)
        return other

    def push(self, token_id: int) -> str:
        return "" if token_id in self._hidden else self._inner.push(token_id)

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
        hidden = frozenset(token_id for token_id, text in self._special.items() if text not in wanted)
        return MarkedDetokenizer(self._tokenizer, hidden), parser
