"""The search for marks in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def find_first(text: str, marks: Sequence[str]) -> tuple[int, str]:
    """Return where the first of the marks stands and which it is; (-1, "") if there is none."""
    found = [(start, mark) for mark in marks if (start := text.find(mark)) >= 0]
    return min(found, key=lambda match: match[0]) if found else (-1, "")


def num_undecided(text: str, marks: Sequence[str]) -> int:
    """Return the length of the end of the text that may be the beginning of a mark."""
    longest = max(map(len, marks)) - 1
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(mark.startswith(tail) for mark in marks):
            return length
    return 0
