"""The Go example names what the contract has: every type, field, getter and method as protoc-gen-go would call it.

No Go is needed for that. It does not replace a compiler; it keeps the example from rotting when the contract moves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, OneofDescriptor

from tests.builders_compat import COMPAT, readme_examples
from torchrelay.v1 import generation_pb2 as pb

SOURCE = (COMPAT / "example.go").read_text()
MESSAGES = pb.DESCRIPTOR.message_types_by_name
METHODS = pb.DESCRIPTOR.services_by_name["GenerationService"].methods_by_name
# What the example's variables hold.
VARIABLES = {
    "event": ["GenerationEvent"],
    "accepted": ["Accepted"],
    "delta": ["Delta"],
    "last": ["ResumeGenerationRequest"],
    "response": ["StreamGenerateResponse", "ResumeGenerationResponse"],
}
_POINTER_MAKERS = {FieldDescriptor.TYPE_UINT32: "proto.Uint32(", FieldDescriptor.TYPE_FLOAT: "proto.Float32("}


def go_name(name: str) -> str:
    """The name that protoc-gen-go makes: an underscore and the letter behind it become that letter, in upper case."""
    return re.sub(r"(?:^|_)([a-z])", lambda match: match[1].upper(), name)


def is_choice(oneof: OneofDescriptor | None) -> bool:
    """Whether this is a oneof of the contract, not the one that stands for the word `optional`."""
    return oneof is not None and not oneof.name.startswith("_")


def fields_of(message: Descriptor) -> dict[str, FieldDescriptor | None]:
    """Fields of the Go struct, and the wrapper's of each oneof, which has no field of its own."""
    found: dict[str, FieldDescriptor | None] = {
        go_name(field.name): field for field in message.fields if not is_choice(field.containing_oneof)
    }
    return found | {go_name(oneof.name): None for oneof in message.oneofs if is_choice(oneof)}


def getters_of(message: Descriptor) -> set[str]:
    return {f"Get{go_name(field.name)}" for field in message.fields}


def literals(source: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each `pb.Type{Key: value, ...}` with its own keys and the beginnings of their values."""
    for match in re.finditer(r"\bpb\.(\w+)\{", source):
        depth, keys, at = 1, [], match.end()
        while depth:
            if depth == 1 and (key := re.compile(r"\s*(\w+):\s*(.{0,20})").match(source, at)):
                keys.append((key[1], key[2]))
                at = key.start(2)
            depth += {"{": 1, "}": -1}.get(source[at], 0)
            at += 1
        yield match[1], keys


def problems(source: str) -> list[str]:
    """What the source names and the contract does not have."""
    found = []
    wrappers = {
        f"{message.name}_{go_name(field.name)}": field
        for message in MESSAGES.values()
        for field in message.fields
        if is_choice(field.containing_oneof)
    }
    for name in set(re.findall(r"\bpb\.(\w+)", source)):
        if name not in MESSAGES and name not in wrappers and name != "NewGenerationServiceClient":
            found.append(f"pb.{name}")
    for name, keys in literals(source):
        fields: dict[str, FieldDescriptor | None] = {}
        if name in MESSAGES:
            fields = fields_of(MESSAGES[name])
        elif name in wrappers:
            fields = {go_name(wrappers[name].name): None}
        for key, value in keys:
            if key not in fields:
                found.append(f"{name}.{key}")
                continue
            field = fields[key]
            if field is not None and field.has_presence and field.type in _POINTER_MAKERS:
                found += [] if value.startswith(_POINTER_MAKERS[field.type]) else [f"{name}.{key} is a pointer"]
    for variable, name in re.findall(rf"\b({'|'.join(VARIABLES)})\.(\w+)", source):
        for message in (MESSAGES[kind] for kind in VARIABLES[variable]):
            if name not in fields_of(message) | dict.fromkeys(getters_of(message)):
                found.append(f"{message.name}.{name}")
    for getter in re.findall(r"\)\.(Get\w+)\(", source):  # of what a getter returned
        if not any(getter in getters_of(message) for message in MESSAGES.values()):
            found.append(getter)
    for call in re.findall(r"\bclient\.(\w+)\(", source):
        if call not in METHODS or not METHODS[call].server_streaming:
            found.append(f"client.{call}")
    return found


def test_the_contract_has_all_that_the_example_names() -> None:
    assert problems(SOURCE) == []
    kinds = {name for name, _ in literals(SOURCE)}
    assert {"StreamGenerateRequest", "ResumeGenerationRequest", "GenerationInput_Text"} <= kinds


def test_the_readme_shows_this_example() -> None:
    assert readme_examples().get("go", SOURCE) == SOURCE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pb.GenerationConfig{", "pb.GenerationSettings{"),
        ("GenerationInput_Text{", "GenerationInput_Prompt{"),
        ("MaxTokens:", "MaxNewTokens:"),
        ("proto.Uint32(16)", "16"),
        ("Model: ", "ModelName: "),
        ("last.AfterSequence", "last.AfterEvent"),
        ("event.ChainHash", "event.Chain"),
        ("event.GetFinished()", "event.GetDone()"),
        (".GetDeltas().GetDeltas()", ".GetDeltas().GetPieces()"),
        ("client.StreamGenerate(", "client.Generate("),
        ("client.ResumeGeneration(", "client.Resume("),
        ("delta.Text", "delta.Piece"),
    ],
)
def test_a_name_that_the_contract_lacks_is_noticed(old: str, new: str) -> None:
    assert old in SOURCE
    assert problems(SOURCE.replace(old, new)) != []
