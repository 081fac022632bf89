"""The contract with its comments, as buf reads it. Pure but for running buf."""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import descriptor_pb2 as pb

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
BUF = Path(sysconfig.get_path("scripts")) / "buf"

# Numbers of fields in descriptor.proto, of which the paths of comments are made.
_MESSAGE, _ENUM, _SERVICE = 4, 5, 6  # of a file
_FIELD = 2  # of a message
_VALUE, _METHOD = 2, 2  # of an enum, of a service


@dataclass(frozen=True, slots=True)
class Documented:
    """A part of the contract: its full name, what it is there, and the path of its comment."""

    name: str
    proto: pb.ServiceDescriptorProto | pb.DescriptorProto | pb.EnumDescriptorProto
    path: tuple[int, ...]


class File:
    """One .proto file."""

    def __init__(self, proto: pb.FileDescriptorProto) -> None:
        self.proto = proto
        self._comments = {
            tuple(location.path): (location.leading_comments or location.trailing_comments)
            for location in proto.source_code_info.location
        }

    @property
    def name(self) -> str:
        return self.proto.name

    def comment(self, *path: int) -> str:
        """Return the comment of a part as one line; paragraphs stay apart."""
        lines = self._comments.get(path, "").strip().split("\n")
        paragraphs = "\n".join(line.strip() for line in lines).split("\n\n")
        return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs).strip()

    def services(self) -> Iterator[Documented]:
        for index, service in enumerate(self.proto.service):
            yield Documented(f"{self.proto.package}.{service.name}", service, (_SERVICE, index))

    def messages(self) -> Iterator[Documented]:
        """Yield the messages. Raises ValueError for one inside another, which this contract does not have."""
        for index, message in enumerate(self.proto.message_type):
            if message.enum_type or any(not nested.options.map_entry for nested in message.nested_type):
                raise ValueError(f"{message.name} holds a type of its own: write it beside")
            yield Documented(f"{self.proto.package}.{message.name}", message, (_MESSAGE, index))

    def enums(self) -> Iterator[Documented]:
        for index, enum in enumerate(self.proto.enum_type):
            yield Documented(f"{self.proto.package}.{enum.name}", enum, (_ENUM, index))

    def of_method(self, service: Documented, index: int) -> str:
        return self.comment(*service.path, _METHOD, index)

    def of_field(self, message: Documented, index: int) -> str:
        return self.comment(*message.path, _FIELD, index)

    def of_value(self, enum: Documented, index: int) -> str:
        return self.comment(*enum.path, _VALUE, index)


def read() -> list[File]:
    """Have buf read every file of the contract. Raises CalledProcessError."""
    options = ["--exclude-imports", "--as-file-descriptor-set", "--output", "-#format=binpb"]
    built = subprocess.run([str(BUF), "build", *options], cwd=PROTOS, check=True, stdout=subprocess.PIPE).stdout
    return [File(file) for file in sorted(pb.FileDescriptorSet.FromString(built).file, key=lambda file: file.name)]
