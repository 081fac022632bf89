"""How requests are read: nothing unknown passes, and what is long is not walked."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import struct_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.unknown_fields import UnknownFieldSet

from common import errors
from gateway.interceptors.guard import find_unknown_field, parse
from torchrelay.v1 import generation_pb2 as pb

UNKNOWN = b"\x98\x06\x01"  # field 99, varint 1


def test_maps_are_looked_into_where_they_hold_messages() -> None:
    numbers = pb.GenerationConfig(logit_bias={3: 0.5})
    assert find_unknown_field(numbers) is None
    known = struct_pb2.Struct(fields={"a": struct_pb2.Value(number_value=1)})
    assert find_unknown_field(known) is None
    known.fields["b"].MergeFromString(b"\x98\x06\x01")  # field 99
    assert find_unknown_field(known) == "fields[].99"


def test_a_known_message_has_no_unknown_field() -> None:
    request = pb.StreamGenerateRequest(
        model="tiny",
        input=pb.GenerationInput(chat=pb.ChatInput(messages=[pb.ChatMessage(parts=[pb.ContentPart(text="x")])])),
        config=pb.GenerationConfig(stop=["a"], stop_token_ids=[1]),
        time_limit=Duration(seconds=1),
    )
    assert find_unknown_field(request) is None
    assert len(UnknownFieldSet(request)) == 0


def many_values() -> pb.StreamGenerateRequest:
    request = pb.StreamGenerateRequest()
    items = request.input.chat.template_arguments.fields["a"].list_value.values
    for _ in range(20_000):
        items.add().bool_value = True
    return request


def test_a_message_of_many_others_is_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[Any] = []

    def counting(message: Any) -> UnknownFieldSet:
        looked_at.append(message)
        return UnknownFieldSet(message)

    monkeypatch.setattr("gateway.interceptors.guard.UnknownFieldSet", counting)
    request = many_values()
    assert parse(pb.StreamGenerateRequest.FromString, request.SerializeToString()) == request
    assert looked_at == []
    with pytest.raises(errors.InvalidRequest) as raised:
        parse(pb.StreamGenerateRequest.FromString, request.SerializeToString() + b"\x1a\x03" + UNKNOWN)
    assert raised.value.reason == "UNKNOWN_FIELD"
    assert 0 < len(looked_at) <= 10_000
    assert find_unknown_field(pb.StreamGenerateRequest.FromString(UNKNOWN)) == "99"
