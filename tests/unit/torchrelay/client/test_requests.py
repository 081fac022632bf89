"""Requests from plain values, errors from statuses, and which addresses are this machine's."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from gateway.conversation import conversation_of
from torchrelay.client import FieldViolation, RelayError
from torchrelay.client.channel import auth_metadata, is_loopback
from torchrelay.client.errors import from_rpc_error
from torchrelay.client.requests import (
    GenerationOptions,
    make_chat,
    make_config,
    make_duration,
    make_input,
    make_stream_request,
    make_summarization,
    make_translation,
)
from torchrelay.v1 import generation_pb2 as pb


def test_prompts_become_inputs() -> None:
    assert make_input("hi") == pb.GenerationInput(text="hi")
    assert make_input("") == pb.GenerationInput(text="")
    assert make_input([1, 2]) == pb.GenerationInput(token_ids=pb.TokenIds(ids=[1, 2]))
    chat = make_input([{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}])
    assert [(m.role, m.parts[0].text) for m in chat.chat.messages] == [
        (pb.ROLE_SYSTEM, "be kind"),
        (pb.ROLE_USER, "hi"),
    ]


@pytest.mark.parametrize("prompt", [[{"role": "user"}], [{"content": "x"}], ["hi"], [1, "x"], b"hi", {"role": "user"}])
def test_anything_else_is_a_type_error(prompt: Any) -> None:
    with pytest.raises(TypeError, match="a prompt is a string"):
        make_input(prompt)


def test_an_unknown_role_is_named() -> None:
    with pytest.raises(ValueError, match="role 'robot' is not one of system, user, assistant, tool"):
        make_input([{"role": "robot", "content": "x"}])


def test_tools_and_what_they_answered_are_plain_values() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    made = make_chat(
        [
            {"role": "user", "content": "Rain?"},
            {
                "role": "assistant",
                "content": "",
                "reasoning": "so",
                "tool_calls": [{"id": "abcdefghi", "name": "weather", "arguments": {"city": "Øslo"}}],
            },
            {"role": "tool", "content": "", "tool_call_id": "abcdefghi", "name": "weather"},
        ],
        tools=[{"name": "weather", "description": "Tells it", "parameters": schema}, {"name": "none"}],
        tool_choice="weather",
        parallel_tool_calls=False,
        template_arguments={"enable_thinking": True},
    )
    chat = made.chat
    assert make_input(made) is made
    assert chat.messages[1] == pb.ChatMessage(
        role=pb.ROLE_ASSISTANT,
        parts=[pb.ContentPart(reasoning="so")],
        tool_calls=[pb.ToolCall(id="abcdefghi", name="weather", arguments='{"city": "Øslo"}')],
    )
    assert (chat.messages[2].role, chat.messages[2].tool_call_id) == (pb.ROLE_TOOL, "abcdefghi")
    assert list(chat.tools) == [
        pb.Tool(name="weather", description="Tells it", parameters=json.dumps(schema)),
        pb.Tool(name="none"),
    ]
    assert (chat.tool_choice.name, chat.parallel_tool_calls) == ("weather", False)
    assert dict(chat.template_arguments) == {"enable_thinking": True}
    assert conversation_of(chat).tools[0].parameters == schema, "the gateway takes it"
    for mode, expected in (("none", pb.TOOL_CHOICE_MODE_NONE), ("required", pb.TOOL_CHOICE_MODE_REQUIRED)):
        assert make_chat([], tool_choice=mode).chat.tool_choice.mode == expected
    assert not make_chat([]).chat.HasField("tool_choice")


def test_ids_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"-1|range|negative"):
        make_input([-1])


def test_seconds_become_durations() -> None:
    assert make_duration(None) is None
    assert make_duration(1.25) == Duration(seconds=1, nanos=250_000_000)
    assert make_duration(0) == Duration()
    assert make_duration(0.1) == Duration(nanos=100_000_000)
    assert make_duration(2.9999999) == Duration(seconds=3)


def test_a_request_without_a_key_gets_its_own() -> None:
    def make() -> pb.StreamGenerateRequest:
        return make_stream_request(
            "tiny", "hi", {"top_k": 3}, time_limit_s=None, disconnect_grace_s=2, idempotency_key=None
        )

    first, second = make(), make()
    assert len(first.idempotency_key) == 32
    assert first.idempotency_key != second.idempotency_key
    assert not first.HasField("time_limit")
    assert first.config == pb.GenerationConfig(top_k=3)


def test_options_are_written_as_for_transformers() -> None:
    config = make_config(
        {
            "bad_words_ids": [[1, 2], [3]],
            "sequence_bias": [((4, 5), 1.5)],
            "exponential_decay_length_penalty": (6, 1.1),
            "logit_bias": {7: -2.0},
            "min_tokens": 8,
        }
    )
    assert config == pb.GenerationConfig(
        bad_words_ids=[pb.TokenIds(ids=[1, 2]), pb.TokenIds(ids=[3])],
        sequence_bias=[pb.SequenceBias(token_ids=[4, 5], bias=1.5)],
        exponential_decay_length_penalty=pb.ExponentialDecay(start=6, factor=1.1),
        logit_bias={7: -2.0},
        min_tokens=8,
    )


def test_every_field_of_the_config_is_an_option() -> None:
    fields = {descriptor.name for descriptor in pb.GenerationConfig.DESCRIPTOR.fields}
    assert GenerationOptions.__annotations__.keys() == fields


class Failed:
    """What grpc and grpc.aio raise, as far as it is read."""

    def __init__(self, code: grpc.StatusCode, *details: Any) -> None:
        self._code = code
        packed = []
        for detail in details:
            item = AnyMessage()
            item.Pack(detail)
            packed.append(item)
        status = status_pb2.Status(code=code.value[0], details=packed)
        self._trailers = (("other", "x"), ("grpc-status-details-bin", status.SerializeToString()))

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "what happened"

    def trailing_metadata(self) -> Any:
        return self._trailers


def test_all_details_of_an_error_are_read() -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="config.top_p", description="must be above 0")
    error = from_rpc_error(
        Failed(
            grpc.StatusCode.INVALID_ARGUMENT,
            error_details_pb2.ErrorInfo(reason="FIELD_INVALID", domain="torchrelay", metadata={"limit": "1"}),
            error_details_pb2.BadRequest(field_violations=[violation]),
            error_details_pb2.RetryInfo(retry_delay=Duration(nanos=250_000_000)),
            error_details_pb2.DebugInfo(detail="not ours"),
            pb.Usage(prompt_tokens=3),
        ),
        "g1",
    )
    assert (error.code, error.message, error.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "what happened",
        "FIELD_INVALID",
    )
    assert (dict(error.metadata), error.retry_delay_s, error.generation_id) == ({"limit": "1"}, 0.25, "g1")
    assert error.violations == (FieldViolation("config.top_p", "must be above 0"),)
    assert error.usage == pb.Usage(prompt_tokens=3)
    assert str(error) == "INVALID_ARGUMENT FIELD_INVALID: what happened; config.top_p: must be above 0"


def test_a_proxy_s_reason_is_not_the_server_s() -> None:
    info = error_details_pb2.ErrorInfo(reason="UPSTREAM_RESET", domain="mesh.example")
    error = from_rpc_error(Failed(grpc.StatusCode.UNKNOWN, info))
    assert (error.reason, error.is_connection_loss) == ("", True)


def test_an_error_without_details_is_a_broken_connection() -> None:
    class Bare(Failed):
        def trailing_metadata(self) -> Any:
            return None

    assert from_rpc_error(Bare(grpc.StatusCode.UNAVAILABLE)).is_connection_loss
    assert str(RelayError(grpc.StatusCode.UNAVAILABLE, "gone")) == "UNAVAILABLE: gone"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:50051", True),
        ("127.0.0.1", True),
        ("[::1]:50051", True),
        ("localhost:1", True),
        ("unix:/run/x.sock", True),
        ("unix:///run/x.sock", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:2", True),
        ("ipv6:[::1]:1", True),
        ("0.0.0.0:50051", False),
        ("[::]:50051", False),
        (":50051", False),
        ("localhost.example:1", False),
        ("127.0.0.1.example:1", False),
        ("dns:///localhost:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("10.0.0.1:1", False),
    ],
)
def test_loopback_is_recognised(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def test_a_key_travels_as_bearer() -> None:
    assert auth_metadata("tr_x") == (("authorization", "Bearer tr_x"),)
    assert auth_metadata(None) == auth_metadata("") == ()


def test_a_priority_is_named_and_another_is_refused() -> None:
    def made(**fields: Any) -> pb.StreamGenerateRequest:
        return make_stream_request(
            "m", "hi", {}, time_limit_s=None, disconnect_grace_s=1, idempotency_key="k", **fields
        )

    assert made().priority == pb.PRIORITY_UNSPECIFIED
    assert made(priority="low", cache_salt=b"s", adapter="polite") == pb.StreamGenerateRequest(
        model="m",
        input=pb.GenerationInput(text="hi"),
        config=pb.GenerationConfig(),
        disconnect_grace=Duration(seconds=1),
        idempotency_key="k",
        priority=pb.PRIORITY_LOW,
        cache_salt=b"s",
        adapter="polite",
    )
    with pytest.raises(ValueError, match="high, normal, low"):
        made(priority="urgent")


def test_a_translation_and_a_summary_are_inputs() -> None:
    wanted = pb.TranslationInput(text="hi", source_language="en", target_language="de", truncation=pb.TRUNCATION_END)
    assert make_translation("hi", "de", "en", truncation="end") == pb.GenerationInput(translation=wanted)
    assert make_translation("hi") == pb.GenerationInput(translation=pb.TranslationInput(text="hi"))
    cut = pb.SummarizationInput(text="hi", truncation=pb.TRUNCATION_START)
    assert make_summarization("hi", truncation="start") == pb.GenerationInput(summarization=cut)
    assert make_input(make_summarization("hi")).summarization == pb.SummarizationInput(text="hi")
    with pytest.raises(KeyError):
        make_summarization("hi", truncation="middle")  # type: ignore[arg-type]
