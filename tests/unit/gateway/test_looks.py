"""Silent streams ask together, and each is told of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest

from common import keys
from common.errors import BackendUnavailable, GenerationNotFound
from common.job_queue import JobQueue
from common.jobs import GenerationRecord
from gateway.looks import Looks
from tests.builders_gateway import make_record

SHARD, OTHER_SHARD = "tiny-1", "tiny-2"


class Queue:
    """Knows some generations; a shard can be away."""

    def __init__(self, known: Sequence[str], away: str = "") -> None:
        self.known = known
        self.away = away
        self.calls: list[tuple[str, int]] = []

    async def get_all(self, shard: str, generation_ids: Sequence[str]) -> list[GenerationRecord]:
        self.calls.append((shard, len(generation_ids)))
        assert all(keys.shard_of(name) == shard for name in generation_ids)
        if shard == self.away:
            raise BackendUnavailable("away")
        found = [replace(make_record(), generation_id=name) for name in generation_ids if name in self.known]
        return found[::-1]


def looks_at(queue: Queue) -> Looks:
    return Looks(cast(JobQueue, queue), 0.001)


async def test_looks_of_one_moment_are_one_call_for_each_shard() -> None:
    ids = [keys.new_generation_id(shard) for shard in (SHARD, OTHER_SHARD) for _ in range(3)]
    gone = keys.new_generation_id(SHARD)
    queue = Queue(ids)
    looks = looks_at(queue)
    found = await asyncio.gather(*(looks.record(name) for name in (*ids, gone, ids[0])))
    assert [record and record.generation_id for record in found] == [*ids, None, ids[0]]
    assert queue.calls == [(SHARD, 4), (OTHER_SHARD, 3)]
    assert (await looks.record(ids[1])) is not None  # and later ones are asked anew
    assert queue.calls[2:] == [(SHARD, 1)]


async def test_no_call_asks_for_more_than_a_hundred() -> None:
    ids = [keys.new_generation_id(SHARD) for _ in range(250)]
    queue = Queue(ids)
    looks = looks_at(queue)
    assert all(await asyncio.gather(*map(looks.record, ids)))
    assert queue.calls == [(SHARD, 100), (SHARD, 100), (SHARD, 50)]


async def test_a_shard_that_is_away_fails_only_its_own_looks() -> None:
    here, away = keys.new_generation_id(SHARD), keys.new_generation_id(OTHER_SHARD)
    looks = looks_at(Queue([here, away], away=OTHER_SHARD))
    found = await asyncio.gather(*map(looks.record, (away, here, away)), return_exceptions=True)
    assert isinstance(found[0], BackendUnavailable)
    assert isinstance(found[2], BackendUnavailable)
    assert isinstance(found[1], GenerationRecord)


async def test_who_leaves_takes_the_answer_from_nobody() -> None:
    name = keys.new_generation_id(SHARD)
    looks = looks_at(Queue([name]))
    leaving, staying = (asyncio.create_task(looks.record(name)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    assert (await asyncio.wait_for(staying, 5)) is not None
    assert leaving.cancelled()


async def test_an_id_of_no_shard_is_not_asked_for() -> None:
    queue = Queue([])
    with pytest.raises(GenerationNotFound):
        await looks_at(queue).record("made up")
    assert queue.calls == []
