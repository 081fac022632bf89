"""From text and conversations to token ids and back, with the files that the model's worker published.

Control tokens, such as `<|im_end|>`, have their meaning only where the model's own template writes them. In a caller's
text they are plain text: otherwise a user's message could close its own turn and speak as the system.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
import msgspec
from tokenizers import Tokenizer

_MAX_TEMPLATE_BYTES = 256 * 1024


class TemplateError(Exception):
    """The model's chat template refuses the conversation; the text is the template's own."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: role is system, user or assistant."""

    role: str
    content: str


class TextCodec:
    """Tokenizer and chat template of one model revision. Thread-safe: it is never changed after construction."""

    def __init__(
        self, tokenizer_json: bytes, chat_template: str | None, special_tokens: dict[str, str] | None = None
    ) -> None:
        """Parse the files.

        `special_tokens` maps the names that templates use (bos_token, eos_token ...) to their text.
        Raises ValueError if the template is over 256 KiB or does not compile.
        """
        text = tokenizer_json.decode()
        # Two copies, since what text may contain is a property of the tokenizer, not an argument of a call.
        self._with_control = Tokenizer.from_str(text)
        self._plain = Tokenizer.from_str(text)
        self._plain.encode_special_tokens = True
        for tokenizer in (self._with_control, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        added = self._with_control.get_added_tokens_decoder().values()
        control = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, control))) if control else None
        self._special_tokens = dict(special_tokens or {})
        self._template = _compile(chat_template) if chat_template else None

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text, control tokens in it as plain text, with what the tokenizer adds around a text."""
        ids: list[int] = self._plain.encode(text).ids
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Render the conversation, with the beginning of the assistant's answer, and return its ids.

        Without control tokens in the messages this equals tokenizing the rendered text as a whole, which is what the
        model was trained on. Raises TemplateError.
        """
        assert self._template is not None
        shield = _Shield(self._control)
        rendered = self._render([Message(m.role, shield.hide(m.content)) for m in messages])
        ids: list[int] = []
        for piece, is_control_text in shield.pieces(rendered):
            tokenizer = self._plain if is_control_text else self._with_control
            ids += tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Iterable[int], *, keep_special_tokens: bool = False) -> str:
        """Return the text of ids; invalid UTF-8 becomes U+FFFD."""
        text: str = self._with_control.decode(list(token_ids), skip_special_tokens=not keep_special_tokens)
        return text

    def _render(self, messages: Sequence[Message]) -> str:
        assert self._template is not None
        try:
            return self._template.render(
                messages=[{"role": m.role, "content": m.content} for m in messages],
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise TemplateError(str(error)) from error
        except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
            # A template may trip over a conversation that its author did not foresee.
            raise TemplateError("the model's chat template does not accept this conversation") from error


class _Shield:
    """Hides control tokens of callers' text from the template, and finds them again in what it rendered.

    Each is replaced by a mark that no caller can guess: private-use characters around a random number.
    """

    def __init__(self, control: re.Pattern[str] | None) -> None:
        self._control = control
        self._nonce = secrets.token_hex(8)
        self._hidden: list[str] = []

    def hide(self, text: str) -> str:
        return self._control.sub(self._mark, text) if self._control else text

    def pieces(self, rendered: str) -> Iterable[tuple[str, bool]]:
        """Yield (text, whether it is a caller's control token), in order."""
        if not self._hidden:
            yield rendered, False
            return
        for index, piece in enumerate(re.split(f"\ue000{self._nonce}:(\\d+)\ue001", rendered)):
            if index % 2:
                yield self._hidden[int(piece)], True
            elif piece:
                yield piece, False

    def _mark(self, match: re.Match[str]) -> str:
        self._hidden.append(match.group())
        return f"\ue000{self._nonce}:{len(self._hidden) - 1}\ue001"


def _compile(source: str) -> jinja2.Template:
    """Compile a chat template with the functions that transformers gives them, in a sandbox."""
    if len(source.encode()) > _MAX_TEMPLATE_BYTES:
        raise ValueError(f"the chat template is over {_MAX_TEMPLATE_BYTES} bytes")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format_: datetime.now(tz=UTC).strftime(format_)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template does not compile: line {error.lineno}: {error.message}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    """Plain JSON: jinja's own filter escapes for HTML."""
    encoded = msgspec.json.encode(value)
    return (msgspec.json.format(encoded, indent=indent) if indent else encoded).decode()


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
