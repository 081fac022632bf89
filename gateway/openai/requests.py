"""From the bodies of OpenAI's requests to ours. Nothing is dropped: what cannot be done is refused by its name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sized
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import msgspec
from google.protobuf import json_format

from common import parameter_limits
from common.errors import InvalidRequest, ModelNotFound
from gateway import beams, validation
from gateway.conversation import MAX_MESSAGES, MAX_TEMPLATE_ARGUMENTS_BYTES, MAX_TOOLS
from gateway.openai import schemas
from torchrelay.v1 import generation_pb2 as pb

MAX_PROMPTS: Final = 128
REPEAT_GRACE_S: Final = 30  # how long a generation with an idempotency key goes on without its client
_DEFAULT_MAX_TOKENS: Final = 16  # of completions, as OpenAI documents it
_EXTENSIONS: Final = frozenset(pb.GenerationConfig.DESCRIPTOR.fields_by_name) - {"num_outputs", "max_length"}
_ROLES: Final = {
    "system": pb.ROLE_SYSTEM,
    "developer": pb.ROLE_SYSTEM,
    "user": pb.ROLE_USER,
    "assistant": pb.ROLE_ASSISTANT,
    "tool": pb.ROLE_TOOL,
}
_MODES: Final = {
    "none": pb.TOOL_CHOICE_MODE_NONE,
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "required": pb.TOOL_CHOICE_MODE_REQUIRED,
}
_PRIORITIES: Final = {"flex": pb.PRIORITY_LOW, "priority": pb.PRIORITY_HIGH}
_WHERE: Final = re.compile(r"(?:key in )?\$\.?(.*)`", re.DOTALL)
_MAX_ITEMS: Final = {  # what would be refused anyway is not looked into
    "bad_words": parameter_limits.MAX_BAD_WORDS,
    "bad_words_ids": parameter_limits.MAX_PHRASES,
    "sequence_bias": parameter_limits.MAX_PHRASES,
    "suppress_tokens": parameter_limits.MAX_TOKEN_IDS,
    "begin_suppress_tokens": parameter_limits.MAX_TOKEN_IDS,
    "stop_token_ids": validation.MAX_STOP_TOKEN_IDS,
}
# Values inside one parameter: more than the most that any takes, which is as many phrases as are taken, full of ids.
_MAX_VALUES: Final = 2 * parameter_limits.MAX_PHRASES * parameter_limits.MAX_PHRASE_IDS
_MAX_ID_DIGITS: Final = 10

_T = TypeVar("_T", schemas.CompletionRequest, schemas.ChatRequest)
AnyRequest: TypeAlias = schemas.CompletionRequest | schemas.ChatRequest


class Parsed(NamedTuple):
    """A request's own fields, and those of GenerationConfig that it has besides."""

    request: AnyRequest
    extensions: Mapping[str, Any]
    adapter: str = ""  # that the model's name ended with


def parse(body: bytes, kind: type[_T]) -> Parsed:
    """Read a body. Raises InvalidRequest."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise InvalidRequest("the body is not valid JSON", reason="MALFORMED_MESSAGE") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be a JSON object", reason="MALFORMED_MESSAGE")
    fields = {name: value for name, value in fields.items() if value is not None}
    others = fields.keys() - set(kind.__struct_fields__)
    unknown = others - _EXTENSIONS
    if unknown:
        raise InvalidRequest("this parameter is not known here", reason="UNKNOWN_FIELD", field=min(unknown)[:64])
    extensions = {name: fields.pop(name) for name in sorted(others)}
    for name in ("messages", "tools"):
        value = fields.get(name)
        if isinstance(value, list):
            _check_number_of(value, name, MAX_MESSAGES if name == "messages" else MAX_TOOLS)
    try:
        return Parsed(msgspec.convert(fields, kind), extensions)
    except msgspec.ValidationError as error:
        raise invalid(str(error)) from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deep", reason="MALFORMED_MESSAGE") from None


def split_model(name: str) -> tuple[str, str]:
    """Return a model's name and its adapter's, which is empty where none is named. Raises ModelNotFound."""
    base, colon, adapter = name.partition(":")  # names of models and of adapters have none
    if colon and not adapter:
        raise ModelNotFound("no such model")
    return base, adapter


def full_name(model: str, adapter: str) -> str:
    """Return the name by which a model is asked for with an adapter."""
    return f"{model}:{adapter}" if adapter else model


def invalid(text: str) -> InvalidRequest:
    """Say what was expected and where; what was sent is not repeated."""
    told, mark, where = text.rpartition(" - at `")  # what is told may hold names of the caller's, of any length
    found = _WHERE.fullmatch(where) if mark else None
    path = found.group(1) if found else ""
    if not found:
        told = text
    missing = re.match(r"Object missing required field `(\w+)`", told)
    unknown = re.match(r"Object contains unknown field `(\w{1,64})`", told)
    if missing or unknown:
        name = (missing or unknown).group(1)  # type: ignore[union-attr]
        path = f"{path}.{name}" if path else name
        if missing:
            return InvalidRequest("is required", reason="FIELD_REQUIRED", field=path)
        return InvalidRequest("this parameter is not known here", reason="UNKNOWN_FIELD", field=path)
    if told.startswith(("Expected", "Object")):
        return InvalidRequest(told, reason="FIELD_INVALID", field=path or "body")
    return InvalidRequest("is not one of the values that are taken here", reason="FIELD_INVALID", field=path or "body")


def completion_requests(
    parsed: Parsed, *, default_temperature: float, context_tokens: int, idempotency_key: str = ""
) -> list[pb.StreamGenerateRequest]:
    """Return a generation for each prompt, none of more ids than the model's context. Raises InvalidRequest."""
    request = parsed.request
    assert isinstance(request, schemas.CompletionRequest)
    config = _config(parsed, default_temperature)
    config.max_tokens = _DEFAULT_MAX_TOKENS if request.max_tokens is None else _count(request.max_tokens, "max_tokens")
    if request.best_of is not None:
        config.best_of = _count(request.best_of, "best_of")
    if request.echo:
        config.echo = True
    if request.logprobs is not None:
        config.logprobs = True
        num_alternatives = _count(request.logprobs, "logprobs")
        for name in ("top_logprobs", "prompt_logprobs") if request.echo else ("top_logprobs",):
            if parsed.extensions.get(name, num_alternatives) != num_alternatives:
                raise InvalidRequest("must not differ from logprobs", reason="FIELD_CONFLICT", field=name)
            setattr(config, name, num_alternatives)
    inputs = _prompts(request.prompt, context_tokens)
    made = [
        pb.StreamGenerateRequest(
            model=request.model,
            input=source,
            config=config,
            idempotency_key=idempotency_key,
            adapter=parsed.adapter,
        )
        for source in inputs
    ]
    for one in made:
        _let_repeat(one)
    return made


def chat_request(parsed: Parsed, *, default_temperature: float, idempotency_key: str = "") -> pb.StreamGenerateRequest:
    """Return the generation. Raises InvalidRequest."""
    request = parsed.request
    assert isinstance(request, schemas.ChatRequest)
    config = _config(parsed, default_temperature)
    limits = [value for value in (request.max_tokens, request.max_completion_tokens) if value is not None]
    if len(set(limits)) > 1:
        raise InvalidRequest("must not differ from max_tokens", reason="FIELD_CONFLICT", field="max_completion_tokens")
    if limits:
        config.max_tokens = _count(limits[0], "max_completion_tokens" if request.max_tokens is None else "max_tokens")
    if request.logprobs is not None:
        config.logprobs = request.logprobs
    if request.top_logprobs is not None:
        config.top_logprobs = _count(request.top_logprobs, "top_logprobs")
    if request.response_format is not None:
        if request.response_format.type != "text" and config.HasField("structured_output"):
            raise InvalidRequest(
                "must not be given together with response_format", reason="FIELD_CONFLICT", field="structured_output"
            )
        _add_format(config, request.response_format)
    made = pb.StreamGenerateRequest(
        model=request.model,
        input=pb.GenerationInput(chat=_chat(request)),
        config=config,
        idempotency_key=idempotency_key,
        adapter=parsed.adapter,
        priority=_PRIORITIES.get(request.service_tier or "", pb.PRIORITY_UNSPECIFIED),
    )
    _let_repeat(made)
    return made


def _let_repeat(request: pb.StreamGenerateRequest) -> None:
    """A call with a key is repeated when its connection is lost: what the repeat finds must not be cancelled."""
    if request.idempotency_key:
        request.disconnect_grace.FromSeconds(REPEAT_GRACE_S)


def _config(parsed: Parsed, default_temperature: float) -> pb.GenerationConfig:
    request = parsed.request
    config = pb.GenerationConfig()
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("is taken only together with stream", reason="FIELD_CONFLICT", field="stream_options")
    for name, value in parsed.extensions.items():
        if isinstance(value, list) and name in _MAX_ITEMS:
            _check_number_of(value, name, _MAX_ITEMS[name])
        if _holds_more(value, _MAX_VALUES):
            raise InvalidRequest(
                f"at most {_MAX_VALUES} values are taken", reason="FIELD_OUT_OF_RANGE", field=name, limit=_MAX_VALUES
            )
        try:
            json_format.ParseDict({name: value}, config)
        except (json_format.ParseError, ValueError, TypeError, RecursionError):
            raise InvalidRequest("is not a value of this parameter", reason="FIELD_INVALID", field=name) from None
    for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty"):
        value = getattr(request, name)
        if value is not None:
            setattr(config, name, value)
    if not config.HasField("temperature") and not beams.is_asked_for(config):  # which are not sampled
        config.temperature = default_temperature
    if request.n is not None:
        config.num_outputs = _count(request.n, "n")
    if request.seed is not None:
        config.seed = request.seed % (1 << 64)
    if request.stop is not None:
        config.stop.extend([request.stop] if isinstance(request.stop, str) else request.stop)
    _check_number_of(request.logit_bias or {}, "logit_bias", parameter_limits.MAX_TOKEN_IDS)
    for text, bias in (request.logit_bias or {}).items():
        is_id = len(text) <= _MAX_ID_DIGITS and text.isascii() and text.isdecimal() and int(text) < 1 << 32
        if not is_id:
            raise InvalidRequest("keys must be token ids", reason="FIELD_INVALID", field="logit_bias")
        config.logit_bias[int(text)] = bias
    return config


def _count(value: int, field: str) -> int:
    """Return what our messages can hold; whether it is in range is the gateway's business."""
    if not 0 <= value < 1 << 32:
        raise InvalidRequest("must be at least 0", reason="FIELD_OUT_OF_RANGE", field=field)
    return value


def _check_number_of(values: Sized, field: str, most: int) -> None:
    if len(values) > most:
        raise InvalidRequest(
            f"at most {most} are taken", reason="FIELD_OUT_OF_RANGE", field=field, limit=most, got=len(values)
        )


def _holds_more(value: object, most: int) -> bool:
    """Whether there are more values inside a value of JSON; no more than that are looked at."""
    inside, num_values = [value], 0
    while inside:
        one = inside.pop()
        if isinstance(one, list | dict):
            num_values += len(one)
            if num_values > most:
                return True
            inside.extend(one.values() if isinstance(one, dict) else one)
    return False


def _check_prompt_ids(ids: Sized, context_tokens: int) -> None:
    if len(ids) >= context_tokens:
        raise InvalidRequest(
            f"the prompt has {len(ids)} tokens, which leaves no room in the model's context of {context_tokens}",
            reason="CONTEXT_LENGTH_EXCEEDED",
            field="prompt",
            limit=context_tokens - 1,
            got=len(ids),
        )


def _prompts(prompt: str | list[Any], context_tokens: int) -> list[pb.GenerationInput]:
    if isinstance(prompt, str):
        return [pb.GenerationInput(text=prompt)]
    if not prompt:
        raise InvalidRequest("must not be empty", reason="FIELD_REQUIRED", field="prompt")
    if _is_id(prompt[0]):
        _check_prompt_ids(prompt, context_tokens)
    if len(prompt) < context_tokens and all(_is_id(item) for item in prompt):
        return [pb.GenerationInput(token_ids=pb.TokenIds(ids=prompt))]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(
            f"at most {MAX_PROMPTS} prompts are taken", reason="FIELD_OUT_OF_RANGE", field="prompt", limit=MAX_PROMPTS
        )
    if all(isinstance(item, str) for item in prompt):
        return [pb.GenerationInput(text=item) for item in prompt]
    for item in prompt:
        if isinstance(item, list):
            _check_prompt_ids(item, context_tokens)
    if all(isinstance(item, list) and all(_is_id(one) for one in item) for item in prompt):
        return [pb.GenerationInput(token_ids=pb.TokenIds(ids=item)) for item in prompt]
    raise InvalidRequest(
        "must be a text, an array of texts, of token ids, or of arrays of token ids",
        reason="FIELD_INVALID",
        field="prompt",
    )


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32


def _chat(request: schemas.ChatRequest) -> pb.ChatInput:
    _check_template_arguments(request.chat_template_kwargs or {})
    chat = pb.ChatInput(messages=[_message(message, i) for i, message in enumerate(request.messages)])
    for i, tool in enumerate(request.tools or ()):
        function = tool.function
        chat.tools.add(
            name=function.name,
            description=function.description or "",
            parameters="" if function.parameters is None else _text_of(function.parameters, f"tools[{i}].function"),
            strict=bool(function.strict),
        )
    if isinstance(request.tool_choice, schemas.NamedTool):
        chat.tool_choice.name = request.tool_choice.function.name
    elif request.tool_choice is not None:
        chat.tool_choice.mode = _MODES[request.tool_choice]
    if request.parallel_tool_calls is not None:
        chat.parallel_tool_calls = request.parallel_tool_calls
    if request.chat_template_kwargs is not None:
        try:
            chat.template_arguments.update(request.chat_template_kwargs)
        except (ValueError, TypeError, RecursionError):
            raise InvalidRequest("must be an object", reason="FIELD_INVALID", field="chat_template_kwargs") from None
    chat.continue_last_message = bool(request.continue_final_message)
    return chat


def _check_template_arguments(values: Mapping[str, Any]) -> None:
    try:
        size = len(msgspec.json.encode(values))
    except (ValueError, RecursionError):
        raise InvalidRequest("must be plain JSON", reason="FIELD_INVALID", field="chat_template_kwargs") from None
    if size > MAX_TEMPLATE_ARGUMENTS_BYTES:
        raise InvalidRequest(
            f"at most {MAX_TEMPLATE_ARGUMENTS_BYTES} bytes of JSON are taken",
            reason="FIELD_OUT_OF_RANGE",
            field="chat_template_kwargs",
            limit=MAX_TEMPLATE_ARGUMENTS_BYTES,
            got=size,
        )


def _message(message: schemas.ChatMessage, index: int) -> pb.ChatMessage:
    parts = [pb.ContentPart(reasoning=message.reasoning_content)] if message.reasoning_content else []
    if isinstance(message.content, str):
        if message.content or not message.tool_calls:
            parts.append(pb.ContentPart(text=message.content))
    else:
        for number, part in enumerate(message.content or ()):
            text = part.get("text")
            if part.get("type") != "text" or not isinstance(text, str) or part.keys() != {"type", "text"}:
                raise InvalidRequest(
                    "only parts of type text are served, with their text",
                    reason="UNSUPPORTED_PART",
                    field=f"messages[{index}].content[{number}]",
                )
            parts.append(pb.ContentPart(text=text))
    return pb.ChatMessage(
        role=_ROLES[message.role],
        parts=parts,
        tool_calls=[
            pb.ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in message.tool_calls or ()
        ],
        tool_call_id=message.tool_call_id or "",
        name=message.name or "",
    )


def _add_format(config: pb.GenerationConfig, wanted: schemas.ResponseFormat) -> None:
    if wanted.json_schema is not None and wanted.type != "json_schema":
        raise InvalidRequest(
            "is taken only with the type json_schema", reason="FIELD_CONFLICT", field="response_format.json_schema"
        )
    if wanted.type == "json_object":
        config.structured_output.json_object.SetInParent()
    elif wanted.type == "json_schema":
        if wanted.json_schema is None or wanted.json_schema.schema is None:
            raise InvalidRequest(
                "a schema is required", reason="FIELD_REQUIRED", field="response_format.json_schema.schema"
            )
        config.structured_output.json_schema = _text_of(wanted.json_schema.schema, "response_format.json_schema.schema")


def _text_of(value: Mapping[str, Any], field: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError):
        raise InvalidRequest("must be plain JSON", reason="FIELD_INVALID", field=field) from None
    return text
