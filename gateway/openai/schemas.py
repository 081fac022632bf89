"""What OpenAI's clients send, field by field. A field that is not here is one of GenerationConfig's, or refused."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a stream is sent."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class FunctionCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call in the conversation so far."""

    name: str
    arguments: str = ""


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None  # left over from a stream


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A turn. Clients send back what they were given, null fields included."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = None
    function_call: None = None


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    function: Function
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class NamedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    function: NamedFunction
    type: Literal["function"] = "function"


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class _Common(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of requests have. Null is as if it were not there."""

    model: str
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None  # labels of the caller's own; they change nothing here, as there
    metadata: dict[str, str] | None = None


class CompletionRequest(_Common, frozen=True, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: str | list[Any]  # a text, token ids, or several of either
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None


class ChatRequest(_Common, frozen=True, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    response_format: ResponseFormat | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    store: Literal[False] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    tools: list[Tool] | None = None
    top_logprobs: int | None = None
