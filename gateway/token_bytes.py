"""The bytes of single tokens. A token may be a part of a character, so its text alone says too little."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from tokenizers import Tokenizer

_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Looks tokens up. Thread-safe."""

    def __init__(self, tokenizer_json: bytes, tokenizer: Tokenizer) -> None:
        kinds = _decoder_kinds(json.loads(tokenizer_json).get("decoder"))
        self._tokenizer = tokenizer
        self._added = {i: token.content.encode() for i, token in tokenizer.get_added_tokens_decoder().items()}
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_tokens = "ByteFallback" in kinds
        self._is_metaspace = "Metaspace" in kinds or self._has_byte_tokens

    def __call__(self, token_id: int) -> bytes:
        """Return the bytes; empty for an id that is no token."""
        if token_id in self._added:
            return self._added[token_id]
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self._is_byte_level:
            return b"".join(_LETTERS.get(letter) or letter.encode() for letter in piece)
        byte = _BYTE.fullmatch(piece) if self._has_byte_tokens else None
        if byte is not None:
            return bytes([int(byte.group(1), 16)])
        return (piece.replace("\u2581", " ") if self._is_metaspace else piece).encode()


def _decoder_kinds(decoder: Any) -> set[str]:
    """Return the kinds of all steps of a decoder, as tokenizer.json writes them."""
    if not isinstance(decoder, dict):
        return set()
    kinds = {str(decoder.get("type"))}
    for step in decoder.get("decoders") or ():
        kinds |= _decoder_kinds(step)
    return kinds


def _byte_letters() -> dict[str, bytes]:
    """Return the bytes that letters stand for in byte-level vocabularies (GPT-2, Radford et al. 2019).

    Printable ones of Latin-1 stand for themselves, the others in order for the letters from U+0100 on.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    letters = {chr(byte): bytes([byte]) for byte in own}
    return letters | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)}


_LETTERS: Final = _byte_letters()
