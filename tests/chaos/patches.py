"""What a test changes in a gateway or worker from inside, before it runs: slower steps, crashes, and missing guards.

The programs themselves have no hooks. A patch is named and may have an argument: `pace:0.03`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

_PATCHES: Final[dict[str, Callable[[str], None]]] = {}


def patch(function: Callable[[str], None]) -> Callable[[str], None]:
    """Register a patch under its function's name."""
    _PATCHES[function.__name__] = function
    return function


def apply(names: Iterable[str]) -> None:
    """Apply patches to this process. Raises KeyError for one that does not exist."""
    for name in names:
        kind, _, argument = name.partition(":")
        _PATCHES[kind](argument)


def _wrap_execute(around: Callable[[Any, Any, Callable[[Any, Any], Any]], Any]) -> None:
    """Have each step of the model go through `around(runner, plan, real)`."""
    from worker.engine.runner import ModelRunner

    real = ModelRunner.execute
    ModelRunner.execute = lambda self, plan: around(self, plan, real)  # type: ignore[method-assign,assignment]


@patch
def pace(argument: str) -> None:
    """Let each step take so many seconds longer, asleep: a tiny model then streams as slowly as a real one."""
    seconds = float(argument)

    def around(runner: Any, plan: Any, real: Callable[[Any, Any], Any]) -> Any:
        time.sleep(seconds)
        return real(runner, plan)

    _wrap_execute(around)


@patch
def die_after_tokens(argument: str) -> None:
    """End the worker as kill -9 does, right behind the commit of a generation's n-th token."""
    limit = int(argument)
    from common.job_claims import JobClaims

    real = JobClaims.commit

    async def commit(self: JobClaims, events: Any = ()) -> Any:
        result = await real(self, events)
        if any(event.completion_tokens >= limit for event in events):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    JobClaims.commit = commit  # type: ignore[method-assign]
