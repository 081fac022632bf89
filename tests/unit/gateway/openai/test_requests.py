"""Bodies of OpenAI's requests become ours, and what cannot be done is refused by its name."""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidRequest, ModelNotFound, QuotaExceeded, RateLimited, Unavailable
from common.jobs import Reason
from gateway import structured
from gateway.openai import requests, schemas
from gateway.openai.errors import HttpError, answer_to, param_of
from gateway.openai.requests import chat_request, completion_requests, parse
from torchrelay.v1 import generation_pb2 as pb

HELLO = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> pb.StreamGenerateRequest:
    body = json.dumps({"model": "m", "messages": HELLO, **fields}).encode()
    return chat_request(parse(body, schemas.ChatRequest), default_temperature=1.0)


def completions(**fields: Any) -> list[pb.StreamGenerateRequest]:
    body = json.dumps({"model": "m", "prompt": "p", **fields}).encode()
    parsed = parse(body, schemas.CompletionRequest)
    return completion_requests(parsed, default_temperature=1.0, context_tokens=64, idempotency_key="k")


def refusal(make: Callable[..., Any] = chat, **fields: Any) -> tuple[str, str]:
    with pytest.raises(InvalidRequest) as raised:
        make(**fields)
    assert "secret" not in raised.value.message
    return raised.value.reason, raised.value.violations[0].field


# Each parameter of a chat, and what becomes of it.
CHAT: dict[str, tuple[dict[str, Any], pb.GenerationConfig]] = {
    "frequency_penalty": ({"frequency_penalty": 0.5}, pb.GenerationConfig(frequency_penalty=0.5)),
    "presence_penalty": ({"presence_penalty": -1}, pb.GenerationConfig(presence_penalty=-1)),
    "logit_bias": ({"logit_bias": {"7": -5}}, pb.GenerationConfig(logit_bias={7: -5})),
    "logprobs": ({"logprobs": True}, pb.GenerationConfig(logprobs=True)),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 3}, pb.GenerationConfig(logprobs=True, top_logprobs=3)),
    "max_tokens": ({"max_tokens": 3}, pb.GenerationConfig(max_tokens=3)),
    "max_completion_tokens": ({"max_completion_tokens": 4}, pb.GenerationConfig(max_tokens=4)),
    "n": ({"n": 2}, pb.GenerationConfig(num_outputs=2)),
    "seed": ({"seed": -1}, pb.GenerationConfig(seed=(1 << 64) - 1)),
    "stop": ({"stop": "x"}, pb.GenerationConfig(stop=["x"])),
    "temperature": ({"temperature": 0}, pb.GenerationConfig(temperature=0)),
    "top_p": ({"top_p": 0.5}, pb.GenerationConfig(top_p=0.5)),
    "response_format": (
        {"response_format": {"type": "json_object"}},
        pb.GenerationConfig(structured_output=pb.StructuredOutput(json_object=pb.JsonObject())),
    ),
}
# And those that become something else, or change nothing here as there.
ELSEWHERE = {"model", "messages", "tools", "tool_choice", "parallel_tool_calls", "service_tier", "stream"} | {
    "stream_options",
    "chat_template_kwargs",
    "continue_final_message",
}
LABELS = {
    "user": "me",
    "metadata": {"a": "b"},
    "safety_identifier": "x",
    "prompt_cache_key": "y",
    "store": False,
    "modalities": ["text"],
}


def test_every_parameter_of_a_chat_is_accounted_for() -> None:
    assert set(schemas.ChatRequest.__struct_fields__) == CHAT.keys() | ELSEWHERE | LABELS.keys()


@pytest.mark.parametrize(("fields", "expected"), CHAT.values(), ids=CHAT)
def test_each_becomes_what_it_is_here(fields: dict[str, Any], expected: pb.GenerationConfig) -> None:
    if not expected.HasField("temperature"):
        expected.temperature = 1.0
    assert chat(**fields).config == expected


def test_labels_change_nothing_and_null_is_as_if_it_were_not_there() -> None:
    assert chat(**LABELS) == chat()
    assert chat(**dict.fromkeys({*CHAT, *LABELS, "tools", "tool_choice", "service_tier"})) == chat()


def test_own_parameters_are_taken_by_their_names() -> None:
    made = chat(top_k=5, bad_words_ids=[{"ids": [1, 2]}], min_tokens=2, repetition_penalty=1.5)
    assert (made.config.top_k, made.config.min_tokens, made.config.repetition_penalty) == (5, 2, 1.5)
    assert made.config.bad_words_ids[0].ids == [1, 2]


def test_beams_are_not_sampled_at_the_default_temperature() -> None:
    made = chat(num_beams=4, early_stopping="EARLY_STOPPING_NEVER", n=2)
    assert made.config == pb.GenerationConfig(num_beams=4, early_stopping=pb.EARLY_STOPPING_NEVER, num_outputs=2)
    assert chat(num_beams=4, temperature=0.5).config.temperature == 0.5  # to be refused


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"secret": 1}, "UNKNOWN_FIELD", "secret"),
        ({"num_outputs": 2}, "UNKNOWN_FIELD", "num_outputs"),
        ({"top_k": "secret"}, "FIELD_INVALID", "top_k"),
        ({"n": "secret"}, "FIELD_INVALID", "n"),
        ({"n": -1}, "FIELD_OUT_OF_RANGE", "n"),
        ({"max_tokens": 1 << 40}, "FIELD_OUT_OF_RANGE", "max_tokens"),
        ({"tool_choice": "secret"}, "FIELD_INVALID", "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {}}}, "FIELD_REQUIRED", "tool_choice.function.name"),
        ({"tools": [{"type": "function"}]}, "FIELD_REQUIRED", "tools[0].function"),
        ({"tools": [{"type": "secret", "function": {"name": "f"}}]}, "FIELD_INVALID", "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]}, "UNKNOWN_FIELD", "tools[0].function.x"),
        ({"response_format": {"type": "json_schema"}}, "FIELD_REQUIRED", "response_format.json_schema.schema"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "UNSUPPORTED_PART", "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "FIELD_INVALID", "messages[0].content"),
        ({"logit_bias": {"-1": 1}}, "FIELD_INVALID", "logit_bias"),
        ({"logit_bias": {"0" * 24 + "5" * 24: 1}}, "FIELD_INVALID", "logit_bias"),
        ({"logit_bias": {"0" * 5000: 1}}, "FIELD_INVALID", "logit_bias"),
        ({"logit_bias": {"4294967296": 1}}, "FIELD_INVALID", "logit_bias"),
        (
            {"structured_output": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "FIELD_CONFLICT",
            "structured_output",
        ),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "secret"}}},
            "FIELD_CONFLICT",
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_object", "json_schema": {"name": "secret"}}},
            "FIELD_CONFLICT",
            "response_format.json_schema",
        ),
        ({"stream_options": {"include_usage": True}}, "FIELD_CONFLICT", "stream_options"),
        ({"messages": [{"role": "user", "content": "hi", " - at `$.x`\n": 1}]}, "FIELD_INVALID", "messages[0]"),
        ({"chat_template_kwargs": {"x": {"y": "z"}, "w": 1 << 70}}, "", ""),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, Any], reason: str, field: str) -> None:
    if reason:
        assert refusal(**fields) == (reason, field)
    else:
        chat(**fields)


def test_unknown_parameters_that_are_null_are_as_if_they_were_not_there() -> None:
    assert chat(functions=None, suffix=None, reasoning_effort=None) == chat()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"logprobs": 1, "top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 1, "echo": True, "prompt_logprobs": 2}, "prompt_logprobs"),
    ],
)
def test_what_one_parameter_says_another_must_not_contradict(fields: dict[str, Any], field: str) -> None:
    assert refusal(completions, **fields) == ("FIELD_CONFLICT", field)
    assert completions(**{**fields, field: 1})[0].config.top_logprobs == 1


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (chat, {"suppress_tokens": [0] * 1025}),
        (chat, {"begin_suppress_tokens": [0] * 1025}),
        (chat, {"stop_token_ids": [0] * 65}),
        (chat, {"bad_words": [""] * 129}),
        (chat, {"bad_words_ids": [{"ids": []}] * 257}),
        (chat, {"bad_words_ids": [{"ids": [0] * 40_000}]}),
        (chat, {"sequence_bias": [{}] * 257}),
        (chat, {"structured_output": {"choices": {"choices": [""] * 40_000}}}),
        (chat, {"logit_bias": {str(i): 0 for i in range(1025)}}),
        (chat, {"chat_template_kwargs": {"a": [0] * 10_000}}),
        (chat, {"messages": HELLO * 4097}),
        (chat, {"tools": [{"function": {"name": "f"}}] * 129}),
        (completions, {"prompt": [0] * 64}),
        (completions, {"prompt": [[1], [0] * 64]}),
        (completions, {"prompt": ["a"] * 129}),
    ],
)
def test_what_is_too_long_is_not_converted(
    make: Callable[..., Any], fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[object] = []

    def counted(convert: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*values: Any) -> Any:
            converted.append(values)
            return convert(*values)

        return counting

    for name in ("json_format.ParseDict", "_is_id", "_message"):
        path = f"gateway.openai.requests.{name}"
        monkeypatch.setattr(path, counted(operator.attrgetter(name)(requests)))
    (name,) = fields
    reason, field = refusal(make, **fields)
    assert field == name
    assert reason in ("FIELD_OUT_OF_RANGE", "CONTEXT_LENGTH_EXCEEDED")
    assert len(converted) <= 3


def test_messages_come_back_as_they_were_given_out() -> None:
    made = chat(
        messages=[
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "audio": None,
                "function_call": None,
                "reasoning_content": "so",
                "tool_calls": [
                    {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}, "index": 0}
                ],
            },
            {"role": "tool", "tool_call_id": "abcdefghi", "content": ""},
        ],
        tools=[{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object"}}}],
        tool_choice={"type": "function", "function": {"name": "f"}},
        parallel_tool_calls=False,
        service_tier="flex",
    )
    messages = made.input.chat.messages
    assert [m.role for m in messages] == [pb.ROLE_SYSTEM, pb.ROLE_USER, pb.ROLE_ASSISTANT, pb.ROLE_TOOL]
    assert [part.text for part in messages[1].parts] == ["a", "b"]
    assert messages[2].parts[0].reasoning == "so"
    assert messages[2].tool_calls[0] == pb.ToolCall(id="abcdefghi", name="f", arguments="{}")
    assert messages[3].parts[0].text == ""
    assert made.input.chat.tools[0] == pb.Tool(name="f", parameters='{"type": "object"}', strict=True)
    assert (made.input.chat.tool_choice.name, made.priority) == ("f", pb.PRIORITY_LOW)


def test_each_prompt_is_a_generation_of_its_own() -> None:
    made = completions(prompt=["a", "b"], logprobs=0, echo=True, best_of=3, n=2)
    assert [(m.input.text, m.idempotency_key) for m in made] == [("a", "k"), ("b", "k")]
    config = made[0].config
    assert (config.max_tokens, config.best_of, config.num_outputs) == (16, 3, 2)
    assert (config.echo, config.logprobs) == (True, True)
    assert config.HasField("prompt_logprobs")
    assert completions()[0].idempotency_key == "k"
    # With a key a call is repeated when its connection is lost: the repeat is to find it running.
    assert [m.disconnect_grace.ToSeconds() for m in made] == [30, 30]
    assert not chat().HasField("disconnect_grace")


@settings(deadline=None, max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from(sorted(schemas.ChatRequest.__struct_fields__)),
)
def test_any_value_anywhere_is_taken_or_refused(value: Any, name: str) -> None:
    body = json.dumps({"model": "m", "messages": HELLO, name: value}).encode()
    with contextlib.suppress(InvalidRequest):
        assert chat_request(parse(body, schemas.ChatRequest), default_temperature=1.0).input.HasField("chat")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidRequest("bad", field="config.top_p"), (400, "invalid_request_error", "top_p", "field_invalid")),
        (ModelNotFound("no such model"), (404, "not_found_error", "model", "model_not_found")),
        (QuotaExceeded("spent", subject="t", limit=1), (429, "insufficient_quota", None, "insufficient_quota")),
        (Unavailable("away", retry_after_ms=1500), (503, "server_error", None, "unavailable")),
        (HttpError(413, "long", "request_too_large"), (413, "invalid_request_error", None, "request_too_large")),
    ],
)
def test_errors_are_what_clients_look_for(error: Any, expected: tuple[int, str, str | None, str]) -> None:
    found = answer_to(error, is_chat=True)
    body = found.body["error"]
    assert (found.status, body["type"], body["param"], body["code"]) == expected


def test_a_retry_is_told_in_whole_seconds_and_in_milliseconds() -> None:
    limited = RateLimited("slow down", subject="t", limit=1, retry_after_ms=1001)
    assert answer_to(limited, is_chat=False).headers == {"retry-after": "2", "retry-after-ms": "1001"}


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("config.num_outputs", "n"),
        ("config.structured_output.json_schema", "response_format"),
        ("input.chat.messages[2].parts[0].text", "messages[2].content[0]"),
        ("input.chat.messages[2].parts", "messages[2].content"),
        ("input.chat.messages[2].tool_calls[1].arguments", "messages[2].tool_calls[1].arguments"),
        ("input.chat.tools[1].parameters", "tools[1].function.parameters"),
        ("input.chat.template_arguments", "chat_template_kwargs"),
        ("input", "messages"),
        ("input.text", "prompt"),
        ("config.logit_bias", "logit_bias"),
        ("model", "model"),
    ],
)
def test_fields_are_named_as_the_caller_knows_them(field: str, param: str) -> None:
    assert param_of(field, is_chat=True) == param


def test_a_grammar_that_tools_brought_is_theirs() -> None:
    answer = answer_to(structured.failed(Reason.GRAMMAR_STUCK, pb.GenerationConfig()), is_chat=True)
    assert (answer.status, answer.body["error"]["param"]) == (400, "tools")
