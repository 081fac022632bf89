"""Blocking work of one tenant does not hold up another's."""

from __future__ import annotations

import asyncio
import threading

import pytest

from gateway.turns import TenantTurns

_PATIENCE_S = 20


async def test_a_flood_of_one_tenant_holds_up_nobody_else() -> None:
    turns, go_on = TenantTurns(), threading.Event()
    running = 0
    most = 0

    def slow() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        go_on.wait(_PATIENCE_S)
        running -= 1

    flood = [asyncio.create_task(turns.run("a", slow)) for _ in range(100)]  # more than the pool has threads
    try:
        assert await asyncio.wait_for(turns.run("b", lambda: "done"), _PATIENCE_S / 2) == "done"
        assert not any(task.done() for task in flood)
    finally:
        go_on.set()
        await asyncio.gather(*flood)
    assert most == 1
    assert len(turns) == 0


async def test_a_tenants_own_work_runs_in_order_also_where_some_fails() -> None:
    turns = TenantTurns()
    order: list[int] = []

    def work(number: int) -> int:
        order.append(number)
        return 1 // (number - 2)

    results = await asyncio.gather(*(turns.run("a", lambda n=n: work(n)) for n in range(5)), return_exceptions=True)  # type: ignore[misc]
    assert order == [0, 1, 2, 3, 4]
    assert isinstance(results[2], ZeroDivisionError)
    assert len(turns) == 0


async def test_work_that_was_given_up_keeps_its_turn_until_its_thread_ends() -> None:
    turns, began, go_on = TenantTurns(), threading.Event(), threading.Event()

    def slow() -> None:
        began.set()
        go_on.wait(_PATIENCE_S)

    first = asyncio.create_task(turns.run("a", slow))
    waiting = asyncio.create_task(turns.run("a", lambda: None))
    last = asyncio.create_task(turns.run("a", go_on.is_set))
    await asyncio.to_thread(began.wait, _PATIENCE_S)
    first.cancel()
    waiting.cancel()
    for task in (first, waiting):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not last.done()
    go_on.set()
    assert await asyncio.wait_for(last, _PATIENCE_S), "it began before the thread ended"
    assert len(turns) == 0
