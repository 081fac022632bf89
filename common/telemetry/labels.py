"""Values of labels that come from outside, such as tenants.

A bounded number of them, so that no caller can make a metric grow without end.
"""

from __future__ import annotations

from typing import Final

OTHER: Final = "other"


class BoundedLabel:
    """Lets the first `most` values through; all later ones are `other`. 0: all are."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._known:
            return value
        if len(self._known) < self._most:
            self._known.add(value)
            return value
        return OTHER
