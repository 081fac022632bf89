"""Chat templates: conversations in, the text that a model was trained on out.

A template comes with a model and is a program; `template_budget` bounds what it costs. Callers' text is told apart from
the template's own by a `Shield`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from common.registry import MAX_TEMPLATE_BYTES
from gateway.conversation import Conversation, Json, Message
from gateway.template_budget import BudgetedEnvironment
from gateway.template_units import Budget, budget_of, spending

_COMPILE_UNITS: Final = 100_000_000  # constant expressions are computed then
_QUICK_UNITS: Final = 500_000  # of a rendering: some milliseconds, at most some twenty
_MAX_QUICK_SIZE: Final = 2048  # of larger conversations, nobody asks whether they are quick


class TemplateError(Exception):
    """The model's chat template refuses the conversation; the text is the template's own."""


class ChatTemplate:
    """A compiled template. Thread-safe: only what renderings took is noted."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` maps the names that templates use (bos_token, eos_token ...) to their text.

        Raises ValueError if it is over 256 KiB or does not compile.
        """
        self._template, self._num_nodes = _compile(source)
        self._special_tokens = dict(special_tokens)
        self._most_units: int | None = None  # of one rendering

    @property
    def is_quick(self) -> bool:
        """Whether it has rendered conversations, each in a few milliseconds."""
        return self._most_units is not None and self._most_units <= _QUICK_UNITS

    def render(self, conversation: Conversation, shield: Shield) -> str:
        """Return the text, up to where the model goes on; what callers wrote in it is what `shield` made of it.

        Raises TemplateError.
        """
        values = _variables(conversation, shield)
        budget = budget_of(conversation.num_chars, conversation.num_items, self._num_nodes)
        try:
            with spending(budget):
                rendered = self._template.render({**values, **self._special_tokens})
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
            if conversation.size <= _MAX_QUICK_SIZE:
                self._most_units = max(self._most_units or 0, budget.spent)
        if not conversation.continues:
            return rendered
        end = rendered.rfind(shield.end)
        if end < 0:
            raise TemplateError("the model's chat template does not show the last message, so it cannot be continued")
        return rendered[:end]


def _variables(conversation: Conversation, shield: Shield) -> dict[str, Json]:
    """Return what the template reads, in the shapes that transformers' `apply_chat_template` gives it."""
    messages = [_message(message, shield) for message in conversation.messages]
    if conversation.continues:
        messages[-1]["content"] += shield.end
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": shield.hide(tool.description),
                "parameters": shield.hide_all(tool.parameters),
            },
        }
        for tool in conversation.tools
    ]
    return {
        **{name: shield.hide_all(value) for name, value in conversation.template_arguments.items()},
        "messages": messages,
        "tools": tools or None,  # templates tell "none" from "undefined"
        "documents": None,
        "add_generation_prompt": not conversation.continues,
    }


def _message(message: Message, shield: Shield) -> dict[str, Json]:
    shown: dict[str, Json] = {"role": message.role, "content": shield.hide(message.content)}
    if message.reasoning:
        shown["reasoning_content"] = shield.hide(message.reasoning)
    if message.tool_calls:
        shown["tool_calls"] = [
            {
                "id": shield.hide(call.id),
                "type": "function",
                "function": {"name": shield.hide(call.name), "arguments": shield.hide_all(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        shown["tool_call_id"] = shield.hide(message.tool_call_id)
    if message.name:
        shown["name"] = shield.hide(message.name)
    return shown


class Shield:
    """Hides control tokens of callers' text from the template, and finds them again in what it rendered.

    Each is replaced by a mark that no caller can guess: private-use characters around a random number.
    """

    def __init__(self, spans: Callable[[str], list[tuple[int, int]]]) -> None:
        """`spans` returns where control tokens stand in a text, in order."""
        self._spans = spans
        self._nonce = secrets.token_hex(8)
        self._hidden: list[str] = []
        self.end: Final = f"\ue000{self._nonce}:end\ue001"  # put behind a text, to find where it ends

    def hide(self, text: str) -> str:
        """Return the text with a mark in the place of each control token."""
        spans = self._spans(text)
        if not spans:
            return text
        pieces: list[str] = []
        done = 0
        for start, end in spans:
            pieces += [text[done:start], f"\ue000{self._nonce}:{len(self._hidden)}\ue001"]
            self._hidden.append(text[start:end])
            done = end
        return "".join([*pieces, text[done:]])

    def hide_all(self, value: Json) -> Json:
        """Do so in all texts of a value of JSON, keys included."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide_all(item) for key, item in value.items()}
        return [self.hide_all(item) for item in value] if isinstance(value, list) else value

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
