"""Token ids to text, one token at a time, never half a character.

A byte-level vocabulary spreads one character over several tokens, and sentencepiece decoders treat the first token of a
text in a way of their own (a leading space is dropped). So a token is decoded together with a few before it, and the
new text is what that adds. While the text ends in U+FFFD the last character may be incomplete and is held back.

The pieces joined equal `tokenizer.decode(all_ids, skip_special_tokens=True)` for byte-level vocabularies. With
byte-fallback vocabularies (`<0xE2>`) one case differs: their decoder turns a whole run of byte tokens into U+FFFD when
any of it is invalid, also the characters in it that were complete and shown; those stay.
"""

from __future__ import annotations

from typing import Final

from tokenizers import Tokenizer

_REPLACEMENT: Final = "\ufffd"
_MAX_TOKENS_OF_CHARACTER: Final = 4  # UTF-8 takes at most four bytes, and a token holds at least one
_MAX_WINDOW: Final = 256  # bounds the work on endless invalid bytes


class IncrementalDetokenizer:
    """The text of one output; special tokens leave no trace in it, unless they are to be shown too."""

    __slots__ = ("_num_held", "_num_shown", "_shown", "_shows_special", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, *, shows_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._shows_special = shows_special
        self._window: list[int] = []  # the tokens of the latest piece, then those not shown yet
        self._num_shown = 0  # of the window's tokens, how many the shown text covers
        self._shown = ""  # the part of the window's text that was returned
        self._num_held = 0

    def __copy__(self) -> IncrementalDetokenizer:
        other = IncrementalDetokenizer(self._tokenizer, shows_special=self._shows_special)
        other._window, other._num_shown = self._window[:], self._num_shown
        other._shown, other._num_held = self._shown, self._num_held
        return other

    def push(self, token_id: int) -> str:
        """Return the text that is complete with this token; often a word, empty inside a character."""
        self._window.append(token_id)
        self._num_held += 1
        text = self._decode(self._window)
        if not text.endswith(_REPLACEMENT) or len(self._window) >= _MAX_WINDOW:
            return self._show_all(text)
        if self._num_held < _MAX_TOKENS_OF_CHARACTER:
            return ""
        # So many tokens hold a whole character or an invalid one: only the last U+FFFD can still become something else.
        text = text[: -len(_REPLACEMENT)]
        piece = self._new_part(text)
        self._shown = text if piece else self._shown
        return piece

    def flush(self) -> str:
        """Return the rest: what an incomplete last character decodes to."""
        piece = self._new_part(self._decode(self._window))
        self._window, self._num_shown, self._shown, self._num_held = [], 0, "", 0
        return piece

    def _show_all(self, text: str) -> str:
        piece = self._new_part(text)
        self._num_held = 0
        if piece:
            self._rebase(self._num_shown)
        elif len(self._window) >= _MAX_WINDOW:  # special tokens without end
            self._rebase(len(self._window) - _MAX_TOKENS_OF_CHARACTER)
        return piece

    def _rebase(self, start: int) -> None:
        """Let the window begin at this token of it, with everything in it shown."""
        self._window = self._window[start:]
        self._num_shown = len(self._window)
        self._shown = self._decode(self._window)

    def _new_part(self, text: str) -> str:
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        # What follows changed what was shown (see the module's docstring): decode the rest by itself.
        return self._decode(self._window[self._num_shown :])

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=not self._shows_special))
