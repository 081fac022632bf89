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
from typing import Any, TypeAlias

from llguidance import LLTokenizer

from common.chat_formats import REASONING_FORMATS, TOOL_FORMATS, ToolFormat
from common.generation import ToolGrammar

Part: TypeAlias = dict[str, Any]  # one grammar of llguidance's list


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
    lark = ["%llguidance {}\n", "TEXT: /(.|\\n)*/\n", "GAP: /\\n{0,2}/\n"]
    answer: Callable[[str], str] = _main
    parts: list[Part] = []
    if tools is not None:
        answer = _tools(tools, tokenizer, lark, has_main=main is not None)
        for index, (_, schema) in enumerate(tools.tools):
            parts.append({**schema_part(schema), "name": f"arguments_{index}"})
    if main is not None:
        parts.append({**main, "name": "main"})
    start = answer("TEXT")
    if reasoning_format:
        start = _behind_reasoning(answer, reasoning_format, tokenizer, lark, in_reasoning=in_reasoning)
    lark.append(f"start: {start}\n")
    return json.dumps({"grammars": [{"name": "chat", "lark_grammar": "".join(lark)}, *parts]})


def _main(text: str) -> str:
    """An answer that must match, whatever else text may be."""
    return "@main"


def _behind_reasoning(
    answer: Callable[[str], str], name: str, tokenizer: LLTokenizer, lark: list[str], *, in_reasoning: bool
) -> str:
    marks = REASONING_FORMATS[name]
    lark.append(_until("thought", "TEXT", _mark(marks.end, tokenizer)))
    thoughtful = f"thought GAP {answer('TEXT')}"
    if in_reasoning:
        return thoughtful
    begin = _mark(marks.begin, tokenizer)
    if begin.startswith("<["):
        return f"{begin} {thoughtful} | {answer('TEXT')}"
    # The reader of lexemes never goes back: text that may be a thought must not be taken for other text meanwhile.
    lark.append(f"OTHER_TEXT: /(.|\\n)*/ & ~/{_escaped(marks.begin)}(.|\\n)*/\n")
    return f"{begin} {thoughtful} | {answer('OTHER_TEXT')}"


def _tools(tools: ToolGrammar, tokenizer: LLTokenizer, lark: list[str], *, has_main: bool) -> Callable[[str], str]:
    """Write the rules of calls; return what makes an answer whose text, up to the first call, is this terminal."""
    format_ = TOOL_FORMATS[tools.format]
    whole_calls = has_main and format_.is_whole_answer  # told from other JSON lexeme by lexeme
    for index, (name, _) in enumerate(tools.tools):
        head = format_.begin + name + format_.middle
        written = _lexemes(format_.trigger + head) if whole_calls else _marked(head, tokenizer, format_)
        lark.append(f"call_{index}: {written} @arguments_{index} {_marked(format_.end, tokenizer, format_)}\n")
    lark.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools.tools))) + "\n")
    trigger = "" if whole_calls else _mark(format_.trigger, tokenizer)
    again = trigger if format_.repeats_trigger else ""
    more = f"({_quoted(format_.separator)} {again} call)*" if tools.parallel else ""
    calls = f"{_quoted(format_.opening)} call {more} {_quoted(format_.closing)}"
    if tools.must_call:
        return lambda text: f"{trigger} {calls}"
    if has_main:
        return lambda text: f"({trigger} {calls} | @main)"
    if format_.is_whole_answer:
        return lambda text: f"({trigger} {calls} | {_unless(format_.trigger, text, lark)})"
    lark.append(_until("before", "TEXT", trigger))

    def answer(text: str) -> str:
        first = "before"
        if text != "TEXT":
            first = f"before_{text.lower()}"
            lark.append(_until(first, text, trigger))
        return f"({first} {calls} {f'(before {calls})* TEXT' if tools.parallel else ''} | {text})"

    return answer


def _unless(beginning: str, text: str, lark: list[str]) -> str:
    """Return a terminal of this text that does not begin so."""
    name = f"{text}_UNLESS_CALL"
    rule = f"{name}: {text} & ~/{_escaped(beginning)}(.|\\n)*/\n"
    if rule not in lark:
        lark.append(rule)
    return name


def _lexemes(text: str) -> str:
    """Write JSON as the library reads it."""
    return " ".join(map(_quoted, re.findall(r'"[^"]*"|[{}]|: |, ', text)))


def _marked(text: str, tokenizer: LLTokenizer, format_: ToolFormat) -> str:
    """Write a text with each mark in it as what it is for this tokenizer."""
    pieces = re.split("(" + "|".join(map(re.escape, format_.marks)) + ")", text)
    return " ".join(_mark(piece, tokenizer) for piece in pieces if piece)


def _until(rule: str, text: str, mark: str) -> str:
    """A rule that ends with the first of this mark."""
    return f"{rule}: {text} {mark}\n" if mark.startswith("<[") else f"{rule}[lazy]: {text} {mark}\n"


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
