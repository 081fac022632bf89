"""The heap of a process in huge pages.

A lone call meets cold caches, and then every page of Python's heap that it touches costs a walk through the page tables
besides: with 4 KiB pages hundreds of walks, each of which waits for memory. In pages of 2 MiB there are a few.
"""

from __future__ import annotations

import ctypes
import errno
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

_HUGE: Final = 2 << 20  # bytes
_MADV_COLLAPSE: Final = 25  # Linux 6.1: at once, and whatever the daemon that does it in the background is set to
_LEAST_PRESENT: Final = 0.75  # of a mapping, since the rest of it comes to take memory too
_MOST_BYTES: Final = 512 << 20  # each 100 MB take about a tenth of a second
_SWITCH: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS: Final = Path("/proc/self/smaps")
_HEAD: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ *(.*)")

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Mapping:
    """A range of addresses, as /proc/self/smaps tells of it. Bytes."""

    start: int
    end: int
    permissions: str
    name: str
    present: int = 0
    is_advised: bool = False  # its owner has asked for huge pages

    @property
    def is_heap(self) -> bool:
        """Whether it is private memory of no file, most of which is in use."""
        is_anonymous = not self.name or self.name == "[heap]" or self.name.startswith("[anon")
        is_full = self.present >= _LEAST_PRESENT * (self.end - self.start)
        return self.permissions == "rw-p" and is_anonymous and is_full and not self.is_advised

    def huge_pages(self) -> range:
        """Addresses of the whole huge pages in it."""
        return range(-(-self.start // _HUGE) * _HUGE, self.end // _HUGE * _HUGE, _HUGE)


def parse_mappings(lines: Iterable[str]) -> Iterator[Mapping]:
    """Read /proc/self/smaps."""
    mapping: Mapping | None = None
    for line in lines:
        head = _HEAD.fullmatch(line.rstrip("\n"))
        if head is not None:
            if mapping is not None:
                yield mapping
            mapping = Mapping(int(head[1], 16), int(head[2], 16), head[3], head[4])
        elif mapping is not None and line.startswith("Rss:"):
            mapping.present = int(line.split()[1]) << 10
        elif mapping is not None and line.startswith("VmFlags:"):
            mapping.is_advised = "hg" in line.split()
    if mapping is not None:
        yield mapping


def use_huge_pages() -> int:
    """Move what this process's heap holds by now into huge pages, as far as that can be had; return how many bytes.

    Does nothing where the system has them switched off, is not Linux, or cannot do it at once. To be called once, when
    what stays for the life of the process has been made.
    """
    if sys.platform != "linux":
        return 0
    try:
        if "[never]" in _SWITCH.read_text():
            return 0
        with _MAPS.open() as lines:
            heap = [mapping for mapping in parse_mappings(lines) if mapping.is_heap]
    except OSError:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    moved = 0
    for address in (address for mapping in heap for address in mapping.huge_pages()):
        if moved >= _MOST_BYTES:
            break
        if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(_HUGE), _MADV_COLLAPSE) == 0:
            moved += _HUGE
        elif ctypes.get_errno() == errno.ENOMEM:  # no huge page is to be had
            break
    log.info("heap.settled", huge_page_bytes=moved)
    return moved
