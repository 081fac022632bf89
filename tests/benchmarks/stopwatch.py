"""Times parts of a step by wrapping calls, without a change to what is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # torch is not imported before the engine's own settings
    from worker.engine.loop import Engine

_CALLS: Final = {  # of an engine, by the part that their time counts for
    "plan": "_scheduler.plan",
    "batch": "_runner._buffers.fill",
    "forward": "_runner.execute",
    "attention": "_runner._attention._backend.attend",
    "sample": "_sampler.begin",
    "update": "_land",
}
ENGINE_PARTS: Final = tuple(_CALLS)


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


def watch_engine(engine: Engine, parts: Sequence[str], synchronize: Callable[[], None] = lambda: None) -> Stopwatch:
    """Time these parts of every step from now on; others, of the caller's own, stay at zero.

    So does attention of a compiled decoder, which is told apart inside of it.
    """
    watch = Stopwatch(parts, synchronize)
    for part in parts:
        if part not in _CALLS or (part == "attention" and engine._runner._decoder is not None):
            continue
        owner, _, name = _CALLS[part].rpartition(".")
        watch.wrap(attrgetter(owner)(engine) if owner else engine, name, part)
    return watch
