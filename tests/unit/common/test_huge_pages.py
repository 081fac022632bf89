"""The heap moves into huge pages, and nothing else does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common import huge_pages
from common.huge_pages import Mapping, parse_mappings, use_huge_pages

MB = 1 << 20

SMAPS = """\
55d0c0000000-55d0c0a00000 rw-p 00000000 00:00 0                          [heap]
Size:              10240 kB
Rss:               10000 kB
VmFlags: rd wr mr mw me ac sd
7f0000100000-7f0000900000 rw-p 00000000 00:00 0
Rss:                 100 kB
VmFlags: rd wr mr mw me ac sd
7f0001000000-7f0001800000 rw-p 00000000 00:00 0
Rss:                8192 kB
VmFlags: rd wr mr mw me ac sd hg
7f0002000000-7f0002800000 r-xp 00001000 fd:00 1234                       /usr/lib/with a space.so
Rss:                8192 kB
VmFlags: rd ex mr mw me
"""


def test_mappings_are_read_with_what_is_present_and_asked_for() -> None:
    heap, thin, advised, library = parse_mappings(SMAPS.splitlines(keepends=True))
    assert heap == Mapping(0x55D0C0000000, 0x55D0C0A00000, "rw-p", "[heap]", 10_000 << 10)
    assert (library.name, library.permissions) == ("/usr/lib/with a space.so", "r-xp")
    assert advised.is_advised
    # What is hardly used would come to take memory, what was asked for is on its way, and files are no heap.
    assert [one.is_heap for one in (heap, thin, advised, library)] == [True, False, False, False]


def test_only_whole_huge_pages_are_moved() -> None:
    assert list(Mapping(3 * MB, 9 * MB, "rw-p", "").huge_pages()) == [4 * MB, 6 * MB]
    assert not Mapping(3 * MB, 5 * MB, "rw-p", "").huge_pages()


def test_a_heap_is_in_huge_pages_afterwards_and_holds_what_it_held() -> None:
    """In a process of its own, whose heap is known."""
    program = """
from pathlib import Path
from common.huge_pages import use_huge_pages
made = [[number] for number in range(400_000)]
def huge():
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages:"))
before = huge()
moved = use_huge_pages()
assert made == [[number] for number in range(400_000)]
print(moved, huge() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    moved, grown = map(int, done.stdout.split()[-2:])
    if not moved:
        pytest.skip("this kernel does not move a heap into huge pages")
    assert moved >= 10 * MB
    assert grown >= moved * 0.9


def test_who_has_switched_huge_pages_off_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = tmp_path / "enabled"
    switch.write_text("always madvise [never]\n")
    monkeypatch.setattr(huge_pages, "_SWITCH", switch)
    monkeypatch.setattr(huge_pages, "parse_mappings", lambda lines: pytest.fail("looks at the heap"))
    assert use_huge_pages() == 0


def test_a_system_without_them_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_SWITCH", tmp_path / "missing")
    assert use_huge_pages() == 0
