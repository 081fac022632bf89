"""Headers of foreign files: refused with the tensor's name, or the file is exactly what its header says."""

from __future__ import annotations

import json
import math
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from worker.engine import safetensors_header
from worker.engine.safetensors_header import (
    MAX_HEADER_BYTES,
    Header,
    HeaderError,
    TensorEntry,
    parse_header,
    read_header,
)

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header: object, data: bytes, *, length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def with_entry(**changes: Any) -> bytes:
    return file_of({"w": {**F32, **changes}}, bytes(8))


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few"),
    "seven bytes": (bytes(7), "too few"),
    "header beyond the file": (file_of({"w": F32}, b"", length=1000), "it was cut"),
    "header of 2**63 bytes": (file_of({"w": F32}, bytes(8), length=2**63), f"at most {MAX_HEADER_BYTES} are read"),
    "header over the cap": (file_of(b"{}" + b" " * MAX_HEADER_BYTES, b""), f"at most {MAX_HEADER_BYTES} are read"),
    "not JSON": (file_of(b'{"w": ', bytes(8)), "not JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}', bytes(8)), "not JSON"),
    "UTF-16": (file_of(json.dumps({"w": F32}).encode("utf-16"), bytes(8)), "not JSON"),
    "a list": (file_of([1], b""), "not a JSON object"),
    "deep": (file_of(b"[" * 100_000, b""), "nested too deeply"),
    "a name twice": (
        file_of(b'{"w":%s,"w":%s}' % ((json.dumps(F32).encode(),) * 2), bytes(8)),
        "names 'w' twice",
    ),
    "a key of an entry twice": (
        file_of(b'{"w":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "names 'shape' twice",
    ),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}, "w": F32}, bytes(8)), "not a map of texts"),
    "metadata as a list": (file_of({"__metadata__": ["a"], "w": F32}, bytes(8)), "not a map of texts"),
    "an entry that is a list": (file_of({"w": [1]}, bytes(8)), "w: an entry has exactly"),
    "an entry without a shape": (file_of({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "has exactly"),
    "an entry with more": (with_entry(code="x"), "w: an entry has exactly"),
    "an unknown dtype": (with_entry(dtype="F31"), "w: unknown dtype 'F31'"),
    "a dtype that is a list": (with_entry(dtype=[]), "w: unknown dtype"),
    "a negative size": (with_entry(shape=[-2, -1]), "w: the shape is not"),
    "a size that is a fraction": (with_entry(shape=[2.0]), "w: the shape is not"),
    "a size that is true": (with_entry(shape=[True, 2]), "w: the shape is not"),
    "a size that is infinite": (file_of(b'{"w":{"dtype":"F32","shape":[Infinity]}}', bytes(8)), "no number of JSON"),
    "too many dimensions": (with_entry(shape=[2] + [1] * 64), "w: the shape is not"),
    "a huge shape": (with_entry(shape=[2**40, 2**40]), "w: the shape has more elements"),
    "a huge shape of nothing": (with_entry(shape=[0, 2**62, 4], data_offsets=[0, 0]), "w: the shape has more elements"),
    "a shape of more than the bytes": (with_entry(shape=[3]), "w: 3 elements of F32 do not take 8 bytes"),
    "a shape of less than the bytes": (with_entry(shape=[1]), "w: 1 elements of F32 do not take 8 bytes"),
    "half a byte": (file_of({"w": {"dtype": "F4", "shape": [1], "data_offsets": [0, 0]}}, b""), "do not take"),
    "half a byte a row": (
        file_of({"w": {"dtype": "F4", "shape": [4, 1], "data_offsets": [0, 2]}}, bytes(2)),
        "w: its last dimension takes 4 bits of F4",
    ),
    "half a byte a row of none": (
        file_of({"w": {"dtype": "F4", "shape": [0, 3], "data_offsets": [0, 0]}}, b""),
        "w: its last dimension takes 12 bits of F4",
    ),
    "offsets that are negative": (with_entry(data_offsets=[-8, 0]), "w: data_offsets are not"),
    "three offsets": (with_entry(data_offsets=[0, 8, 8]), "w: data_offsets are not"),
    "offsets backwards": (with_entry(data_offsets=[8, 0]), "w: 2 elements of F32 do not take -8 bytes"),
    "offsets beyond the file": (with_entry(shape=[4], data_offsets=[0, 16]), "w: it ends at byte 16 of 8"),
    "an overlap": (
        file_of({"v": F32, "w": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
        "w: it begins at byte 4 and overlaps another tensor",
    ),
    "the same bytes": (file_of({"v": F32, "w": F32}, bytes(8)), "w: it begins at byte 0 and overlaps"),
    "a hole": (file_of({"v": F32, "w": {**F32, "data_offsets": [12, 20]}}, bytes(20)), "leaves a hole"),
    "a hole at the beginning": (with_entry(shape=[1], data_offsets=[4, 8]), "w: it begins at byte 4 and leaves a hole"),
    "bytes behind the last tensor": (file_of({"w": F32}, bytes(9)), "1 bytes behind its last tensor"),
    "no tensor for the bytes": (file_of({}, bytes(9)), "9 bytes behind"),
}


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_a_forged_header_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(HeaderError, match=message.replace("(", r"\(").replace("*", r"\*")):
        read_header(write(tmp_path, content))


# Every guard, taken out: then at least one of the files above passes, or ends in another error.
MUTANTS = {
    "length of the file": ("if length > file_bytes - LENGTH_BYTES:", "if False:"),
    "cap": ("if length > MAX_HEADER_BYTES:", "if False:"),
    "first eight bytes": ("if len(first) < LENGTH_BYTES:", "if False:"),
    "recursion": ("except RecursionError:", "except ZeroDivisionError:"),
    "object": (
        'if not isinstance(value, dict):\n        raise HeaderError("its header is not a',
        'if False:\n        raise HeaderError("',
    ),
    "duplicates": ("if len(value) != len(pairs):", "if False:"),
    "constants": ("parse_constant=_refuse_constant", "parse_constant=None"),
    "metadata": ("    _check_metadata(value.pop(_METADATA, {}))", "    value.pop(_METADATA, {})"),
    "entry": ("if not isinstance(value, dict) or value.keys() !=", "if value.keys() <"),
    "dtype": ("if not isinstance(dtype, str) or dtype not in _BITS:", "if dtype not in _BITS:"),
    "rank": (" or len(shape) > _MAX_RANK", ""),
    "types": ("type(item) is int", "isinstance(item, int)"),
    "negative": (" and item >= 0", ""),
    "two offsets": (" or len(offsets) != 2", ""),
    "elements": ("> _MAX_ELEMENTS", "< 0"),
    "bytes": ("entry.num_elements * _BITS[dtype] != 8", "entry.num_elements * _BITS[dtype] < 8"),
    "rows": ("if entry.row_bits % 8:", "if False:"),
    "end": ("if entry.end > data_bytes:", "if False:"),
    "overlap and hole": ("if entry.begin != reached:", "if entry.begin > reached:"),
    "hole": ("if entry.begin != reached:", "if entry.begin < reached:"),
    "rest": ("if reached != data_bytes:", "if False:"),
}


@pytest.mark.parametrize(("old", "new"), MUTANTS.values(), ids=MUTANTS.keys())
def test_each_guard_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    module = types.ModuleType("worker.engine.mutant")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    source = Path(safetensors_header.__file__).read_text()
    assert source.count(old) == 1, old
    exec(compile(source.replace(old, new), "mutant", "exec"), module.__dict__)

    def is_refused_as_it_should(content: bytes, message: str) -> bool:
        try:
            module.read_header(write(tmp_path, content))
        except module.HeaderError as error:
            return message in str(error)
        except Exception:  # noqa: BLE001 - whatever it is, it is not what an operator should see
            return False
        return False

    assert not all(is_refused_as_it_should(*case) for case in BAD.values())


TENSORS = {
    "embed.weight": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "norm": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "mask": torch.tensor([[True, False, True]]),
    "empty": torch.zeros(0, 3, dtype=torch.int64),
    "scalar": torch.tensor(7, dtype=torch.int16),
    "narrow": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path.read_bytes()


def test_a_file_of_the_library_is_read_as_it_was_written(tmp_path: Path, good: bytes) -> None:
    header = read_header(write(tmp_path, good))
    assert {name: entry.shape for name, entry in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }
    assert header.tensors["narrow"].dtype == "F8_E4M3"
    assert sum(entry.num_elements for entry in header.tensors.values()) == 24 + 2 + 3 + 0 + 1 + 2


def shape_in_torch(entry: TensorEntry) -> tuple[int, ...]:
    """Two of four bits each stand in one element."""
    return (*entry.shape[:-1], entry.shape[-1] // 2) if entry.dtype == "F4" else entry.shape


def check_law(path: Path) -> Header | None:
    """Refused by us, or opened by the library too, with the bytes that our header names for each tensor."""
    content = path.read_bytes()
    try:
        header = read_header(path)
    except HeaderError:
        return None
    with safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == header.tensors.keys()
        for name, entry in header.tensors.items():
            tensor = opened.get_tensor(name)
            assert tuple(tensor.shape) == shape_in_torch(entry)
            data = content[header.num_bytes + entry.begin : header.num_bytes + entry.end]
            assert tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == data
    return header


def overwritten(content: bytes, position: int, new: bytes) -> bytes:
    return content[:position] + new + content[position + len(new) :]


def replaced(content: bytes, header: Callable[[dict[str, Any]], None]) -> bytes:
    length = int.from_bytes(content[:8], "little")
    value = json.loads(content[8 : 8 + length])
    header(value)
    return file_of(value, content[8 + length :])


numbers = st.sampled_from(
    [-1, 0, 1, 2, 3, 4, 8, 48, 96, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 1.5, True, None, "4"]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_corrupted_file_is_refused_or_is_what_its_header_says(
    tmp_path: Path, good: bytes, data: st.DataObject
) -> None:
    length = int.from_bytes(good[:8], "little")
    how = data.draw(st.sampled_from(["bytes", "cut", "longer", "length", "number", "dtype", "rename", "drop"]))
    name = data.draw(st.sampled_from(sorted(TENSORS)))
    other = data.draw(st.sampled_from(sorted(TENSORS)))

    def change(header: dict[str, Any]) -> None:
        match how:
            case "number":
                key = data.draw(st.sampled_from(["shape", "data_offsets"]))
                values = header[name][key]
                if values:
                    values[data.draw(st.integers(0, len(values) - 1))] = data.draw(numbers)
            case "dtype":
                header[name]["dtype"] = data.draw(
                    st.sampled_from(["F32", "I32", "U8", "I8", "F16", "I64", "F4", "X", 1])
                )
            case "rename":
                header[data.draw(st.text(max_size=5))] = header.pop(name)
            case "drop":
                header[other] = header.pop(name)

    match how:
        case "bytes":
            new = data.draw(st.binary(min_size=1, max_size=4))
            content = overwritten(good, data.draw(st.integers(0, 8 + length - 1)), new)
        case "cut":
            content = good[: data.draw(st.integers(0, len(good) - 1))]
        case "longer":
            content = good + data.draw(st.binary(min_size=1, max_size=9))
        case "length":
            content = overwritten(good, 0, data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little"))
        case _:
            content = replaced(good, change)
    check_law(write(tmp_path, content))


@pytest.mark.parametrize("shape", [[], [0], [0, 3], [3, 0], [0, 4], [4, 1], [1, 4], [2, 3], [3, 2], [2, 2, 6]])
def test_four_bits_are_what_the_library_makes_of_them(tmp_path: Path, shape: list[int]) -> None:
    num_bytes = math.prod(shape) // 2
    content = file_of({"w": {"dtype": "F4", "shape": shape, "data_offsets": [0, num_bytes]}}, bytes(range(num_bytes)))
    header = check_law(write(tmp_path, content))
    assert (header is not None) == (shape != [] and shape[-1] % 2 == 0)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
@example(b"{}", 10)
def test_any_bytes_are_a_header_or_an_error(content: bytes, file_bytes: int) -> None:
    try:
        header = parse_header(content, file_bytes)
    except HeaderError:
        return
    assert sum(entry.end - entry.begin for entry in header.tensors.values()) == file_bytes - 8 - len(content)


def test_the_law_sees_a_reader_that_takes_other_bytes(
    tmp_path: Path, good: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, good)
    assert check_law(path) is not None
    header = read_header(path)
    shifted = Header(header.tensors, header.num_bytes + 1)
    monkeypatch.setitem(check_law.__globals__, "read_header", lambda path: shifted)
    with pytest.raises(AssertionError):
        check_law(path)


def test_a_name_that_stands_twice_is_found_in_one_pass() -> None:
    """Comparing each of these names with each other would take a minute."""
    names = [f"t{index}" for index in range(40_000)]
    content = "{" + ",".join(f'"{name}":0' for name in [*names, names[-1]]) + "}"
    compared = 0

    class Counted(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    with pytest.raises(HeaderError, match="names 't39999' twice"):
        parse_header(content.encode(), 1 << 30)
    with pytest.raises(HeaderError, match="names 't39999' twice"):
        safetensors_header._unique([(Counted(name), 0) for name in [*names[-2000:], names[-1]]])
    assert compared < 10 * 2000
