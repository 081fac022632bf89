"""What a test changes in a gateway or worker from inside, before it runs: slower steps, crashes, and missing guards.

The programs themselves have no hooks. A patch is named and may have an argument: `pace:0.03`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

_PATCHES: Final[dict[str, Callable[[str], None]]] = {}


def patch(function: Callable[[str], None]) -> Callable[[str], None]:
    """Register a patch under its function's name."""
    _PATCHES[function.__name__] = function
    return function


def apply(names: Iterable[str]) -> None:
    """Apply patches to this process. Raises KeyError for one that does not exist."""
    from tests.chaos import batch_mutants, mutants  # noqa: F401 - register their patches

    for name in names:
        kind, _, argument = name.partition(":")
        _PATCHES[kind](argument)


def _wrap_execute(around: Callable[[Any, Any, Callable[[Any, Any], Any]], Any]) -> None:
    """Have each step of the model go through `around(runner, plan, real)`."""
    from worker.engine.runner import ModelRunner

    real = ModelRunner.execute

    def execute(self: Any, plan: Any, in_flight: Any = None) -> Any:
        return around(self, plan, lambda runner, plan: real(runner, plan, in_flight))

    ModelRunner.execute = execute  # type: ignore[method-assign]


@patch
def pace(argument: str) -> None:
    """Let each step take so many seconds longer, asleep: a tiny model then streams as slowly as a real one."""
    seconds = float(argument)

    def around(runner: Any, plan: Any, real: Callable[[Any, Any], Any]) -> Any:
        time.sleep(seconds)
        return real(runner, plan)

    _wrap_execute(around)


@patch
def die_at(argument: str) -> None:
    """End the worker as kill -9 does, right behind the commit of a generation's n-th token, in its first epoch.

    The number stands in a file and may change while the worker runs; 0 is never.
    """
    fuse = Path(argument)
    from common.job_claims import JobClaims

    real = JobClaims.commit

    def read_limit() -> int:
        return int(fuse.read_text() or 0)

    async def commit(self: JobClaims, events: Any = ()) -> Any:
        limit = read_limit()
        held = self._held
        is_time = limit and any(
            event.completion_tokens >= limit and held[event.generation_id].epoch == 1
            for event in events
            if event.generation_id in held
        )
        result = await real(self, events)
        if is_time:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    JobClaims.commit = commit  # type: ignore[method-assign]


def _is_armed(fuse: Path) -> bool:
    """Take a fuse that a test has laid: it burns once, in one process."""
    try:
        fuse.unlink()
    except FileNotFoundError:
        return False
    return True


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@patch
def die_on_claim(argument: str) -> None:
    """End the worker between the claim of a job and its first token, once the file exists."""
    from worker.engine.thread import EngineThread

    real = EngineThread.submit

    def submit(self: EngineThread, *requests: Any) -> None:
        if _is_armed(Path(argument)):
            _die()
        real(self, *requests)

    EngineThread.submit = submit  # type: ignore[method-assign]


def _die_behind(script: str, fuse: Path) -> None:
    """End the process when a script has run, and its reply has not been read by anybody, once the file exists."""
    from common.scripts import ScriptRunner

    real = ScriptRunner.run

    async def run(self: ScriptRunner, name: str, key: str, *args: Any) -> Any:
        reply = await real(self, name, key, *args)
        if name == script and _is_armed(fuse):
            _die()
        return reply

    ScriptRunner.run = run  # type: ignore[method-assign]


@patch
def die_behind_commit(argument: str) -> None:
    """End the worker when a commit has taken effect, before it hears of it."""
    _die_behind("commit", Path(argument))


@patch
def die_behind_enqueue(argument: str) -> None:
    """End the gateway when a job is queued, before anybody is told that it is accepted."""
    _die_behind("enqueue", Path(argument))


@patch
def slow_commit(argument: str) -> None:
    """Stop the whole worker for so many seconds before it sends the next end of a job, once the file exists.

    The argument is `path=seconds`. Its heartbeat stands still with it.
    """
    from common.job_claims import JobClaims

    name, _, seconds = argument.partition("=")
    real = JobClaims._send

    async def send(self: JobClaims, pending: Any) -> Any:
        num_ends = pending.args[2]
        if num_ends and _is_armed(Path(name)):
            time.sleep(float(seconds))  # noqa: ASYNC251 - the loop is meant to stand still
        return await real(self, pending)

    JobClaims._send = send  # type: ignore[method-assign]


@patch
def on_prompt(argument: str) -> None:
    """Do something to each step with a prompt that begins with an id twice: `id=abort`, `id=no-memory` or `id=nan`."""
    token, _, what = argument.partition("=")
    marker = int(token)

    def is_meant(chunk: Any) -> bool:
        return list(chunk.sequence.token_ids[:2]) == [marker, marker]

    def around(runner: Any, plan: Any, real: Callable[[Any, Any], Any]) -> Any:
        meant = [chunk for chunk in plan.chunks if is_meant(chunk)]
        if meant and what == "abort":
            os.abort()
        if what == "no-memory" and any(chunk.num_tokens > 1 for chunk in meant):
            from worker.engine.runner import StepOutOfMemory

            raise StepOutOfMemory("as a test wants it")
        logits = real(runner, plan)
        if meant and what == "nan":
            row, logits = 0, logits.clone()
            for chunk in plan.chunks:
                if is_meant(chunk):
                    logits[row : row + chunk.num_logit_rows] = float("nan")
                row += chunk.num_logit_rows
        return logits

    _wrap_execute(around)
