from __future__ import annotations

import threading
from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from worker.engine.turns import TakingTurns


@given(st.lists(st.sampled_from("abcd"), max_size=30))
def test_who_waits_comes_after_at_most_one_call_of_every_other(tenants: list[str]) -> None:
    turns, done = TakingTurns("test"), threading.Semaphore(0)
    may_begin = threading.Event()
    ran: list[tuple[str, int]] = []
    counts: defaultdict[str, int] = defaultdict(int)

    def note(tenant: str, number: int) -> None:
        ran.append((tenant, number))
        done.release()

    turns.submit("first", lambda: bool(may_begin.wait(10)) and None)
    for tenant in tenants:
        number = counts[tenant]
        counts[tenant] += 1
        turns.submit(tenant, lambda tenant=tenant, number=number: note(tenant, number))  # type: ignore[misc]
    may_begin.set()
    for _ in tenants:
        assert done.acquire(timeout=10)
    order = list(dict.fromkeys(tenants))
    assert ran == sorted(
        ((tenant, number) for tenant in order for number in range(counts[tenant])),
        key=lambda call: (call[1], order.index(call[0])),
    )
