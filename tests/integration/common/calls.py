"""What tests of the queue do again and again."""

from __future__ import annotations

from common import keys
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import JobState
from common.settings import QueueSettings
from tests.builders_common import FlakyRedis, make_event
from tests.integration.common.conftest import FAST_RETRY

ROOM = 10_000


def other_queue(redis: FlakyRedis, **settings: int) -> JobQueue:
    return JobQueue(redis, keys.random_id(), QueueSettings(**settings), retry=FAST_RETRY)


async def run_to(claims: JobClaims, generation_id: str, num_events: int, *, end: bool = False) -> None:
    """Claim what waits and commit events of one token each, then the end."""
    await claims.claim(100, ROOM, ROOM)
    for index in range(num_events):
        await claims.commit([make_event(generation_id, (index,), first=index)])
    if end:
        await claims.commit([make_event(generation_id, (), first=num_events, terminal=JobState.DONE)])
