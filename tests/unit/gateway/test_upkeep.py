"""Who waits for events goes before the gateway asks the queue for more."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

from common.jobs import ReplyItem
from gateway.delivery import EventHub
from gateway.upkeep import Upkeep

ITEM = ReplyItem("g", b"", 1, 1)


class Queue:
    """Has one item."""

    def __init__(self, order: list[str]) -> None:
        self.order = order

    async def replies(self, cursors: Mapping[str, bytes], block_ms: int) -> tuple[list[ReplyItem], dict[str, bytes]]:
        self.order.append("asked")
        if self.order.count("asked") > 1:
            await asyncio.Event().wait()
        return [ITEM], {"shard": b"1-0"}


async def test_a_stream_takes_its_event_before_the_queue_is_asked_again() -> None:
    order: list[str] = []
    hub, nobody = EventHub(10), cast("Any", None)
    upkeep = Upkeep(
        cast("Any", Queue(order)), hub, nobody, nobody, nobody, nobody, nobody, nobody,
        interval_s=1, block_ms=1, on_connected=nobody,
    )  # fmt: skip
    upkeep._cursors["shard"] = b"0"
    subscription = hub.subscribe("g", None)

    async def stream() -> None:
        await subscription.wait(10)
        assert subscription.take() == (ITEM,)
        order.append("taken")

    async with asyncio.timeout(10):
        streaming = asyncio.create_task(stream())
        await asyncio.sleep(0)  # it waits
        hearing = asyncio.create_task(upkeep._hear())
        await streaming
        while order.count("asked") < 2:  # noqa: ASYNC110 - the queue sets no event
            await asyncio.sleep(0)
    hearing.cancel()
    assert order == ["asked", "taken", "asked"]
    assert upkeep._cursors == {"shard": b"1-0"}
