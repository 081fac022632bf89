"""What a call that reads slowly keeps a gateway holding."""

from __future__ import annotations

import sys
import weakref
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast
from unittest import mock

import pytest

from common.jobs import Attachment, ItemKind, JobState, LogEvent
from gateway.delivery import EventHub
from gateway.stream import StreamTimes
from tests.builders_gateway import (
    GENERATION_ID,
    TENANT,
    OneJobQueue,
    chained,
    factory_for,
    item_of,
    open_stream,
    tokens,
)


def retained(hub: EventHub) -> int:
    """About how many bytes wait for the only subscription."""
    (subscription,) = hub._subscriptions[GENERATION_ID]
    return sum(
        sys.getsizeof(delta.token_ids) + len(delta.text)
        for item in subscription._pending
        for delta in (item.body.deltas if item.body else ())
    )


@pytest.mark.parametrize("num_tokens", [1, 50, 1000])
async def test_what_waits_for_a_slow_call_is_bounded_in_events_and_bytes(num_tokens: int) -> None:
    hub = EventHub(256, 64 << 10)
    subscription = hub.subscribe(GENERATION_ID)
    bodies = [tokens(*([65] * num_tokens), first=n * num_tokens) for n in range(2000)]
    most, most_items = 0, 0
    for event in chained(bodies):
        hub.dispatch([item_of(event)])
        most, most_items = max(most, retained(hub)), max(most_items, len(subscription._pending))
    assert most <= 64 << 10
    assert most_items <= 256
    assert subscription._pending == [], "the log has all of it"
    assert subscription.take() is None
    hub.dispatch([item_of(event)])
    assert subscription.take() == (item_of(event),), "it hears again once it has read"


class Page(list[LogEvent]):
    """Events of a page; unlike a tuple's its life can be watched."""


async def test_a_slow_call_keeps_nothing_of_the_pages_that_it_has_read() -> None:
    """Pages of the log are decoded, many times as large as the message that they become."""
    log = chained([tokens(65 + n % 26, first=n) for n in range(60)], ItemKind.DONE)
    pages: list[weakref.ref[Page]] = []

    class Watched(OneJobQueue):
        async def read_log(self, *where: Any) -> Attachment:
            found = await super().read_log(*where)
            page = Page(found.events)
            pages.append(weakref.ref(page))
            return replace(found, events=cast(Any, page))

    queue = Watched(log, JobState.DONE, num_visible=60, page=20)
    _, factory = factory_for(queue, StreamTimes(60, 60))
    stream = open_stream(factory, num_outputs=1, attachment=await queue.attach(GENERATION_ID, TENANT))
    async with aclosing(cast("AsyncIterator[Any]", stream.events())) as events:
        for num_read in range(1, 4):
            assert len((await anext(events)).deltas.deltas[0].token_ids) == 20
            assert [page() for page in pages] == [None] * num_read, "a page is read in its turn, and let go of"


def test_the_hub_counts_its_subscriptions() -> None:
    hub, _ = factory_for(OneJobQueue(chained([tokens(65)]), JobState.DONE))
    first, second = hub.subscribe(GENERATION_ID), hub.subscribe(GENERATION_ID)
    other = hub.subscribe("another")
    assert len(hub) == 3
    for _ in range(2):  # the second time does nothing
        hub.unsubscribe(first)
        assert len(hub) == 2
    hub.unsubscribe(second)
    assert not hub.has(GENERATION_ID)
    hub.unsubscribe(other)
    assert len(hub) == 0


async def test_tokens_gather_before_they_are_sent_where_streams_are_many_and_the_first_do_not_wait() -> None:
    log = chained([tokens(65 + n, first=n) for n in range(3)])
    hub, factory = factory_for(OneJobQueue(log, JobState.RUNNING), StreamTimes(60, 60))
    for number in range(250):
        hub.subscribe(f"other-{number}")
    stream = open_stream(factory, num_outputs=1)
    pauses: list[float] = []

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        hub.dispatch([item_of(log[2])])

    with mock.patch("gateway.stream.asyncio.sleep", sleep):
        async with aclosing(cast("AsyncIterator[Any]", stream.events())) as events:
            hub.dispatch([item_of(log[0])])
            assert (await anext(events)).deltas.deltas[0].token_ids == [65]
            assert pauses == []
            hub.dispatch([item_of(log[1])])
            assert (await anext(events)).deltas.deltas[0].token_ids == [66, 67]
    (pause_s,) = pauses
    assert 0 < pause_s <= 0.1
