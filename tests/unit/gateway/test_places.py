"""No tenant takes all places of a gateway."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ResourceExhausted
from gateway.places import FEW, RETRY_AFTER_MS, Places

TENANTS = ["a", "b", "c", "d"]


def fill(places: Places, stack: ExitStack, tenant: str) -> int:
    """Take places until none is given; return how many."""
    taken = 0
    while True:
        try:
            stack.enter_context(places.take(tenant))
        except ResourceExhausted:
            return taken
        taken += 1


def test_a_tenant_alone_comes_to_its_share_and_the_next_to_its_share_of_the_rest() -> None:
    places = Places(4096, 0.5)
    with ExitStack() as stack:
        assert [fill(places, stack, tenant) for tenant in TENANTS] == [2048, 1024, 512, 256]
        assert fill(places, stack, "a") == 0
    assert places.num_taken == 0


def test_with_a_share_of_one_a_tenant_alone_takes_all() -> None:
    with ExitStack() as stack:
        assert fill(Places(9, 1), stack, "a") == 9


def test_a_small_gateway_gives_a_few_to_whoever_comes_first() -> None:
    places = Places(6, 0.5)
    with ExitStack() as stack:
        assert (fill(places, stack, "a"), fill(places, stack, "b"), fill(places, stack, "c")) == (FEW, 2, 0)


def test_a_refusal_names_the_tenants_share_and_when_to_come_again() -> None:
    places = Places(100, 0.5)
    with ExitStack() as stack:
        fill(places, stack, "a")
        with pytest.raises(ResourceExhausted) as refused, places.take("a"):
            pass
        error = refused.value
        assert error.reason == "GATEWAY_FULL"
        assert error.retry_after_ms is not None
        assert RETRY_AFTER_MS[0] <= error.retry_after_ms <= RETRY_AFTER_MS[1]
        assert error.metadata == {"limit": "100", "tenant_limit": "50"}
        assert "the tenant has its share" in error.message
        for tenant in "bcdefghij":
            fill(places, stack, tenant)
        with pytest.raises(ResourceExhausted) as refused, places.take("new"):
            pass
        assert refused.value.message == "this gateway serves as many calls as it may"


def test_tenants_that_all_want_everything_come_to_equal_parts_and_leave_one() -> None:
    places = Places(1000, 0.5)
    held: dict[str, list[ExitStack]] = {tenant: [] for tenant in "abcd"}
    for _ in range(4000):
        for calls in held.values():
            if calls:
                calls.pop(0).close()  # one of each ends
        for tenant, calls in held.items():
            for _ in range(2):
                one = ExitStack()
                try:
                    one.enter_context(places.take(tenant))
                except ResourceExhausted:
                    break
                calls.append(one)
    assert all(abs(len(calls) - 200) <= 2 for calls in held.values())
    for calls in held.values():
        for call in calls:
            call.close()


@given(
    st.integers(1, 64),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    st.lists(st.tuples(st.sampled_from(TENANTS), st.booleans()), max_size=200),
)
def test_whatever_comes_and_goes_the_bounds_hold(num_places: int, share: float, steps: list[tuple[str, bool]]) -> None:
    places = Places(num_places, share)
    held: dict[str, list[ExitStack]] = {tenant: [] for tenant in TENANTS}
    for tenant, begins in steps:
        if not begins:
            if held[tenant]:
                held[tenant].pop().close()
            continue
        own, total = len(held[tenant]), sum(map(len, held.values()))
        one = ExitStack()
        try:
            one.enter_context(places.take(tenant))
        except ResourceExhausted:
            # Refused only where nothing is free, or the tenant has its share and a few.
            assert total == num_places or own >= max(FEW, int((num_places - (total - own)) * share))
            continue
        held[tenant].append(one)
        assert total < num_places
        assert own + 1 <= FEW or own + 1 <= (num_places - (total - own)) * share
    assert places.num_taken == sum(map(len, held.values()))
    for calls in held.values():
        for call in calls:
            call.close()
    assert places.num_taken == 0
