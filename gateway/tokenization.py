"""From text and conversations to token ids and back, with the files that the model's worker published.

Control tokens, such as `<|im_end|>`, have their meaning only where the model's own template writes them. In a caller's
text they are plain text: otherwise a user's message could close its own turn and speak as the system.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
from tokenizers import Encoding, Tokenizer

from gateway.chat_template import ChatTemplate, Shield
from gateway.conversation import Conversation
from gateway.token_bytes import TokenBytes

# What is longer is tokenized beside the event loop, since it would hold up every other call.
MAX_INLINE_CHARS = 2048


class EncodedChat(NamedTuple):
    """A conversation as the model reads it."""

    token_ids: list[int]
    rendered: str  # the text that they came from; where callers wrote control tokens stand marks


class TextCodec:
    """Tokenizer and chat template of one model revision. Thread-safe."""

    def __init__(
        self, tokenizer_json: bytes, chat_template: str | None, special_tokens: dict[str, str] | None = None
    ) -> None:
        """Parse the files.

        `special_tokens` maps the names that templates use (bos_token, eos_token ...) to their text.
        Raises ValueError if the tokenizer cannot be used, or the template is over 256 KiB or does not compile.
        """
        # Two copies, since what text may contain is a property of the tokenizer, not an argument of a call.
        self._with_control, self._plain = map(_tokenizer, (tokenizer_json, _without_control(tokenizer_json)))
        self._plain.encode_special_tokens = True
        for tokenizer in (self._with_control, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        added = self._with_control.get_added_tokens_decoder()
        control = {token_id: token for token_id, token in added.items() if token.special}
        texts = sorted((token.content for token in control.values()), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, texts))) if control else None
        self._control_ids = frozenset(control)
        # Where some are looked for in normalized text, other spellings of them count too.
        self._has_other_spellings = any(token.normalized for token in control.values())
        self._token_bytes = TokenBytes(tokenizer_json, self._with_control)
        self._template = ChatTemplate(chat_template, special_tokens or {}) if chat_template else None

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def is_quick(self) -> bool:
        """Whether the chat template has rendered conversations, each in a few milliseconds."""
        return self._template is not None and self._template.is_quick

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text, control tokens in it as plain text, with what the tokenizer adds around a text."""
        ids: list[int] = self._plain.encode(text).ids
        return ids

    def encode_source(self, text: str, *, with_special: bool) -> tuple[list[int], list[tuple[int, str]]]:
        """Return the ids of a text, and with each of them the piece that it stands for, as the tokenizer writes it."""
        encoding = self._plain.encode(text, add_special_tokens=with_special)
        ids: list[int] = encoding.ids
        return ids, list(zip(ids, encoding.tokens, strict=True))

    def id_of(self, piece: str) -> int | None:
        """Return the id of a piece, None for one that is not in the vocabulary, or a control token."""
        token_id = self._with_control.token_to_id(piece)
        return None if token_id in self._control_ids else token_id

    @property
    def tokenizer(self) -> Tokenizer:
        """What texts are encoded with. Its settings are everybody's: not to be changed."""
        return self._plain

    def encode_pair(self, text: str, pair: str | None = None) -> Encoding:
        """Return a text or a pair of texts as `encode_text` does, with all that the tokenizer knows of it."""
        return self._plain.encode(text, pair)

    def encode_words(self, words: Iterable[str]) -> list[list[int]]:
        """Return the ids of words inside of a text: of each as it is, and behind a space; each sequence once."""
        spellings = [text for word in words for text in (word, word if word[:1].isspace() else f" {word}")]
        found = (tuple(self._plain.encode(text, add_special_tokens=False).ids) for text in spellings)
        return [list(ids) for ids in dict.fromkeys(found) if ids]

    def encode_chat(self, conversation: Conversation) -> EncodedChat:
        """Render the conversation, up to the beginning of the assistant's answer, and return its ids.

        Without control tokens in the messages this equals tokenizing the rendered text as a whole, which is what the
        model was trained on. Raises TemplateError.
        """
        assert self._template is not None
        shield = Shield(self._control_spans)
        rendered = self._template.render(conversation, shield)
        ids: list[int] = []
        for piece, is_control_text in shield.pieces(rendered):
            tokenizer = self._plain if is_control_text else self._with_control
            ids += tokenizer.encode(piece, add_special_tokens=False).ids
        return EncodedChat(ids, rendered)

    def _control_spans(self, text: str) -> list[tuple[int, int]]:
        """Return where control tokens stand in a caller's text, in order."""
        if self._control is None:
            return []
        if not self._has_other_spellings:
            return [match.span() for match in self._control.finditer(text)]
        encoding = self._with_control.encode(text, add_special_tokens=False)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        return [span for token_id, span in found if token_id in self._control_ids]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for; control tokens stand for their names."""
        return self._token_bytes(token_id)

    def decode(self, token_ids: Iterable[int], *, keep_special_tokens: bool = False) -> str:
        """Return the text of ids; invalid UTF-8 becomes U+FFFD."""
        text: str = self._with_control.decode(list(token_ids), skip_special_tokens=not keep_special_tokens)
        return text


def _without_control(content: bytes) -> bytes:
    """Return a tokenizer that finds no control token in a text.

    A unigram model (T5, mBART) has them among its pieces, where every text may hold them. There they get names that
    nobody can guess. Other models put pieces together by merges, which none has for a control token.
    """
    if b'"Unigram"' not in content:
        return content
    try:
        parts = msgspec.json.decode(content)  # much faster than json, during which nothing else runs
        control = {token["content"] for token in parts["added_tokens"] if token["special"]}
        vocab = parts["model"]["vocab"]
        if parts["model"]["type"] != "Unigram":
            return content
        hidden = {entry[0] for entry in vocab} & control
        secret = secrets.token_hex(16)
        parts["model"]["vocab"] = [
            [f"\u2581\u2581{secret}{number}" if entry[0] in hidden else entry[0], entry[1]]
            for number, entry in enumerate(vocab)
        ]
        parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] not in hidden]
    except (msgspec.MsgspecError, KeyError, TypeError, IndexError) as error:
        raise ValueError("the tokenizer cannot be loaded") from error
    return msgspec.json.encode(parts)


def _tokenizer(content: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(content)
    except BaseException as error:
        # A panic in the library is no Exception; its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError("the tokenizer cannot be loaded") from error
