"""What is stored of generations that have fallen silent, asked for together.

One by one a look costs what reading its log does, and hundreds may wait in line.
"""

from __future__ import annotations

import asyncio
from typing import Final, TypeAlias

from common import keys
from common.job_queue import JobQueue
from common.jobs import GenerationRecord

_MOST_AT_ONCE: Final = 100  # of one script call, which must not hold the server for long

_Answer: TypeAlias = asyncio.Future[GenerationRecord | None]


class Looks:
    """Gathers the looks of one moment. Used from one event loop."""

    def __init__(self, queue: JobQueue, gather_s: float) -> None:
        self._queue = queue
        self._gather_s = gather_s
        self._wanted: dict[str, dict[str, _Answer]] = {}  # by shard and generation
        self._looking: set[asyncio.Task[None]] = set()

    async def record(self, generation_id: str) -> GenerationRecord | None:
        """Return what is stored, of whatever tenant, with its echo as stored; None if there is nothing.

        Raises what `JobQueue.get_all` raises, and GenerationNotFound for an id that names no shard.
        """
        shard = keys.shard_of(generation_id)
        if not self._wanted:
            task = asyncio.create_task(self._look())
            self._looking.add(task)
            task.add_done_callback(self._looking.discard)
        wanted = self._wanted.setdefault(shard, {})
        answer = wanted.setdefault(generation_id, asyncio.get_running_loop().create_future())
        return await asyncio.shield(answer)  # others may wait for it too

    async def _look(self) -> None:
        await asyncio.sleep(self._gather_s)
        wanted, self._wanted = self._wanted, {}
        for shard, answers in wanted.items():
            ids = list(answers)
            for start in range(0, len(ids), _MOST_AT_ONCE):
                await self._ask(shard, {name: answers[name] for name in ids[start : start + _MOST_AT_ONCE]})

    async def _ask(self, shard: str, answers: dict[str, _Answer]) -> None:
        try:
            found = {record.generation_id: record for record in await self._queue.get_all(shard, list(answers))}
        except Exception as error:  # noqa: BLE001 - each of those who wait raises it
            for answer in answers.values():
                answer.set_exception(error)
                answer.exception()  # whoever asked may have gone: an error that nobody is told is no fault here
            return
        for generation_id, answer in answers.items():
            answer.set_result(found.get(generation_id))
