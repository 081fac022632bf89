"""Conversations as chat templates see them, and the check of those that callers send."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn, TypeAlias

from google.protobuf import json_format

from gateway.violations import Violations
from torchrelay.v1 import generation_pb2 as pb

MAX_MESSAGES: Final = 4096
MAX_TOOLS: Final = 128
MAX_SCHEMA_BYTES: Final = 64 * 1024
MAX_ARGUMENTS_BYTES: Final = 1 << 20
MAX_TEMPLATE_ARGUMENTS: Final = 64
MAX_TEMPLATE_ARGUMENTS_BYTES: Final = 16 * 1024
MAX_JSON_DEPTH: Final = 64
# What templates are given of the conversation itself; of special tokens too, whose names end in _token.
TEMPLATE_VARIABLES: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt"})

_ROLE_NAMES: Final = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}
_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_CHARS_PER_ITEM: Final = 32  # what a message, a call or a tool costs besides its text, in characters

Json: TypeAlias = Any  # what json.loads returns


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call in the conversation so far."""

    id: str
    name: str
    arguments: Mapping[str, Json]
    text: str  # of the arguments, as it came


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: role is system, user, assistant or tool."""

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str
    parameters: Mapping[str, Json]  # JSON Schema of an object
    text: str  # of the parameters, as it came
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is rendered, and which tools may be called."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()  # that the model is told of
    must_call: bool = False
    parallel_tool_calls: bool = True
    template_arguments: Mapping[str, Json] = field(default_factory=dict)
    continues: bool = False  # the model goes on with the last message

    @property
    def num_chars(self) -> int:
        """The length of all that callers wrote."""
        return (
            sum(len(m.content) + len(m.reasoning) for m in self.messages)
            + sum(len(call.name) + len(call.text) for m in self.messages for call in m.tool_calls)
            + sum(len(tool.name) + len(tool.description) + len(tool.text) for tool in self.tools)
        )

    @property
    def num_items(self) -> int:
        """How many things a template may run over: messages, calls and tools."""
        return len(self.messages) + sum(len(m.tool_calls) for m in self.messages) + len(self.tools)

    @property
    def size(self) -> int:
        """What it costs, in characters of a text."""
        return self.num_chars + _CHARS_PER_ITEM * self.num_items


def conversation_of(chat: pb.ChatInput) -> Conversation:
    """Return the conversation. Raises InvalidRequest with every bad field of it."""
    bad = Violations()
    _check_lengths(chat, bad)
    messages = [_message(message, f"input.chat.messages[{i}]", bad) for i, message in enumerate(chat.messages)]
    tools = [_tool(tool, f"input.chat.tools[{i}]", bad) for i, tool in enumerate(chat.tools)]
    if len({tool.name for tool in tools}) < len(tools):
        bad.add("input.chat.tools", "names must be unique", "FIELD_INVALID")
    if chat.continue_last_message and messages and (messages[-1].role != "assistant" or not messages[-1].content):
        bad.add(
            "input.chat.continue_last_message", "the last message must be the assistant's, with text", "FIELD_CONFLICT"
        )
    elif chat.continue_last_message and messages and messages[-1].tool_calls:
        bad.add("input.chat.continue_last_message", "the last message must not call tools", "FIELD_CONFLICT")
    offered, must_call = _chosen(chat, tools, bad)
    arguments = _template_arguments(chat, bad)
    bad.raise_if_any()
    return Conversation(
        messages=tuple(messages),
        tools=offered,
        must_call=must_call,
        parallel_tool_calls=not chat.HasField("parallel_tool_calls") or chat.parallel_tool_calls,
        template_arguments=arguments,
        continues=chat.continue_last_message,
    )


def _check_lengths(chat: pb.ChatInput, bad: Violations) -> None:
    """What is too long is not looked into."""
    if not chat.messages:
        bad.add("input.chat.messages", "at least one message is required", "FIELD_REQUIRED")
    if len(chat.messages) > MAX_MESSAGES:
        bad.add("input.chat.messages", f"at most {MAX_MESSAGES} messages are taken")
        bad.raise_if_any()
    if len(chat.tools) > MAX_TOOLS:
        bad.add("input.chat.tools", f"at most {MAX_TOOLS} tools are taken")
        bad.raise_if_any()


def _message(message: pb.ChatMessage, path: str, bad: Violations) -> Message:
    role = _ROLE_NAMES.get(message.role, "")
    if not role:
        bad.add(f"{path}.role", "must be ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT or ROLE_TOOL", "FIELD_INVALID")
    if not message.parts and not message.tool_calls:
        bad.add(f"{path}.parts", "at least one part is required", "FIELD_REQUIRED")
    for number, part in enumerate(message.parts):
        kind = part.WhichOneof("part")
        if kind is None:
            bad.add(f"{path}.parts[{number}]", "must be set", "FIELD_REQUIRED")
        elif kind == "reasoning" and role and role != "assistant":
            bad.add(f"{path}.parts[{number}].reasoning", "only the assistant reasons", "FIELD_CONFLICT")
    if message.tool_calls and role and role != "assistant":
        bad.add(f"{path}.tool_calls", "only the assistant calls tools", "FIELD_CONFLICT")
    if len(message.tool_calls) > MAX_TOOLS:
        bad.add(f"{path}.tool_calls", f"at most {MAX_TOOLS} calls are taken")
        bad.raise_if_any()
    if role == "tool" and not message.tool_call_id:
        bad.add(f"{path}.tool_call_id", "is required of a tool's message", "FIELD_REQUIRED")
    elif role and role != "tool" and message.tool_call_id:
        bad.add(f"{path}.tool_call_id", "only a tool answers a call", "FIELD_CONFLICT")
    return Message(
        role,
        "".join(part.text for part in message.parts),
        "".join(part.reasoning for part in message.parts),
        tuple(_call(call, f"{path}.tool_calls[{number}]", bad) for number, call in enumerate(message.tool_calls)),
        message.tool_call_id,
        message.name,
    )


def _call(call: pb.ToolCall, path: str, bad: Violations) -> ToolCall:
    if not call.name:
        bad.add(f"{path}.name", "is required", "FIELD_REQUIRED")
    arguments = _object(call.arguments or "{}", MAX_ARGUMENTS_BYTES, f"{path}.arguments", bad)
    return ToolCall(call.id, call.name, arguments, call.arguments)


def _tool(tool: pb.Tool, path: str, bad: Violations) -> Tool:
    if not _TOOL_NAME.fullmatch(tool.name):
        bad.add(f"{path}.name", "must be 1 to 64 of A-Z a-z 0-9 _ -", "FIELD_INVALID")
    text = tool.parameters or '{"type": "object", "properties": {}}'
    parameters = _object(text, MAX_SCHEMA_BYTES, f"{path}.parameters", bad)
    return Tool(tool.name, tool.description, parameters, text, tool.strict)


def _chosen(chat: pb.ChatInput, tools: Sequence[Tool], bad: Violations) -> tuple[tuple[Tool, ...], bool]:
    """Return the tools that may be called, and whether one must be."""
    if not chat.HasField("tool_choice"):
        return tuple(tools), False
    path = "input.chat.tool_choice"
    kind = chat.tool_choice.WhichOneof("choice")
    if kind == "name":
        named = tuple(tool for tool in tools if tool.name == chat.tool_choice.name)
        if not named:
            bad.add(f"{path}.name", "must be the name of one of the tools", "FIELD_INVALID")
        return named, True
    mode = chat.tool_choice.mode
    if mode not in (pb.TOOL_CHOICE_MODE_AUTO, pb.TOOL_CHOICE_MODE_NONE, pb.TOOL_CHOICE_MODE_REQUIRED):
        bad.add(path, "must be a mode or a name", "FIELD_REQUIRED")
    if mode == pb.TOOL_CHOICE_MODE_REQUIRED and not tools:
        bad.add(path, "there are no tools to call", "FIELD_CONFLICT")
    return () if mode == pb.TOOL_CHOICE_MODE_NONE else tuple(tools), mode == pb.TOOL_CHOICE_MODE_REQUIRED


def _template_arguments(chat: pb.ChatInput, bad: Violations) -> dict[str, Json]:
    path = "input.chat.template_arguments"
    fields = chat.template_arguments.fields
    if len(fields) > MAX_TEMPLATE_ARGUMENTS:
        bad.add(path, f"at most {MAX_TEMPLATE_ARGUMENTS} variables are taken")
        return {}
    if chat.template_arguments.ByteSize() > MAX_TEMPLATE_ARGUMENTS_BYTES:
        bad.add(path, f"at most {MAX_TEMPLATE_ARGUMENTS_BYTES} bytes are taken")
        return {}
    for name in sorted(fields):
        if name in TEMPLATE_VARIABLES or name.endswith("_token") or not name.isidentifier():
            bad.add(path, "the template's own variables cannot be set, and names must be identifiers", "FIELD_INVALID")
            return {}
    try:
        values: dict[str, Json] = json_format.MessageToDict(chat.template_arguments)
    except (json_format.Error, ValueError, RecursionError):  # infinite numbers, values that are not set
        bad.add(path, "must be values of JSON", "FIELD_INVALID")
        return {}
    if _depth_exceeds(values, MAX_JSON_DEPTH):
        bad.add(path, f"at most {MAX_JSON_DEPTH} levels are taken")
        return {}
    return {name: _with_whole_numbers(value) for name, value in values.items()}


def _with_whole_numbers(value: Json) -> Json:
    """A Struct knows floats only; templates count with whole numbers."""
    if isinstance(value, float) and math.isfinite(value) and value.is_integer() and abs(value) < 1 << 53:
        return int(value)
    if isinstance(value, dict):
        return {key: _with_whole_numbers(item) for key, item in value.items()}
    return [_with_whole_numbers(item) for item in value] if isinstance(value, list) else value


def _object(text: str, max_bytes: int, path: str, bad: Violations) -> dict[str, Json]:
    """Return a JSON object, empty where the text is none."""
    if len(text.encode()) > max_bytes:
        bad.add(path, f"at most {max_bytes} bytes are taken")
        return {}
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        bad.add(path, "must be the JSON text of an object", "FIELD_INVALID")
        return {}
    if not isinstance(value, dict):
        bad.add(path, "must be the JSON text of an object", "FIELD_INVALID")
        return {}
    if _depth_exceeds(value, MAX_JSON_DEPTH):
        bad.add(path, f"at most {MAX_JSON_DEPTH} levels are taken")
        return {}
    if not _is_encodable(value):
        bad.add(path, "must be the JSON text of an object", "FIELD_INVALID")
        return {}
    return value


def _refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity are no JSON."""
    raise ValueError(name)


def _is_encodable(value: Json) -> bool:
    """Whether no escape in it stands for half a surrogate pair, and no number is infinite."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        return False
    return True


def _depth_exceeds(value: Json, levels: int) -> bool:
    inside: list[Json] = [value]
    while inside and levels >= 0:
        held = [item.values() if isinstance(item, dict) else item for item in inside if isinstance(item, dict | list)]
        inside = [item for items in held for item in items]
        levels -= 1
    return bool(inside)
