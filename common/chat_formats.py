"""How models write what is not plain text in their answers: tool calls and reasoning. Pure data.

    hermes    <tool_call>{"name": "f", "arguments": {...}}</tool_call> ...         Hermes 2/3, Qwen 2.5, Qwen 3
    llama3    {"name": "f", "parameters": {...}}; ...  perhaps after <|python_tag|>  Llama 3.1 to 3.3
    mistral   [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]                  Mistral up to v7 of its tokenizer
    mistral11 [TOOL_CALLS]f[ARGS]{...}[TOOL_CALLS]...                               from v11 on
    generic   as hermes, for models that were not trained on tools: these and the format are told in the system message

    think     <think>...</think>                                                    DeepSeek-R1, Qwen 3, QwQ
    magistral [THINK]...[/THINK]                                                    Magistral

The names are those of the models that began with them; the formats are described in these models' chat templates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The marks around reasoning."""

    begin: str
    end: str


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """What calls look like, for a grammar that allows for nothing else, and the marks that tell them from text.

    trigger opening  begin NAME middle ARGUMENTS end  separator (trigger) begin ...  closing
    """

    trigger: str  # a model that writes this has begun a call
    begin: str
    middle: str
    end: str
    separator: str
    opening: str = ""
    closing: str = ""
    repeats_trigger: bool = True  # before every call, not the first alone
    is_whole_answer: bool = False  # there is no text beside calls
    marks: tuple[str, ...] = ()  # where they are special tokens, decoding must keep them


REASONING_FORMATS: Final = {
    "think": ReasoningFormat("<think>", "</think>"),
    "magistral": ReasoningFormat("[THINK]", "[/THINK]"),
}

_HERMES: Final = ToolFormat(
    trigger="<tool_call>",
    begin='\n{"name": "',
    middle='", "arguments": ',
    end="}\n</tool_call>",
    separator="\n",
    marks=("<tool_call>", "</tool_call>"),
)

TOOL_FORMATS: Final = {
    "hermes": _HERMES,
    "generic": _HERMES,
    "llama3": ToolFormat(
        trigger='{"name": "',
        begin="",
        middle='", "parameters": ',
        end="}",
        separator="; ",
        is_whole_answer=True,
        marks=("<|python_tag|>",),
    ),
    "mistral": ToolFormat(
        trigger="[TOOL_CALLS]",
        opening="[",
        begin='{"name": "',
        middle='", "arguments": ',
        end="}",
        separator=", ",
        closing="]",
        repeats_trigger=False,
        marks=("[TOOL_CALLS]",),
    ),
    "mistral11": ToolFormat(
        trigger="[TOOL_CALLS]",
        begin="",
        middle="[ARGS]",
        end="",
        separator="",
        marks=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    ),
}


def detect_tool_format(chat_template: str) -> str:
    """Return the name of the format that a template teaches its model, "generic" for one that knows no tools."""
    if "tools" not in chat_template:
        return "generic"
    if "[TOOL_CALLS]" in chat_template:
        return "mistral11" if "[ARGS]" in chat_template else "mistral"
    if "<function=" in chat_template:  # a dialect of its own inside the same marks
        return "generic"
    if "<tool_call>" in chat_template:
        return "hermes"
    if "<|python_tag|>" in chat_template or ('"parameters": dictionary' in chat_template):
        return "llama3"
    return "generic"


def detect_reasoning_format(chat_template: str) -> str:
    """Return the name of the format whose marks a template knows, empty if there is none."""
    for name, format_ in REASONING_FORMATS.items():
        if format_.begin in chat_template or format_.end in chat_template:
            return name
    return ""


def marks_of(reasoning_format: str, tool_format: str) -> tuple[str, ...]:
    """Return the texts that tell the formats' parts apart; where they are special tokens, decoding must keep them."""
    marks: list[str] = []
    if reasoning_format:
        marks += (REASONING_FORMATS[reasoning_format].begin, REASONING_FORMATS[reasoning_format].end)
    if tool_format:
        marks += TOOL_FORMATS[tool_format].marks
    return tuple(marks)
