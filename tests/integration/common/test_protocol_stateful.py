"""Random histories of the real scripts on a real server, every operation as its role's user, against the invariants.

TORCHRELAY_TEST_HISTORIES sets the number of histories (default 50, always the same ones; with it, new ones each time).
A test that cannot fail proves nothing: each mutant takes one guard out of the scripts, and must be found.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import redis as redis_sync
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from common.embedded import EmbeddedServer
from common.scripts import Script
from tests.builders_common import mutate
from tests.integration.common.machine_failures import FailuresMachine
from tests.integration.common.parties import Parts

CHOSEN = os.environ.get("TORCHRELAY_TEST_HISTORIES")
HISTORIES = int(CHOSEN or "50")
STEPS = 40


@pytest.fixture(scope="module")
def parts(server: EmbeddedServer, superuser_for_session: redis_sync.Redis) -> Iterator[Parts]:
    made = Parts(server, superuser_for_session)
    yield made
    made.close()


def run_histories(
    parts: Parts, number: int, overrides: dict[str, Script], *phases: Phase, seed: int | None = None
) -> None:
    fields = {"parts": parts, "overrides": overrides, "_hypothesis_internal_use_seed": seed}
    machine = type("Machine", (FailuresMachine,), fields)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=number,
            stateful_step_count=STEPS,
            phases=phases,
            deadline=None,
            database=None,
            derandomize=not CHOSEN,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )


@pytest.mark.timeout(3600)
def test_random_histories_keep_every_invariant(parts: Parts) -> None:
    run_histories(parts, HISTORIES, {}, Phase.generate, Phase.shrink)


FENCE = "if record and sub(record, 1, 20) == before then -- mutant: fence"
MUTANTS: dict[str, tuple[str, str, str]] = {
    "commit without its fence": (
        "commit",
        FENCE,
        "record = record or (before .. string.rep(' ', 40) .. NO_GATEWAY) if true then",
    ),
    "commit that takes any epoch of the same event number": (
        "commit",
        FENCE,
        "if record and string.match(record, '%-(%d+)') == string.match(before, '%-(%d+)') then",
    ),
    "commit that does not know a repeat": ("commit", "sub(record, 1, 20) == sub(after, 1, 20)", "false"),
    "takeover that leaves the job with its old worker": ("lib_jobs", "call('HDEL', P .. 'w:' .. j.w, j.id)", ""),
    "reap of workers whose lease has not ended": ("reap", "'-inf', int(ended), 'LIMIT'", "'-inf', '+inf', 'LIMIT'"),
    "queueing without the bell": ("lib_jobs", "call('LPUSH', P .. 'bell', '1')", ""),
    "claim that hands out what has expired": ("claim", "j.dl <= now", "false"),
    "attach for any tenant": ("attach", "not is_of(ARGV[1], ARGV[2])", "not load(ARGV[1])"),
    "attach that trusts any past": ("attach", "hash_of(entry_after[2][2]) ~= hash", "false"),
    "detach by a gateway that lost the stream": ("detach", "j.gw == ARGV[2]", "true"),
    "detach by a call that lost the stream": ("detach", "j.ai == ARGV[3]", "true"),
    "cancel that keeps the epoch": ("lib_jobs", "j.ep = j.ep + 1\n  j.n = j.n + 1", "j.n = j.n + 1"),
    "no isolation of what ends its workers": (
        "lib_jobs",
        "MAX_ATTEMPTS_IN_COMPANY = 2",
        "MAX_ATTEMPTS_IN_COMPANY = 1e9",
    ),
    "a claim beside what must run alone": ("claim", "if running then return holder == wid end", ""),
    "a retry of a dead letter that was retried": ("retry", "if made then return { 'OK', made } end", ""),
    "a retry that leaves the letter listed": ("retry", "call('ZREM', P .. 'failed', id)", ""),
    "preemption without a bound": ("preempt", "j.pe < tonumber(ARGV[2])", "true"),
    "settling twice": ("lib_jobs", "'generations' .. owner, 1", "'generations' .. owner, 2"),
}

# Of mutants that the usual histories find late: others find them within a few.
SEEDS = {
    "commit that does not know a repeat": 7,
    "attach that trusts any past": 7,
    "detach by a gateway that lost the stream": 2,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_script_without_its_guard_is_found(parts: Parts, name: str) -> None:
    overrides = mutate(*MUTANTS[name])
    with pytest.raises(BaseException) as found:  # noqa: PT011 - whatever the machine meets first
        run_histories(parts, 200, overrides, Phase.generate, seed=None if CHOSEN else SEEDS.get(name))
    assert not isinstance(found.value, KeyboardInterrupt | SystemExit)
