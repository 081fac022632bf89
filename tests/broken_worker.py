"""A worker whose engine does what the environment says when it computes a marked prompt: it hangs, dies or raises.

Run as `python -m tests.broken_worker`; a prompt is marked by its first token id, BROKEN_WORKER_TOKEN. What is done is
BROKEN_WORKER_ACT, `hang`, `die`, or `raise` with the text BROKEN_WORKER_TEXT. With `slow` it takes its time for every
step, as a large model does: tests that need streams which live, not many tokens, leave the machine to others.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from worker import __main__ as worker_main

SLOW_STEP_S = 0.05


def break_engine(token_id: int, act: str) -> None:
    """From now on a step with a marked prompt does not return."""
    from worker.engine.loop import Engine

    add, step = Engine.add, Engine.step
    marked: set[str] = set()

    def marking_add(self: Engine, request: Any) -> None:
        if request.prompt_token_ids[0] == token_id:
            marked.add(request.request_id)
        add(self, request)

    def breaking_step(self: Engine, now: float) -> Any:
        if act == "slow":
            time.sleep(SLOW_STEP_S)
        elif marked.intersection(self.stats().held_request_ids):
            if act == "die":
                os.abort()
            if act == "raise":
                raise ValueError(os.environ["BROKEN_WORKER_TEXT"])
            while True:
                time.sleep(3600)
        return step(self, now)

    Engine.add, Engine.step = marking_add, breaking_step  # type: ignore[method-assign]


def main() -> int:
    """Run a worker with a broken engine; return the exit status."""
    leave_out_triton = worker_main.leave_out_triton

    def then_break(device: str) -> None:
        leave_out_triton(device)  # the last thing before torch may be imported
        break_engine(int(os.environ["BROKEN_WORKER_TOKEN"]), os.environ["BROKEN_WORKER_ACT"])

    worker_main.leave_out_triton = then_break  # type: ignore[assignment]
    return worker_main.main()


if __name__ == "__main__":
    sys.exit(main())
