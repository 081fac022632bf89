"""Good inputs of each target: what a fuzzer starts from, since it finds no valid message by itself in minutes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from common import records
from common.api_keys import generate_key
from common.generation import EventBody, FinishReason, JobBody, OutputDelta, SamplingParams, Usage
from tests.security.fuzz.targets import REQUEST_TYPES
from torchrelay.v1 import generation_pb2 as pb

_MARK: Final = "ключ\u0000"


def of(target: str) -> list[bytes]:
    """Return the good inputs of a target."""
    return list({"parser": _requests, "codec": _records, "credentials": _metadata}[target]())


def _requests() -> Iterator[bytes]:
    for index, kind in enumerate(REQUEST_TYPES):
        yield bytes([index]) + _filled(kind).SerializeToString(deterministic=True)
    chat = pb.ChatInput(
        messages=[
            pb.ChatMessage(role=role, parts=[pb.ContentPart(text="hello"), pb.ContentPart(text=_MARK)])
            for role in (pb.ROLE_SYSTEM, pb.ROLE_USER, pb.ROLE_ASSISTANT)
        ],
        tools=[pb.Tool(name="f", description="does", parameters='{"type": "object", "properties": {"a": {}}}')],
        tool_choice=pb.ToolChoice(name="f"),
    )
    chat.messages[2].tool_calls.add(id="abcdefghi", name="f", arguments='{"a": [1, "x"]}')
    chat.messages.add(role=pb.ROLE_TOOL, tool_call_id="abcdefghi", parts=[pb.ContentPart(text="1")])
    chat.template_arguments.update({"enable_thinking": False, "depth": 3})
    config = pb.GenerationConfig(
        max_tokens=7, temperature=0.5, top_k=4, top_p=0.5, min_p=0.1, stop=["a", "b"], stop_token_ids=[1, 2], seed=3
    )
    index = next(i for i, kind in enumerate(REQUEST_TYPES) if kind is pb.StreamGenerateRequest)
    for source in (
        pb.GenerationInput(chat=chat),
        pb.GenerationInput(text="once"),
        pb.GenerationInput(token_ids=pb.TokenIds(ids=[1, 2, 999])),
    ):
        request = pb.StreamGenerateRequest(
            model="m", input=source, config=config, time_limit=Duration(seconds=5), idempotency_key="k"
        )
        yield bytes([index]) + request.SerializeToString(deterministic=True)


def _filled(kind: type[Message]) -> Message:
    """A message whose texts and numbers are all set."""
    message = kind()
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None or field.is_repeated:
            continue
        value: Mapping[int, object] = {
            field.CPPTYPE_STRING: b"text" if field.type == field.TYPE_BYTES else "text",
            field.CPPTYPE_BOOL: True,
            field.CPPTYPE_ENUM: 1,
            field.CPPTYPE_FLOAT: 0.5,
            field.CPPTYPE_DOUBLE: 0.5,
        }
        setattr(message, field.name, value.get(field.cpp_type, 3))
    return message


def _records() -> Iterator[bytes]:
    deltas = (
        OutputDelta(0, 0, (1, 2), "a", (-0.5, -0.25)),
        OutputDelta(1, 3, (2**31,), _MARK, (), FinishReason.STOP, "stop"),
        OutputDelta(2, 3, (), "", (), FinishReason.LENGTH, 7),
    )
    body = EventBody(deltas, Usage(1, 2, 3))
    entry = records.encode_entry(bytes(range(8)), 1, 2, body)
    job = records.encode_body(
        JobBody(
            prompt_token_ids=(1, 2, 3),
            sampling=SamplingParams(
                max_tokens=4, temperature=0.5, stop_strings=("x",), stop_token_ids=(2,), logprobs=True
            ),
            cache_salt=b"salt",
        )
    )
    name = b"m.aaaaaaaaaaaaaaaaaaaaaaaaaa"
    yield b"\x00" + job
    yield b"\x01" + entry
    yield b"\x02\xdc\x00\x01\x95\xd9" + bytes([len(name)]) + name + entry
    yield b"\x02\xdc\x00\x00"
    yield b"\x03" + bytes([len(job)]) + job + entry
    yield b"\x04" + entry[11:]  # behind hash, epoch and number


def _metadata() -> Iterator[bytes]:
    key = generate_key()[0].encode()
    yield b"authorization:Bearer " + key
    yield b"x-api-key:" + key
    yield b"authorization:bearer " + key + b"\nx-api-key: " + key + b"\nother-bin:\xff"
    yield b"authorization:Basic eDp5"
    yield b"x-api-key:tr_000000000000_" + b"0" * 43 + b"_000000"
    yield "x-api-key:ключ".encode()
