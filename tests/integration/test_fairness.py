"""The laws of `make fairness` in small: shares of a real worker, with wide bounds; and the programs without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import arrival_order, fairness


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
                found = await fairness.measure_shares(at, 1500)
    finally:
        arrival_order.scripts.load.cache_clear()
    wish = {"a": 0.2, "b": 0.2, "c": 0.6}
    assert sum(found["completion_tokens"].values()) > 500
    is_met = all(abs(found["shares"][name] - share) < 0.12 for name, share in wish.items())
    assert is_met != is_mutant, found
