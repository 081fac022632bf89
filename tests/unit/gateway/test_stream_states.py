"""When a stream says that its generation began, goes on elsewhere, or still waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, cast

import pytest

from common.chain import GENESIS
from common.jobs import GenerationRecord, ItemKind, JobState, LogEvent
from gateway.stream import StreamTimes
from tests.builders_gateway import OneJobQueue, chained, collect, factory_for, item_of, news, open_stream, tokens
from torchrelay.v1 import generation_pb2 as pb


async def test_a_state_is_told_once() -> None:
    class Slow(OneJobQueue):
        """Has nothing to tell for the first silences."""

        num_looks = 0

        async def get_all(self, shard: str, generation_ids: Sequence[str]) -> list[GenerationRecord]:
            self.num_looks += 1
            self.num_visible = int(self.num_looks > 3)
            return await super().get_all(shard, generation_ids)

    queue = Slow(chained([tokens(65)], ItemKind.DONE), JobState.DONE)
    hub, factory = factory_for(queue)
    stream = open_stream(factory, num_outputs=1)
    hub.dispatch([news(ItemKind.STARTED, LogEvent(GENESIS, 1, 0))])
    async with asyncio.timeout(5):
        assert await collect(stream) == ["progress", "deltas", "finished"]
    assert (queue.num_looks, queue.num_reads) == (4, 1)  # the log is read only once there is something in it


@pytest.mark.parametrize(("start_s", "told"), [(60, []), (0.002, ["progress"])])
async def test_a_start_is_told_where_tokens_do_not_follow_soon(start_s: float, told: list[str]) -> None:
    log = chained([tokens(65), tokens(66, first=1)], ItemKind.DONE)
    queue = OneJobQueue(log, JobState.DONE, num_visible=len(log))
    hub, factory = factory_for(queue, StreamTimes(60, 60, start_s=start_s))
    reading = asyncio.create_task(collect(open_stream(factory, num_outputs=1)))
    hub.dispatch([news(ItemKind.STARTED, LogEvent(GENESIS, 1, 0))])
    await asyncio.sleep(0.05)
    hub.dispatch(map(item_of, log))
    assert await asyncio.wait_for(reading, 5) == [*told, "deltas", "finished"]


async def test_a_start_after_a_recovery_is_told_too() -> None:
    log = chained([tokens(65), tokens(66, first=1)], ItemKind.DONE)
    queue = OneJobQueue(log, JobState.DONE, num_visible=len(log))
    hub, factory = factory_for(queue, StreamTimes(60, 60, start_s=0.002))
    stream = open_stream(factory, num_outputs=1)
    states: list[int] = []

    async def read() -> None:
        async for event in stream.events():
            if event.HasField("progress"):
                states.append(event.progress.state)

    reading = asyncio.create_task(read())
    for kind in (ItemKind.STARTED, ItemKind.REQUEUED, ItemKind.STARTED):
        hub.dispatch([news(kind, LogEvent(GENESIS, 1, 0))])
        await asyncio.sleep(0.02)
    hub.dispatch(map(item_of, log))
    await asyncio.wait_for(reading, 5)
    running, recovering = pb.GENERATION_STATE_RUNNING, pb.GENERATION_STATE_RECOVERING
    assert states == [running, recovering, running]


async def test_silence_brings_progress() -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 10
        return now

    queue = OneJobQueue(chained([tokens(65)], ItemKind.DONE), JobState.DONE)
    _, factory = factory_for(queue, StreamTimes(0.001, 15, clock))
    stream = open_stream(factory, num_outputs=1)
    states = []
    async with asyncio.timeout(5), aclosing(cast("AsyncIterator[Any]", stream.events())) as events:
        async for event in events:
            states.append(event.progress.state)
            if len(states) == 3:
                break
    assert states == [pb.GENERATION_STATE_RUNNING] * 3
