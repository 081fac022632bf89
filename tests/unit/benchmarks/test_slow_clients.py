"""What `make bench-slow-clients` calls a broken law, and that every break is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.benchmarks.slow_clients import growth_mib, verdict
from tests.benchmarks.slow_load import Load

Phases = list[dict[str, Any]]
Samples = list[tuple[float, float]]


def good() -> tuple[Phases, Samples]:
    """Three slow phases between four fast ones, on a machine that gets slower all the time."""
    phases: Phases = [
        {
            "kind": "slow" if number % 2 else "fast",
            "p99_ms": 100.0 + 30 * number,
            "slow_messages": 25 * 32,
            "slow_tokens": 25 * 32 * 20,
            "violations": 0,
            "errors": {},
        }
        for number in range(7)
    ]
    return phases, [(2.0 * n, 80 + 0.01 * n) for n in range(150)]


def test_drift_of_the_machine_is_not_blamed_on_slow_readers() -> None:
    found = verdict(*good())
    assert found["met"]
    assert found["p99_ratio"] == 1.0
    assert found["fast_p99_ms"] == 190.0


def make_all_slow_phases_worse(phases: Phases, samples: Samples) -> None:
    for phase in phases[1::2]:
        phase["p99_ms"] *= 1.2


def let_memory_grow(phases: Phases, samples: Samples) -> None:
    samples[:] = [(at, mib + at / 30) for at, mib in samples]


def repeat_a_token(phases: Phases, samples: Samples) -> None:
    phases[4]["violations"] = 1


def fail_a_call(phases: Phases, samples: Samples) -> None:
    phases[3]["errors"] = {"ABORTED CLIENT_TOO_SLOW": 1}


def never_be_slow(phases: Phases, samples: Samples) -> None:
    phases[1]["slow_tokens"] = phases[1]["slow_messages"]


@pytest.mark.parametrize(
    ("spoil", "law"),
    [
        (make_all_slow_phases_worse, "itl_met"),
        (let_memory_grow, "rss_met"),
        (repeat_a_token, "order_met"),
        (fail_a_call, "order_met"),
        (never_be_slow, "slow_met"),
    ],
)
def test_each_law_can_be_broken(spoil: Callable[[Phases, Samples], None], law: str) -> None:
    phases, samples = good()
    spoil(phases, samples)
    found = verdict(phases, samples)
    assert not found["met"]
    assert [name for name in found if name.endswith("_met") and not found[name]] == [law]


def test_one_bad_phase_of_several_is_the_machine_s() -> None:
    phases, samples = good()
    phases[3]["p99_ms"] *= 5
    assert verdict(phases, samples)["itl_met"]


def test_growth_is_that_of_the_typical_memory_not_of_a_peak() -> None:
    samples = [(float(n), 100.0) for n in range(40)]
    samples[-1] = (39.0, 500.0)
    assert growth_mib(samples) == (100.0, 0.0)


def test_a_missing_or_repeated_token_is_counted() -> None:
    class Delta:
        def __init__(self, first: int, count: int) -> None:
            self.first_token_index, self.token_ids = first, range(count)

    load = Load(8, 8)
    assert load._count([Delta(0, 2), Delta(2, 1)], 0) == 3
    assert load._phase.num_violations == 0
    load._count([Delta(4, 1)], 3)  # a gap
    load._count([Delta(4, 1)], 5)  # a repetition
    assert load._phase.num_violations == 2
