"""Builds requests from plain Python values."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from google.protobuf.duration_pb2 import Duration

from torchrelay.v1 import generation_pb2 as pb

# A prompt: text, token ids, messages like {"role": "user", "content": "Hello"}, or an input as `make_chat`,
# `make_translation` and `make_summarization` make it.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | pb.GenerationInput

Priority = Literal["high", "normal", "low"]
Truncation = Literal["end", "start"]  # what is left out of a text that is too long; None: it is refused

_PRIORITIES = {"high": pb.PRIORITY_HIGH, "normal": pb.PRIORITY_NORMAL, "low": pb.PRIORITY_LOW}
_WHAT_A_PROMPT_IS = "a prompt is a string, a list of token ids, or a list of messages with role and content"
_ROLES = {
    "system": pb.ROLE_SYSTEM,
    "user": pb.ROLE_USER,
    "assistant": pb.ROLE_ASSISTANT,
    "tool": pb.ROLE_TOOL,
}
_TRUNCATIONS: Mapping[Truncation | None, pb.Truncation.ValueType] = {
    None: pb.TRUNCATION_UNSPECIFIED,
    "end": pb.TRUNCATION_END,
    "start": pb.TRUNCATION_START,
}
_MODES = {
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "none": pb.TOOL_CHOICE_MODE_NONE,
    "required": pb.TOOL_CHOICE_MODE_REQUIRED,
}


class GenerationOptions(TypedDict, total=False):
    """Fields of GenerationConfig; see its documentation. A missing one takes the model's default."""

    max_tokens: int
    max_length: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    seed: int
    num_outputs: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    logprobs: bool
    structured_output: pb.StructuredOutput
    min_tokens: int
    min_length: int
    ignore_eos: bool
    typical_p: float
    epsilon_cutoff: float
    eta_cutoff: float
    top_h: float
    presence_penalty: float
    frequency_penalty: float
    bad_words: Sequence[str]
    bad_words_ids: Sequence[Sequence[int]]
    logit_bias: Mapping[int, float]
    sequence_bias: Sequence[tuple[Sequence[int], float]]  # token ids and what is added to the score of the last
    suppress_tokens: Sequence[int]
    begin_suppress_tokens: Sequence[int]
    exponential_decay_length_penalty: tuple[int, float]  # start and factor
    forced_eos_token_id: int
    forced_bos_token_id: int
    encoder_repetition_penalty: float
    encoder_no_repeat_ngram_size: int
    include_stop: bool
    best_of: int
    top_logprobs: int
    prompt_logprobs: int
    echo: bool
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"] | pb.EarlyStopping.ValueType  # as in transformers, or the enum's values
    renormalize_logits: bool


def make_config(options: GenerationOptions) -> pb.GenerationConfig:
    """Turn options into a config: sequences and pairs, written as for transformers, become messages."""
    fields: dict[str, Any] = dict(options)
    if "bad_words_ids" in options:
        fields["bad_words_ids"] = [pb.TokenIds(ids=ids) for ids in options["bad_words_ids"]]
    if "sequence_bias" in options:
        fields["sequence_bias"] = [pb.SequenceBias(token_ids=ids, bias=bias) for ids, bias in options["sequence_bias"]]
    if "exponential_decay_length_penalty" in options:
        start, factor = options["exponential_decay_length_penalty"]
        fields["exponential_decay_length_penalty"] = pb.ExponentialDecay(start=start, factor=factor)
    early_stopping = options.get("early_stopping")
    if early_stopping == "never":
        fields["early_stopping"] = pb.EARLY_STOPPING_NEVER
    elif isinstance(early_stopping, bool):
        fields["early_stopping"] = pb.EARLY_STOPPING_WHEN_FULL if early_stopping else pb.EARLY_STOPPING_HEURISTIC
    return pb.GenerationConfig(**fields)


def make_input(prompt: Prompt) -> pb.GenerationInput:
    """Turn a prompt into an input. Raises ValueError on an unknown role, TypeError on anything else."""
    if isinstance(prompt, pb.GenerationInput):
        return prompt
    if isinstance(prompt, str):
        return pb.GenerationInput(text=prompt)
    if isinstance(prompt, bytes | Mapping):
        raise TypeError(_WHAT_A_PROMPT_IS)
    if {*map(type, prompt)} <= {int} or all(isinstance(item, int) for item in prompt):
        return pb.GenerationInput(token_ids=pb.TokenIds(ids=prompt))  # type: ignore[arg-type]
    return make_chat(prompt)  # type: ignore[arg-type]


def make_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    tool_choice: str | None = None,
    parallel_tool_calls: bool | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    continue_last_message: bool = False,
) -> pb.GenerationInput:
    """Build the input of a chat.

    A message has a role and content, and may have `reasoning`, `name`, `tool_call_id`, and `tool_calls` with `id`,
    `name` and `arguments`. A tool has a `name`, a `description` and `parameters`, a JSON Schema; arguments and
    parameters are mappings or JSON text. `tool_choice` is auto, none, required, or the name of a tool.

    Raises ValueError on an unknown role, TypeError on a message without role and content.
    """
    chat = pb.ChatInput(
        messages=[_message(item) for item in messages],
        tools=[
            pb.Tool(
                name=tool["name"],
                description=tool.get("description", ""),
                parameters=_json_text(tool["parameters"]) if tool.get("parameters") is not None else "",
                strict=tool.get("strict", False),
            )
            for tool in tools
        ],
        parallel_tool_calls=parallel_tool_calls,
        continue_last_message=continue_last_message,
    )
    if tool_choice in _MODES:
        chat.tool_choice.mode = _MODES[tool_choice]
    elif tool_choice is not None:
        chat.tool_choice.name = tool_choice
    if template_arguments is not None:
        chat.template_arguments.update(template_arguments)
    return pb.GenerationInput(chat=chat)


def make_translation(
    text: str, target_language: str = "", source_language: str = "", *, truncation: Truncation | None = None
) -> pb.GenerationInput:
    """Build the input of a translation; languages as GetModel names them, empty: the model's own.

    Raises KeyError for an unknown truncation.
    """
    wanted = pb.TranslationInput(
        text=text,
        source_language=source_language,
        target_language=target_language,
        truncation=_TRUNCATIONS[truncation],
    )
    return pb.GenerationInput(translation=wanted)


def make_summarization(text: str, *, truncation: Truncation | None = None) -> pb.GenerationInput:
    """Build the input of a summary. Raises KeyError for an unknown truncation."""
    return pb.GenerationInput(summarization=pb.SummarizationInput(text=text, truncation=_TRUNCATIONS[truncation]))


def _message(item: Mapping[str, Any]) -> pb.ChatMessage:
    if not isinstance(item, Mapping) or not {"role", "content"} <= item.keys():
        raise TypeError(_WHAT_A_PROMPT_IS)
    if item["role"] not in _ROLES:
        raise ValueError(f"role {item['role']!r} is not one of {', '.join(_ROLES)}")
    parts = [pb.ContentPart(reasoning=item["reasoning"])] if item.get("reasoning") else []
    if item["content"] or not item.get("tool_calls"):
        parts.append(pb.ContentPart(text=item["content"]))
    calls = [
        pb.ToolCall(id=call.get("id", ""), name=call["name"], arguments=_json_text(call.get("arguments", {})))
        for call in item.get("tool_calls") or ()
    ]
    return pb.ChatMessage(
        role=_ROLES[item["role"]],
        parts=parts,
        tool_calls=calls,
        tool_call_id=item.get("tool_call_id", ""),
        name=item.get("name", ""),
    )


def _json_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def make_duration(seconds: float | None) -> Duration | None:
    """Turn seconds into a Duration; None stays unset."""
    if seconds is None:
        return None
    micros = round(seconds * 1_000_000)
    return Duration(seconds=micros // 1_000_000, nanos=micros % 1_000_000 * 1000)


def make_priority(priority: Priority | None) -> pb.Priority.ValueType:
    """Turn a priority's name into its value; None stays unset. Raises ValueError for an unknown one."""
    if priority is not None and priority not in _PRIORITIES:
        raise ValueError(f"priority {priority!r} is not one of {', '.join(_PRIORITIES)}")
    return pb.PRIORITY_UNSPECIFIED if priority is None else _PRIORITIES[priority]


def make_stream_request(
    model: str,
    prompt: Prompt,
    options: GenerationOptions,
    *,
    time_limit_s: float | None,
    disconnect_grace_s: float,
    idempotency_key: str | None,
    priority: Priority | None = None,
    cache_salt: bytes = b"",
    adapter: str = "",
) -> pb.StreamGenerateRequest:
    """Build the request of a stream. Raises ValueError for an unknown priority.

    A key is made up if none is given: it is what makes a repeat after a lost reply safe.
    """
    return pb.StreamGenerateRequest(
        model=model,
        input=make_input(prompt),
        config=make_config(options),
        time_limit=make_duration(time_limit_s),
        disconnect_grace=make_duration(disconnect_grace_s),
        idempotency_key=idempotency_key or secrets.token_hex(16),
        priority=make_priority(priority),
        cache_salt=cache_salt,
        adapter=adapter,
    )
