"""Logs never make a process wait, and a reader that comes back finds whole lines and what it has missed."""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.log_sink import LineSink, writer_of


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def within(seconds: float, call: object) -> None:
    """Call in a thread, which must not be stuck."""
    thread = threading.Thread(target=call, daemon=True)  # type: ignore[arg-type]
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "a write waits"


def read_all(descriptor: int) -> list[str]:
    data = b""
    while select.select([descriptor], [], [], 0)[0]:
        data += os.read(descriptor, 65536)
    return data.decode().splitlines()


def write_many(sink: LineSink, count: int, size: int = 200) -> None:
    for number in range(count):
        sink.write_line(json.dumps({"n": number, "pad": "x" * size}))


@pytest.mark.parametrize("size", [10, 200, 9000])
def test_a_full_pipe_loses_lines_and_nothing_waits(pipe: tuple[int, int], size: int) -> None:
    reader, writer = pipe
    sink = LineSink(writer_of(writer))
    within(5, lambda: write_many(sink, 1000, size))
    assert read_all(reader), "what there was room for"


def test_lines_stay_whole_and_in_order(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    sink = LineSink(writer_of(writer))
    data = b""
    for number in range(3000):
        sink.write_line(json.dumps({"n": number, "pad": "x" * (number * 7 % 6000)}))
        if number % 5 == 0 and select.select([reader], [], [], 0)[0]:
            data += os.read(reader, 3000)
    for _ in range(20):
        sink.write_line(json.dumps({"n": 3000}))
        while select.select([reader], [], [], 0)[0]:
            data += os.read(reader, 65536)
    found = [json.loads(line) for line in data.decode().splitlines()]  # each is whole
    numbers = [line["n"] for line in found if "n" in line]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 3000
    num_lost = sum(line["lines"] for line in found if line.get("event") == "log.dropped")
    assert num_lost > 0
    assert len(numbers) + num_lost == 3020, "each line came or was counted"


def test_the_descriptor_is_left_as_it_was(pipe: tuple[int, int]) -> None:
    _, writer = pipe
    before = fcntl.fcntl(writer, fcntl.F_GETFL)
    LineSink(writer_of(writer)).write_line("x")
    assert fcntl.fcntl(writer, fcntl.F_GETFL) == before


def test_a_reader_that_is_gone_is_no_error(pipe: tuple[int, int]) -> None:
    reader, writer = os.pipe()
    sink = LineSink(writer_of(writer))
    os.close(reader)
    sink.write_line("nobody reads this")
    os.close(writer)


def test_a_full_socket_does_not_wait() -> None:
    one, other = socket.socketpair()
    with one, other:
        sink = LineSink(writer_of(one.fileno()))
        within(5, lambda: write_many(sink, 20_000))
        assert other.recv(1 << 16)


def test_a_file_gets_its_lines_behind_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    with path.open("a") as file:
        sink = LineSink(writer_of(file.fileno()))
        sink.write_line("é")
        sink.write_line("\udce9")  # a lone surrogate
    assert path.read_text() == "before\né\n\\udce9\n"
