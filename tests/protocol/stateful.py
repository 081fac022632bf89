"""Random histories of the real scripts on a real server, as many as it takes for a number of operations.

With jobs that end their workers and are isolated, and dead letters that are sent again.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import redis as redis_sync
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from common.embedded import EmbeddedServer
from tests.builders_common import create_users, server_under_test
from tests.integration.common.machine_failures import FailuresMachine
from tests.integration.common.parties import Parts

STEPS = 40
_HISTORIES_AT_ONCE = 50


@dataclass
class Tally:
    """What was really done."""

    histories: int = 0
    operations: int = 0  # rules of the state machine that were executed
    violation: str | None = None


def run_operations(number: int, seed: int) -> Tally:
    """Run histories until `number` operations were executed, or one breaks an invariant; `seed` decides all."""
    tally = Tally()

    class CountedMachine(FailuresMachine):
        def __init__(self) -> None:
            super().__init__()
            tally.histories += 1
            self._is_new = True

        @invariant()
        def counts(self) -> None:
            """Checked in the beginning, and after every operation."""
            tally.operations += not self._is_new
            self._is_new = False

    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder), program=server_under_test()) as server:
        superuser = redis_sync.Redis(unix_socket_path=str(server.socket_path))
        superuser.config_set("appendfsync", "no")  # durability has its own tests
        create_users(superuser)
        parts = Parts(server, superuser)
        try:
            CountedMachine.parts, CountedMachine.overrides = parts, {}
            while tally.operations < number and tally.violation is None:
                CountedMachine._hypothesis_internal_use_seed = seed + tally.histories
                _run(CountedMachine, tally)
        finally:
            parts.close()
            superuser.close()
    return tally


def _run(machine: type[FailuresMachine], tally: Tally) -> None:
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=_HISTORIES_AT_ONCE,
                stateful_step_count=STEPS,
                phases=[Phase.generate, Phase.shrink],
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                print_blob=False,
            ),
        )
    except Exception as error:  # noqa: BLE001 - a broken invariant may show itself as any error
        notes = "\n".join(getattr(error, "__notes__", ()))
        tally.violation = f"{type(error).__name__}: {error}\n{notes}"
