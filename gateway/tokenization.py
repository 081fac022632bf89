"""From text and conversations to token ids and back, with the files that the model's worker published.

Control tokens, such as `<|im_end|>`, have their meaning only where the model's own template writes them. In a caller's
text they are plain text: otherwise a user's message could close its own turn and speak as the system.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from tokenizers import Tokenizer

from common.registry import MAX_TEMPLATE_BYTES
from gateway.template_budget import BudgetedEnvironment
from gateway.template_units import Budget, budget_of, spending

_COMPILE_UNITS = 100_000_000  # constant expressions are computed then
_QUICK_UNITS = 500_000  # of a rendering: some milliseconds, at most some twenty


# What is longer is tokenized beside the event loop, since it would hold up every other call.
MAX_INLINE_CHARS = 2048
_CHARS_PER_MESSAGE = 32  # what a message costs besides its text, in characters


class TemplateError(Exception):
    """The model's chat template refuses the conversation; the text is the template's own."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: role is system, user or assistant."""

    role: str
    content: str


def size_of(messages: Sequence[Message]) -> int:
    """Return what a conversation costs, in characters of a text."""
    return sum(len(message.content) for message in messages) + _CHARS_PER_MESSAGE * len(messages)


class TextCodec:
    """Tokenizer and chat template of one model revision. Thread-safe: only what renderings took is noted."""

    def __init__(
        self, tokenizer_json: bytes, chat_template: str | None, special_tokens: dict[str, str] | None = None
    ) -> None:
        """Parse the files.

        `special_tokens` maps the names that templates use (bos_token, eos_token ...) to their text.
        Raises ValueError if the tokenizer cannot be used, or the template is over 256 KiB or does not compile.
        """
        # Two copies, since what text may contain is a property of the tokenizer, not an argument of a call.
        self._with_control, self._plain = (_tokenizer(tokenizer_json) for _ in range(2))
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
        self._special_tokens = dict(special_tokens or {})
        self._template: jinja2.Template | None = None
        self._num_nodes = 0
        self._most_units: int | None = None  # of one rendering
        if chat_template:
            self._template, self._num_nodes = _compile(chat_template)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def is_quick(self) -> bool:
        """Whether the chat template has rendered conversations, each in a few milliseconds."""
        return self._most_units is not None and self._most_units <= _QUICK_UNITS

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text, control tokens in it as plain text, with what the tokenizer adds around a text."""
        ids: list[int] = self._plain.encode(text).ids
        return ids

    def encode_words(self, words: Iterable[str]) -> list[list[int]]:
        """Return the ids of words inside of a text: of each as it is, and behind a space; each sequence once."""
        spellings = [text for word in words for text in (word, word if word[:1].isspace() else f" {word}")]
        found = (tuple(self._plain.encode(text, add_special_tokens=False).ids) for text in spellings)
        return [list(ids) for ids in dict.fromkeys(found) if ids]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Render the conversation, with the beginning of the assistant's answer, and return its ids.

        Without control tokens in the messages this equals tokenizing the rendered text as a whole, which is what the
        model was trained on. Raises TemplateError.
        """
        assert self._template is not None
        shield = _Shield()
        rendered = self._render(
            [Message(m.role, shield.hide(m.content, self._control_spans(m.content))) for m in messages]
        )
        ids: list[int] = []
        for piece, is_control_text in shield.pieces(rendered):
            tokenizer = self._plain if is_control_text else self._with_control
            ids += tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    def _control_spans(self, text: str) -> list[tuple[int, int]]:
        """Return where control tokens stand in a caller's text, in order."""
        if self._control is None:
            return []
        if not self._has_other_spellings:
            return [match.span() for match in self._control.finditer(text)]
        encoding = self._with_control.encode(text, add_special_tokens=False)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        return [span for token_id, span in found if token_id in self._control_ids]

    def decode(self, token_ids: Iterable[int], *, keep_special_tokens: bool = False) -> str:
        """Return the text of ids; invalid UTF-8 becomes U+FFFD."""
        text: str = self._with_control.decode(list(token_ids), skip_special_tokens=not keep_special_tokens)
        return text

    def _render(self, messages: Sequence[Message]) -> str:
        assert self._template is not None
        budget = budget_of(sum(len(m.content) for m in messages), len(messages), self._num_nodes)
        try:
            with spending(budget):
                return self._template.render(
                    messages=[{"role": m.role, "content": m.content} for m in messages],
                    tools=None,  # templates tell "none" from "undefined"
                    documents=None,
                    add_generation_prompt=True,
                    **self._special_tokens,
                )
        except jinja2.TemplateError as error:
            raise TemplateError(str(error)) from error
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as error:
            # A template may trip over a conversation that its author did not foresee.
            raise TemplateError("the model's chat template does not accept this conversation") from error
        finally:
            if size_of(messages) <= MAX_INLINE_CHARS:  # of others, nobody asks whether they are quick
                self._most_units = max(self._most_units or 0, budget.spent)


def _tokenizer(content: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(content)
    except BaseException as error:
        # A panic in the library is no Exception; its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError("the tokenizer cannot be loaded") from error


class _Shield:
    """Hides control tokens of callers' text from the template, and finds them again in what it rendered.

    Each is replaced by a mark that no caller can guess: private-use characters around a random number.
    """

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(8)
        self._hidden: list[str] = []

    def hide(self, text: str, spans: Iterable[tuple[int, int]]) -> str:
        """Return the text with a mark in the place of each span."""
        pieces: list[str] = []
        done = 0
        for start, end in spans:
            pieces += [text[done:start], f"\ue000{self._nonce}:{len(self._hidden)}\ue001"]
            self._hidden.append(text[start:end])
            done = end
        return "".join([*pieces, text[done:]])

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


class _Generation(jinja2.ext.Extension):
    """Reads over the tags `generation` and `endgeneration`, by which templates mark answers for training."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> tuple[jinja2.Template, int]:
    """Compile a chat template with the functions that transformers gives them, in a sandbox; return its size too.

    Raises ValueError.
    """
    if len(source.encode()) > MAX_TEMPLATE_BYTES:
        raise ValueError(f"the chat template is over {MAX_TEMPLATE_BYTES} bytes")
    environment = BudgetedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format_: datetime.now(tz=UTC).strftime(format_)
    environment.seal()
    try:
        with spending(Budget(_COMPILE_UNITS)):
            return environment.from_string(source), environment.num_nodes
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template does not compile: line {error.lineno}: {error.message}") from error
    except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
        raise ValueError(f"the chat template does not compile: {type(error).__name__}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, spaced as models were trained on it; jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
