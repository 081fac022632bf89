"""What of a conversation is taken, and what is refused, by field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct

from common.errors import InvalidRequest
from gateway import conversation as c
from torchrelay.v1 import generation_pb2 as pb


def message(role: int, *parts: str, **fields: Any) -> pb.ChatMessage:
    return pb.ChatMessage(role=role, parts=[pb.ContentPart(text=part) for part in parts], **fields)  # type: ignore[arg-type]


def chat(*messages: pb.ChatMessage, **fields: Any) -> pb.ChatInput:
    return pb.ChatInput(messages=messages or [message(pb.ROLE_USER, "hi")], **fields)


def tool(name: str = "look_up", parameters: str = "", description: str = "") -> pb.Tool:
    return pb.Tool(name=name, parameters=parameters, description=description)


def faults(source: pb.ChatInput) -> list[tuple[str, str]]:
    with pytest.raises(InvalidRequest) as raised:
        c.conversation_of(source)
    return [(v.field.removeprefix("input.chat."), v.reason) for v in raised.value.violations]


def test_a_message_s_parts_are_joined_by_kind() -> None:
    answer = pb.ChatMessage(
        role=pb.ROLE_ASSISTANT,
        parts=[pb.ContentPart(reasoning="so"), pb.ContentPart(text="a"), pb.ContentPart(text="b")],
    )
    found = c.conversation_of(chat(message(pb.ROLE_SYSTEM, "be", " kind"), message(pb.ROLE_USER, ""), answer))
    assert found == c.Conversation(
        (c.Message("system", "be kind"), c.Message("user", ""), c.Message("assistant", "ab", "so"))
    )


def test_calls_and_results_are_taken_as_they_are() -> None:
    calls = [pb.ToolCall(id="abcdefghi", name="look_up", arguments='{"b": 1, "a": "x"}')]
    found = c.conversation_of(
        chat(
            message(pb.ROLE_USER, "hi"),
            pb.ChatMessage(role=pb.ROLE_ASSISTANT, tool_calls=calls),
            message(pb.ROLE_TOOL, "found", tool_call_id="abcdefghi", name="look_up"),
            tools=[
                tool(parameters='{"type": "object", "properties": {"b": {}, "a": {}}}', description="looks"),
                tool("g"),
            ],
        )
    )
    assert found.messages[1].tool_calls == (
        c.ToolCall("abcdefghi", "look_up", {"b": 1, "a": "x"}, '{"b": 1, "a": "x"}'),
    )
    assert list(found.messages[1].tool_calls[0].arguments) == ["b", "a"], "in the caller's order"
    assert found.messages[2] == c.Message("tool", "found", tool_call_id="abcdefghi", name="look_up")
    assert list(found.tools[0].parameters["properties"]) == ["b", "a"]
    assert found.tools[1].parameters == {"type": "object", "properties": {}}
    assert (found.must_call, found.parallel_tool_calls) == (False, True)


@pytest.mark.parametrize(
    ("choice", "offered", "must_call"),
    [
        (None, ["f", "g"], False),
        (pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_AUTO), ["f", "g"], False),
        (pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_NONE), [], False),
        (pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED), ["f", "g"], True),
        (pb.ToolChoice(name="g"), ["g"], True),
    ],
)
def test_the_choice_decides_what_the_model_is_offered(
    choice: pb.ToolChoice | None, offered: list[str], must_call: bool
) -> None:
    found = c.conversation_of(chat(tools=[tool("f"), tool("g")], tool_choice=choice))
    assert ([tool.name for tool in found.tools], found.must_call) == (offered, must_call)


def test_template_arguments_are_plain_values_with_whole_numbers() -> None:
    arguments = Struct()
    arguments.update({"enable_thinking": False, "depth": 3, "p": 0.5, "names": ["a", 1, {"x": 2}], "none": None})
    found = c.conversation_of(chat(template_arguments=arguments)).template_arguments
    assert found == {"enable_thinking": False, "depth": 3, "p": 0.5, "names": ["a", 1, {"x": 2}], "none": None}
    assert [type(found["depth"]), type(found["p"]), type(found["names"][2]["x"])] == [int, float, int]


def arguments(**values: Any) -> Struct:
    struct = Struct()
    struct.update(values)
    return struct


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


USER = message(pb.ROLE_USER, "hi")


@pytest.mark.parametrize(
    ("source", "expected"),
    {
        "no message": (pb.ChatInput(), [("messages", "FIELD_REQUIRED")]),
        "too many messages": (chat(*[USER] * 4097), [("messages", "FIELD_OUT_OF_RANGE")]),
        "many faults": (
            chat(
                message(pb.ROLE_UNSPECIFIED, "x"),
                message(17, "x"),
                message(pb.ROLE_USER),
                pb.ChatMessage(role=pb.ROLE_ASSISTANT, parts=[pb.ContentPart(text="a"), pb.ContentPart()]),
            ),
            [
                ("messages[0].role", "FIELD_INVALID"),
                ("messages[1].role", "FIELD_INVALID"),
                ("messages[2].parts", "FIELD_REQUIRED"),
                ("messages[3].parts[1]", "FIELD_REQUIRED"),
            ],
        ),
        "a user reasons": (
            chat(pb.ChatMessage(role=pb.ROLE_USER, parts=[pb.ContentPart(reasoning="x")])),
            [("messages[0].parts[0].reasoning", "FIELD_CONFLICT")],
        ),
        "a user calls": (
            chat(message(pb.ROLE_USER, "x", tool_calls=[pb.ToolCall(name="f")])),
            [("messages[0].tool_calls", "FIELD_CONFLICT")],
        ),
        "a tool answers nothing": (
            chat(USER, message(pb.ROLE_TOOL, "x")),
            [("messages[1].tool_call_id", "FIELD_REQUIRED")],
        ),
        "a user answers a call": (
            chat(message(pb.ROLE_USER, "x", tool_call_id="1")),
            [("messages[0].tool_call_id", "FIELD_CONFLICT")],
        ),
        "a call without a name": (
            chat(USER, pb.ChatMessage(role=pb.ROLE_ASSISTANT, tool_calls=[pb.ToolCall(arguments="{}")])),
            [("messages[1].tool_calls[0].name", "FIELD_REQUIRED")],
        ),
        **{
            f"arguments {text[:20]}": (
                chat(USER, pb.ChatMessage(role=pb.ROLE_ASSISTANT, tool_calls=[pb.ToolCall(name="f", arguments=text)])),
                [("messages[1].tool_calls[0].arguments", "FIELD_INVALID")],
            )
            for text in ("x", "[]", '"{}"', '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}', "{" * 2000, "1" * 5000)
        },
        "deep arguments": (
            chat(
                USER, pb.ChatMessage(role=pb.ROLE_ASSISTANT, tool_calls=[pb.ToolCall(name="f", arguments=nested(70))])
            ),
            [("messages[1].tool_calls[0].arguments", "FIELD_OUT_OF_RANGE")],
        ),
        "bad tools": (
            chat(
                tools=[
                    tool("a b"),
                    tool(""),
                    tool("x" * 65),
                    tool("f", "[]"),
                    tool("g", json.dumps({"x": "y" * 65536})),
                ]
            ),
            [
                ("tools[0].name", "FIELD_INVALID"),
                ("tools[1].name", "FIELD_INVALID"),
                ("tools[2].name", "FIELD_INVALID"),
                ("tools[3].parameters", "FIELD_INVALID"),
                ("tools[4].parameters", "FIELD_OUT_OF_RANGE"),
            ],
        ),
        "the same tool twice": (chat(tools=[tool(), tool()]), [("tools", "FIELD_INVALID")]),
        "too many tools": (chat(tools=[tool(f"f{i}") for i in range(129)]), [("tools", "FIELD_OUT_OF_RANGE")]),
        "an unknown choice": (
            chat(tools=[tool()], tool_choice=pb.ToolChoice(name="other")),
            [("tool_choice.name", "FIELD_INVALID")],
        ),
        "no choice": (chat(tools=[tool()], tool_choice=pb.ToolChoice()), [("tool_choice", "FIELD_REQUIRED")]),
        "nothing to call": (
            chat(tool_choice=pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED)),
            [("tool_choice", "FIELD_CONFLICT")],
        ),
        "the user is continued": (
            chat(USER, continue_last_message=True),
            [("continue_last_message", "FIELD_CONFLICT")],
        ),
        "nothing is continued": (
            chat(USER, message(pb.ROLE_ASSISTANT, ""), continue_last_message=True),
            [("continue_last_message", "FIELD_CONFLICT")],
        ),
        "a call is continued": (
            chat(
                USER,
                message(pb.ROLE_ASSISTANT, "x", tool_calls=[pb.ToolCall(name="f")]),
                continue_last_message=True,
            ),
            [("continue_last_message", "FIELD_CONFLICT")],
        ),
        **{
            f"template argument {name}": (
                chat(template_arguments=arguments(**{name: 1})),
                [("template_arguments", "FIELD_INVALID")],
            )
            for name in ("messages", "tools", "bos_token", "a b")
        },
        "an infinite template argument": (
            chat(template_arguments=arguments(x=float("inf"))),
            [("template_arguments", "FIELD_INVALID")],
        ),
        "many template arguments": (
            chat(template_arguments=arguments(**{f"a{i}": 1 for i in range(65)})),
            [("template_arguments", "FIELD_OUT_OF_RANGE")],
        ),
        "a long template argument": (
            chat(template_arguments=arguments(x="y" * 17000)),
            [("template_arguments", "FIELD_OUT_OF_RANGE")],
        ),
    }.values(),
)
def test_what_cannot_be_rendered_is_refused_by_field(source: pb.ChatInput, expected: list[tuple[str, str]]) -> None:
    assert faults(source) == expected
