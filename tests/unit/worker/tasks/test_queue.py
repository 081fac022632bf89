"""Whose text is next, and which are computed together."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from common.generation import SamplingParams
from worker.engine.types import GenerationRequest
from worker.tasks.queue import Pending, TextQueue, buckets
from worker.tasks.runner import Text

_SAMPLING = SamplingParams(max_tokens=0)


def pending(name: str, lengths: list[int], tenant: str = "a", priority: int = 1, weight: float = 1.0) -> Pending:
    request = GenerationRequest(name, (), _SAMPLING, priority=priority, tenant=tenant, weight=weight)
    return Pending(request, tuple(Text(np.zeros(n, np.int32)) for n in lengths))


def take(queue: TextQueue, max_tokens: int) -> list[tuple[str, int]]:
    return [(one.request.request_id, index) for one, index in queue.take(max_tokens)]


def test_tenants_take_turns_and_a_tenant_s_requests_keep_their_order() -> None:
    queue = TextQueue()
    queue.add(pending("flood", [10] * 100, "a"))
    queue.add(pending("later", [10], "a"))
    queue.add(pending("other", [10] * 3, "b"))
    assert take(queue, 60) == [
        ("flood", 0), ("other", 0), ("flood", 1), ("other", 1), ("flood", 2), ("other", 2),
    ]  # fmt: skip
    assert take(queue, 20) == [("flood", 3), ("flood", 4)]
    assert len(queue) == 96


def test_what_was_idle_has_earned_nothing() -> None:
    queue = TextQueue()
    queue.add(pending("early", [10] * 50, "a"))
    take(queue, 300)
    queue.add(pending("new", [10] * 50, "b"))
    assert Counter(name for name, _ in take(queue, 200)) == {"early": 10, "new": 10}


def test_a_heavier_tenant_has_more() -> None:
    queue = TextQueue()
    queue.add(pending("x", [5] * 100, "a", weight=3.0))
    queue.add(pending("y", [5] * 100, "b"))
    found = Counter(name for name, _ in take(queue, 200))
    assert abs(found["x"] - 30) <= 1


def test_a_higher_class_goes_first_and_a_text_is_taken_however_long() -> None:
    queue = TextQueue()
    queue.add(pending("low", [4, 4], priority=2))
    queue.add(pending("high", [500], priority=0))
    assert take(queue, 10) == [("high", 0)]
    assert take(queue, 8) == [("low", 0), ("low", 1)]
    assert take(queue, 8) == []


def test_what_is_removed_is_not_taken() -> None:
    queue = TextQueue()
    gone = pending("gone", [4, 4])
    queue.add(gone)
    queue.add(pending("stays", [4]))
    queue.remove(gone)
    queue.remove(gone)
    assert take(queue, 100) == [("stays", 0)]


@given(st.lists(st.integers(1, 512), min_size=1, max_size=60), st.sampled_from([0.0, 0.125, 1.0]))
def test_each_text_is_in_one_bucket_and_padding_is_bounded(lengths: list[int], max_waste: float) -> None:
    groups = buckets(lengths, max_waste)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        own = [lengths[index] for index in group]
        assert max(own) * len(own) <= (1 + max_waste) * sum(own)
