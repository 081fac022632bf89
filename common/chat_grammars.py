"""Grammars of chats' answers: reasoning, then text and tool calls in a model's own format, or what text must match.

    start      reasoning? (text trigger call)* text         the model decides
               reasoning? trigger call (separator call)*    a tool must be called
               reasoning? (trigger call ... | main)         a call, or what the text must match

Text goes on up to the trigger of a call and no further: from there on only a call of a tool that is offered is allowed,
with arguments by its schema. Each part is a grammar of llguidance of its own; see its `docs/syntax.md`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from llguidance import LLTokenizer

from common.chat_formats import REASONING_FORMATS, TOOL_FORMATS, ToolFormat
from common.generation import ToolGrammar

Part: TypeAlias = dict[str, Any]  # one grammar of llguidance's list

_TEXT: Final = "TEXT: /(.|\\n)*/\n"
_GAP: Final = "GAP: /\\n{0,2}/\n"  # between reasoning and answer


def chat_grammar(
    main: Part | None,
    tools: ToolGrammar | None,
    reasoning_format: str,
    tokenizer: LLTokenizer,
    schema_part: Callable[[str], Part],
    *,
    in_reasoning: bool,
) -> str:
    """Return the grammar of an answer. `main` is what its text must match, None for any text.

    `schema_part` turns a JSON schema into a part.
    """
    lark = ["%llguidance {}\n"]
    parts: list[Part] = []
    start = ""
    if reasoning_format:
        start = _reasoning(reasoning_format, tokenizer, lark, in_reasoning=in_reasoning)
    if tools is None:
        start += " @main"
    else:
        start += _tools(tools, tokenizer, lark, has_main=main is not None)
        for index, (_, schema) in enumerate(tools.tools):
            parts.append({**schema_part(schema), "name": f"arguments_{index}"})
    if main is not None:
        parts.append({**main, "name": "main"})
    lark.append(f"start: {start}\n")
    if any("TEXT" in line for line in lark):
        lark.append(_TEXT)
    return json.dumps({"grammars": [{"name": "chat", "lark_grammar": "".join(lark)}, *parts]})


def _reasoning(name: str, tokenizer: LLTokenizer, lark: list[str], *, in_reasoning: bool) -> str:
    marks = REASONING_FORMATS[name]
    lark += [_until("thought", _mark(marks.end, tokenizer)), _GAP]
    return "thought GAP" if in_reasoning else f"({_mark(marks.begin, tokenizer)} thought GAP)?"


def _tools(tools: ToolGrammar, tokenizer: LLTokenizer, lark: list[str], *, has_main: bool) -> str:
    format_ = TOOL_FORMATS[tools.format]
    for index, (name, _) in enumerate(tools.tools):
        head = _marked(format_.begin + name + format_.middle, tokenizer, format_)
        lark.append(f"call_{index}: {head} @arguments_{index} {_marked(format_.end, tokenizer, format_)}\n")
    lark.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools.tools))) + "\n")
    trigger = _mark(format_.trigger, tokenizer)
    opened = f"{trigger} {_quoted(format_.opening)}"
    more = (
        f"({_quoted(format_.separator)} {trigger if format_.repeats_trigger else ''} call)*" if tools.parallel else ""
    )
    calls = f"{opened} call {more} {_quoted(format_.closing)}"
    if tools.must_call:
        return f" {calls}"
    if has_main:
        return f" ({calls} | @main)"
    if format_.is_whole_answer:
        lark.append(f"OTHER: /(.|\\n)*/ & ~/{_escaped(format_.trigger)}(.|\\n)*/\n")
        return f" ({calls} | OTHER)"
    lark.append(_until("before", trigger))
    rest = f"{_quoted(format_.opening)} call {more} {_quoted(format_.closing)}"
    return f" (before {rest})* TEXT" if tools.parallel else f" (before {rest} | TEXT)"


def _marked(text: str, tokenizer: LLTokenizer, format_: ToolFormat) -> str:
    """Write a text with each mark in it as what it is for this tokenizer."""
    pieces = re.split("(" + "|".join(map(re.escape, format_.marks)) + ")", text)
    return " ".join(_mark(piece, tokenizer) for piece in pieces if piece)


def _until(rule: str, mark: str) -> str:
    """A rule that ends with the first of this mark."""
    return f"{rule}: TEXT {mark}\n" if mark.startswith("<[") else f"{rule}[lazy]: TEXT {mark}\n"


def _mark(text: str, tokenizer: LLTokenizer) -> str:
    """A token of its own, where the text is one: the library lets no literal match a token in angle brackets."""
    ids: Sequence[int] = tokenizer.tokenize_str(text, parse_special=True)
    if len(ids) == 1 and tokenizer.is_special_token(ids[0]):
        return f"<[{ids[0]}]>"
    return _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _escaped(text: str) -> str:
    return "".join(c if c.isalnum() else f"\\x{ord(c):02x}" for c in text)


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema of arguments without room for any that it does not name, unless it says that there is."""
    if "properties" not in schema or {"additionalProperties", "patternProperties", "$ref", "allOf"} & schema.keys():
        return dict(schema)
    return {**schema, "additionalProperties": False}
