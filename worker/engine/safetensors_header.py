"""Checks the header of a safetensors file before anything of the file is mapped, allocated or handed to a library.

    8 bytes   length of the header, little-endian
    header    JSON: {"__metadata__": {text: text}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    the rest  the tensors' bytes, from offset 0 on, without overlaps and without holes

Whoever writes a file decides what its header says, so each number is held against the file's real size. Pure, but for
`read_header`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

LENGTH_BYTES: Final = 8
# A header takes some 100 bytes per tensor and the largest public files hold some ten thousand. The format itself allows
# 100 MB, of which Python's objects would make a gigabyte.
MAX_HEADER_BYTES: Final = 32 << 20
_MAX_RANK: Final = 64  # of torch
_MAX_ELEMENTS: Final = 2**63 - 1
_METADATA: Final = "__metadata__"

_BITS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


class HeaderError(ValueError):
    """The file is not what its header says, or there is no header; the message names the tensor, not the file."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor's bytes stand: [begin, end) of what follows the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_elements(self) -> int:
        return _product(self.shape)

    @property
    def row_bits(self) -> int:
        """What the last dimension takes."""
        return _BITS[self.dtype] * (self.shape[-1] if self.shape else 1)


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header."""

    tensors: Mapping[str, TensorEntry]
    num_bytes: int  # of the header, its length included: there the first tensor begins


def read_header(path: Path) -> Header:
    """Return the checked header of a file. Raises HeaderError, OSError."""
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        length = header_length(file.read(LENGTH_BYTES), file_bytes)
        return parse_header(file.read(length), file_bytes)


def header_length(first: bytes, file_bytes: int) -> int:
    """Return how many bytes of JSON follow the first eight of a file. Raises HeaderError."""
    if len(first) < LENGTH_BYTES:
        raise HeaderError(f"it has {len(first)} bytes, too few for a header")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"its header has {length} bytes; at most {MAX_HEADER_BYTES} are read")
    if length > file_bytes - LENGTH_BYTES:
        raise HeaderError(f"its header has {length} bytes, and only {file_bytes - LENGTH_BYTES} follow: it was cut")
    return length


def parse_header(content: bytes, file_bytes: int) -> Header:
    """Return the checked header of a file of so many bytes. Raises HeaderError."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise HeaderError("its header is nested too deeply") from None
    except HeaderError:
        raise
    except ValueError as error:
        raise HeaderError(f"its header is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise HeaderError("its header is not a JSON object")
    _check_metadata(value.pop(_METADATA, {}))
    tensors = {name: _entry(name, entry) for name, entry in value.items()}
    num_bytes = LENGTH_BYTES + len(content)
    _check_layout(tensors, file_bytes - num_bytes)
    return Header(tensors, num_bytes)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two entries of a name they take."""
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise HeaderError(f"its header names {name!r:.200} twice")
            seen.add(name)
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise HeaderError(f"its header holds {text}, which is no number of JSON")


def _check_metadata(value: object) -> None:
    if not isinstance(value, dict) or not all(isinstance(entry, str) for entry in value.values()):
        raise HeaderError(f"{_METADATA} of its header is not a map of texts")


def _entry(name: str, value: object) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{name}: an entry has exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise HeaderError(f"{name}: unknown dtype {dtype!r:.40}")
    if not _are_counts(shape) or len(shape) > _MAX_RANK:
        raise HeaderError(f"{name}: the shape is not a list of up to {_MAX_RANK} whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise HeaderError(f"{name}: data_offsets are not two whole numbers")
    entry = TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])
    # Zeros apart, or a shape such as [0, 2**62, 2**62] would look small.
    if _product(tuple(size for size in shape if size)) > _MAX_ELEMENTS:
        raise HeaderError(f"{name}: the shape has more elements than can be addressed")
    if entry.num_elements * _BITS[dtype] != 8 * (entry.end - entry.begin):
        raise HeaderError(
            f"{name}: {entry.num_elements} elements of {dtype} do not take {entry.end - entry.begin} bytes"
        )
    # torch packs what is narrower than a byte along the last dimension, also where there is nothing to pack.
    if entry.row_bits % 8:
        raise HeaderError(
            f"{name}: its last dimension takes {entry.row_bits} bits of {dtype}, which are no whole bytes"
        )
    return entry


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(tensors: Mapping[str, TensorEntry], data_bytes: int) -> None:
    """Hold the tensors' places against what the file has behind its header."""
    reached = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > data_bytes:
            raise HeaderError(f"{name}: it ends at byte {entry.end} of {data_bytes}: the file was cut, or is forged")
        if entry.begin != reached:
            kind = "overlaps another tensor" if entry.begin < reached else "leaves a hole before it"
            raise HeaderError(f"{name}: it begins at byte {entry.begin} and {kind}, which ends at {reached}")
        reached = entry.end
    if reached != data_bytes:
        raise HeaderError(f"{data_bytes - reached} bytes behind its last tensor belong to none")


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
