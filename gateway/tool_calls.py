"""Tools in chats: how a model is told of them, and what is then looked for in its answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from common.chat_formats import REASONING_FORMATS
from common.generation import ChatParsing
from common.registry import ModelCard
from gateway.conversation import Conversation, Message, Tool, ToolCall

GENERIC: Final = "generic"

_TOLD: Final = """You can call functions. Each line describes one in JSON:
{tools}

To call a function, write nothing but this, once for each call:
<tool_call>
{{"name": "the function's name", "arguments": {{"argument": "value"}}}}
</tool_call>
What it returns stands between <tool_response> and </tool_response> in the next message."""


def as_plain(conversation: Conversation, *, in_system: bool) -> Conversation:
    """Return a conversation for a template that knows no tools: they, calls and results are told in plain messages.

    The tools stand in the system message, or before the first other one where the template takes no system message.
    """
    messages = [_plain_message(message) for message in conversation.messages]
    if conversation.tools:
        told = _TOLD.format(tools="\n".join(map(_described, conversation.tools)))
        if in_system and messages[0].role == "system":
            messages[0] = replace(messages[0], content=f"{messages[0].content}\n\n{told}".lstrip("\n"))
        elif in_system:
            messages.insert(0, Message("system", told))
        else:
            first = next((i for i, message in enumerate(messages) if message.role == "user"), 0)
            messages[first] = replace(messages[first], content=f"{told}\n\n{messages[first].content}")
    return replace(conversation, messages=tuple(_joined(messages)), tools=())


def _plain_message(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
    if message.tool_calls:
        calls = "\n".join(map(_written, message.tool_calls))
        return replace(message, content=f"{message.content}\n{calls}".lstrip("\n"), tool_calls=())
    return message


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Join the results of parallel calls, and what the user says behind them: templates want turns to alternate."""
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else None
        if before is not None and before.role == message.role == "user" and "</tool_response>" in before.content[-17:]:
            joined[-1] = replace(before, content=f"{before.content}\n{message.content}")
        else:
            joined.append(message)
    return joined


def _described(tool: Tool) -> str:
    described = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return json.dumps(described, ensure_ascii=False)


def _written(call: ToolCall) -> str:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {arguments}}}\n</tool_call>'


def parsing_of(card: ModelCard, conversation: Conversation, rendered: str) -> ChatParsing | None:
    """Return what the model's answer is to be taken apart into, None if it is plain text.

    `rendered` is the prompt's text: where it ends with the mark of reasoning, the model is about to reason.
    """
    tool_format = card.tool_format if conversation.tools else ""
    if not tool_format and not card.reasoning_format:
        return None
    marks = REASONING_FORMATS.get(card.reasoning_format)
    return ChatParsing(
        reasoning_format=card.reasoning_format,
        in_reasoning=marks is not None and rendered.rstrip().endswith(marks.begin),
        tool_format=tool_format,
        tool_names=tuple(tool.name for tool in conversation.tools) if tool_format else (),
        max_tool_calls=0 if conversation.parallel_tool_calls or not tool_format else 1,
    )
