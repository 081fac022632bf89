"""What the answer of a chat is held to: calls of tools as they were offered, and what a config asks for besides."""

from __future__ import annotations

import json
from typing import Final

from common.chat_grammars import closed
from common.errors import InvalidRequest
from common.generation import ChatParsing, GrammarKind, StructuredOutput, ToolGrammar
from common.structured import GrammarError
from gateway.conversation import Conversation, Tool
from gateway.structured import TOOLS_FIELD, StructuredOutputs, unsupported
from gateway.turns import TenantTurns

_ANY_OBJECT: Final = '{"type": "object"}'
_ANY_TEXT: Final = StructuredOutput(GrammarKind.TEXT)


async def chat_constraint(
    spec: StructuredOutput | None,
    conversation: Conversation,
    chat: ChatParsing,
    structured: StructuredOutputs | None,
    turns: TenantTurns,
    tenant: str,
) -> StructuredOutput | None:
    """Return the constraint of an answer; `spec` is what the config asks for, which has passed.

    Where a model cannot be constrained, it calls tools as it likes, unless it must call one. Raises InvalidRequest for
    a strict tool whose schema cannot be kept to, FailedPrecondition where a call cannot be forced.
    """
    if not conversation.tools:
        if spec is None or not chat.reasoning_format:
            return spec
        return _behind_reasoning(spec, chat)
    if structured is None:
        if conversation.must_call or any(tool.strict for tool in conversation.tools):
            raise unsupported()
        return None
    tools = [
        (tool.name, await _schema(tool, index, structured, turns, tenant))
        for index, tool in enumerate(conversation.tools)
    ]
    grammar = ToolGrammar(chat.tool_format, tuple(tools), conversation.must_call, conversation.parallel_tool_calls)
    # What must be a call need not match anything else.
    main = _ANY_TEXT if spec is None or conversation.must_call else spec
    constraint = _behind_reasoning(StructuredOutput(main.kind, main.text, main.choices, grammar), chat)
    try:
        await structured.compile(constraint, turns, tenant)
    except GrammarError as error:
        if spec is None and not conversation.must_call and not any(tool.strict for tool in conversation.tools):
            return None  # each passes, but not all together
        raise InvalidRequest(f"{TOOLS_FIELD}: {error}", reason=error.reason, field=TOOLS_FIELD) from error
    return constraint


def _behind_reasoning(spec: StructuredOutput, chat: ChatParsing) -> StructuredOutput:
    return StructuredOutput(spec.kind, spec.text, spec.choices, spec.tools, chat.reasoning_format, chat.in_reasoning)


async def _schema(tool: Tool, index: int, structured: StructuredOutputs, turns: TenantTurns, tenant: str) -> str:
    """Return the schema that a tool's arguments are held to."""
    text = json.dumps(closed(tool.parameters), ensure_ascii=False)
    try:
        await structured.compile(StructuredOutput(GrammarKind.JSON_SCHEMA, text), turns, tenant)
    except GrammarError as error:
        if not tool.strict:
            return _ANY_OBJECT
        field = f"{TOOLS_FIELD}[{index}].parameters"
        raise InvalidRequest(f"{field}: {error}", reason=error.reason, field=field) from error
    return text
