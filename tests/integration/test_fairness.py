"""The laws of `make fairness` in small: shares of a real worker, with wide bounds; and the programs without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import arrival_order, fairness
from tests.builders_calls import Outcome
from tests.builders_system import until


@pytest.mark.parametrize("is_mutant", [False, True], ids=["fair", "arrival order"])
async def test_three_tenants_get_shares_by_their_weights(
    tmp_path: Path, is_mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_mutant:
        for name in ("sources", "load"):
            monkeypatch.setattr(arrival_order.scripts, name, getattr(arrival_order.scripts, name))  # put back later
        arrival_order.patch()
    try:
        with fairness.running(tmp_path, is_mutant=is_mutant) as system:
            async with fairness.deployed(system) as at:
                found = await fairness.measure_shares(at, 1000)
    finally:
        arrival_order.scripts.load.cache_clear()
    wish = {"a": 0.2, "b": 0.2, "c": 0.6}
    assert sum(found["completion_tokens"].values()) > 500
    assert is_mutant or found["all_had_requests_waiting"], "the queue ran dry: shares would say nothing"
    is_met = all(abs(found["shares"][name] - share) < 0.12 for name, share in wish.items())
    assert is_met != is_mutant, found


async def test_a_caller_is_told_how_long_it_will_wait(tmp_path: Path) -> None:
    with fairness.running(tmp_path) as system:
        async with fairness.deployed(system) as at, system.client() as client:
            first = (await Outcome(client.stream((5, 6), model=fairness.MODEL, max_tokens=1)).read()).accepted
            assert first is not None
            assert not first.HasField("expected_wait"), "nothing has been measured yet"
            waiting = [await at.submit(fairness.TENANTS[0], 40) for _ in range(12)]

            async def has_begun() -> bool:
                return (await at.queue.get(waiting[2 * fairness.NUM_PLACES], None)).started

            await until(has_begun, what="two claims, each maybe for all places, while others wait")
            accepted = (await Outcome(client.stream((5, 6), model=fairness.MODEL, max_tokens=1)).read()).accepted
            assert accepted is not None
            assert accepted.expected_wait.ToMilliseconds() > 0
