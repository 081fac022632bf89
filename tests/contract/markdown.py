"""The contract as one page of Markdown. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from google.protobuf import descriptor_pb2 as pb

from common.grants import Scope
from tests.contract.descriptors import Documented, File
from tests.contract.reasons import OF_COMMANDS, Explanation

_FIELD = pb.FieldDescriptorProto
_TYPES: Final = {
    _FIELD.TYPE_DOUBLE: "double",
    _FIELD.TYPE_FLOAT: "float",
    _FIELD.TYPE_INT64: "int64",
    _FIELD.TYPE_UINT64: "uint64",
    _FIELD.TYPE_INT32: "int32",
    _FIELD.TYPE_UINT32: "uint32",
    _FIELD.TYPE_BOOL: "bool",
    _FIELD.TYPE_STRING: "string",
    _FIELD.TYPE_BYTES: "bytes",
}
_INTRODUCTION: Final = """\
# Reference of the contract

Made of the `.proto` files and of the gateway's code by `make reference-page`; do not edit. The contract only grows:
fields, methods and values are added and never change their meaning, and a field that a server does not know is refused,
never ignored.

A field is *optional* where a message tells "unset" from its zero value. Fields that are messages always do. Of fields
with the same *one of*, one can be set.
"""
_ERRORS: Final = """\
## Errors

Each error is a gRPC status with a `google.rpc.ErrorInfo` (domain `torchrelay`) that bears one of these reasons; they
are stable, messages are not. Over HTTP the reason is the error's `code` in lower case, but for those that OpenAI's
clients know by other names. A `BadRequest` names every bad field, a `RetryInfo` says when to come again, a
`QuotaFailure` which quota, a `Usage` what was used all the same. A status without `ErrorInfo` is not a gateway's own:
the connection broke, a proxy answered, or gRPC's library refused, such as a message above its limit.
"""


class Page:
    """Writes the page; knows where each type is written."""

    def __init__(self, files: Sequence[File], scopes: Mapping[str, Scope | None]) -> None:
        self._files = files
        self._scopes = scopes
        self._known = {part.name for file in files for part in (*file.messages(), *file.enums())}

    def write(self, reasons: Mapping[str, Explanation], statuses: Mapping[str, Iterable[str]]) -> str:
        """Return the whole page."""
        files = sorted(self._files, key=lambda file: ("admin" in file.name, file.name))
        parts = [_INTRODUCTION, *self._contents(files), _ERRORS, _reasons_table(reasons, statuses)]
        for file in files:
            parts += [f"## {_title(file)}", *self._services(file), *self._messages(file), *self._enums(file)]
        return "\n\n".join(part.strip("\n") for part in parts) + "\n"

    def _contents(self, files: Sequence[File]) -> Iterator[str]:
        rows = ["- [Errors](#errors)"]
        for file in files:
            services = ", ".join(_link(service.proto.name) for service in file.services())
            rows.append(f"- [{_title(file)}](#{_anchor(_title(file))})" + (f": {services}" if services else ""))
        yield "\n".join(rows)

    def _services(self, file: File) -> Iterator[str]:
        for service in file.services():
            assert isinstance(service.proto, pb.ServiceDescriptorProto)
            scope = self._scopes[service.name]
            yield f"### {service.proto.name}"
            yield _text(file.comment(*service.path))
            yield f"Scope: `{scope.value}`." if scope is not None else "Scope: none, every caller may."
            rows = []
            for index, method in enumerate(service.proto.method):
                answer = ("stream of " if method.server_streaming else "") + self._type(method.output_type)
                asked = ("stream of " if method.client_streaming else "") + self._type(method.input_type)
                rows.append((f"`{method.name}`", asked, answer, file.of_method(service, index)))
            yield _table(("method", "request", "response", ""), rows)

    def _messages(self, file: File) -> Iterator[str]:
        for message in file.messages():
            assert isinstance(message.proto, pb.DescriptorProto)
            yield f"### {message.proto.name}"
            yield _text(file.comment(*message.path))
            rows = [self._field_row(file, message, index) for index in range(len(message.proto.field))]
            if rows:
                yield _table(("field", "type", "no.", ""), rows)

    def _field_row(self, file: File, message: Documented, index: int) -> tuple[str, str, str, str]:
        assert isinstance(message.proto, pb.DescriptorProto)
        field = message.proto.field[index]
        kind = self._field_type(message.proto, field)
        if field.proto3_optional:
            kind = f"optional {kind}"
        elif field.HasField("oneof_index"):
            kind = f"one of *{message.proto.oneof_decl[field.oneof_index].name}*: {kind}"
        return f"`{field.name}`", kind, str(field.number), file.of_field(message, index)

    def _field_type(self, message: pb.DescriptorProto, field: pb.FieldDescriptorProto) -> str:
        for nested in message.nested_type:
            if nested.options.map_entry and field.type_name.endswith(f".{message.name}.{nested.name}"):
                key, value = (self._field_type(nested, each) for each in nested.field)
                return f"map of {key} to {value}"
        kind = _TYPES.get(field.type) or self._type(field.type_name)
        return f"repeated {kind}" if field.label == _FIELD.LABEL_REPEATED else kind

    def _enums(self, file: File) -> Iterator[str]:
        for enum in file.enums():
            assert isinstance(enum.proto, pb.EnumDescriptorProto)
            yield f"### {enum.proto.name}"
            yield _text(file.comment(*enum.path))
            values = enum.proto.value
            yield _table(
                ("value", "no.", ""),
                [(f"`{value.name}`", str(value.number), file.of_value(enum, i)) for i, value in enumerate(values)],
            )

    def _type(self, name: str) -> str:
        name = name.lstrip(".")
        return _link(name.rpartition(".")[2]) if name in self._known else f"`{name}`"


def _reasons_table(reasons: Mapping[str, Explanation], statuses: Mapping[str, Iterable[str]]) -> str:
    rows = [
        (f"`{name}`", ", ".join(sorted(statuses[name])), explained.meaning, explained.to_do)
        for name, explained in reasons.items()
        if name not in OF_COMMANDS
    ]
    return _table(("reason", "status", "meaning", "what to do"), rows)


def _title(file: File) -> str:
    return file.name.removesuffix(".proto")


def _anchor(title: str) -> str:
    """Return the fragment that GitHub makes of a heading."""
    return "".join(letter for letter in title.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")


def _link(name: str) -> str:
    return f"[{name}](#{_anchor(name)})"


def _text(text: str) -> str:
    """Return a comment as Markdown: what could be a tag is none."""
    return text.replace("<", "&lt;")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return _text(text).replace("\n\n", "<br>").replace("|", "\\|")
