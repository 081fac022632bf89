"""Times parts of a step by wrapping calls, without a change to what is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any


class Stopwatch:
    """Adds up the time of wrapped calls, part by part; a call inside of another counts for itself only."""

    def __init__(self, parts: Sequence[str], synchronize: Callable[[], None] = lambda: None) -> None:
        self._parts = parts
        self.spent_ms = dict.fromkeys(parts, 0.0)
        self._synchronize = synchronize
        self._inner = 0.0

    def wrap(self, owner: Any, name: str, part: str) -> None:
        call = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            outer, self._inner = self._inner, 0.0
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._synchronize()
                elapsed = (time.perf_counter() - started) * 1000
                self.spent_ms[part] += elapsed - self._inner
                self._inner = outer + elapsed

        setattr(owner, name, timed)

    def reset(self) -> dict[str, float]:
        spent, self.spent_ms = self.spent_ms, dict.fromkeys(self._parts, 0.0)
        return spent
