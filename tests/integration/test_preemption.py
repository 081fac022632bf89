"""A waiting generation of the highest class takes a lower one's place, which goes on later with the same tokens."""

from __future__ import annotations

from typing import Any

import pytest

from common.generation import JobBody, SamplingParams
from common.jobs import JobState, NewJob
from common.redis import Redis
from tests.builders_system import until
from tests.integration.test_freed_blocks import SHARD, Bench, bench, redis, server
from worker.preemption import MAX_PREEMPTIONS

__all__ = ["redis", "server"]  # fixtures

PROMPT = tuple((7 * i) % 190 + 3 for i in range(20))


async def submit(at: Bench, *, priority: int, max_tokens: int = 60, kv_tokens: int = 48, **sampling: Any) -> str:
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    body = JobBody(prompt_token_ids=PROMPT, sampling=params)
    job = NewJob(
        tenant="t", body=body, priority=priority, kv_tokens=kv_tokens, peak_kv_tokens=max(kv_tokens, 96), attended=True
    )
    return (await at.queue.enqueue(SHARD, job)).generation_id


async def ended(at: Bench, generation_id: str) -> list[int]:
    """Wait for its end; return its tokens."""

    async def is_done() -> bool:
        return (await at.queue.get(generation_id, "t")).state.is_final

    await until(is_done, what="its end")
    assert (await at.queue.get(generation_id, "t")).state is JobState.DONE
    log = await at.queue.read_log(generation_id, "t")
    return [token for event in log.events if event.body for delta in event.body.deltas for token in delta.token_ids]


async def has_tokens(at: Bench, generation_id: str, number: int) -> None:
    async def has() -> bool:
        return (await at.queue.get(generation_id, "t")).usage.completion_tokens >= number

    await until(has, what=f"{number} tokens")


SAMPLED = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "repetition_penalty": 1.1}


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
async def test_a_preempted_generation_goes_on_with_the_same_tokens(redis: Redis, sampling: dict[str, Any]) -> None:
    async with bench(redis, max_num_seqs=2) as at:
        alone = await submit(at, priority=2, **sampling)
        expected = await ended(at, alone)
        old = await submit(at, priority=2, max_tokens=400, temperature=0.0)
        await at.held(old)
        victim = await submit(at, priority=2, **sampling)
        await has_tokens(at, victim, 5)
        urgent = await submit(at, priority=0, max_tokens=8)
        await ended(at, urgent)
        record = await at.queue.get(victim, "t")
        assert record.epoch > 1, "it was not preempted"
        assert (await at.queue.get(old, "t")).epoch == 1, "the older one gave way"
        assert await ended(at, victim) == expected
        record = await at.queue.get(victim, "t")
        assert (record.num_claims, record.attempts) == (1, 0)
        assert record.usage.completion_tokens == len(expected) == 60
        await at.queue.cancel(old, "t")


async def test_nothing_gives_way_for_what_would_not_fit_even_then(redis: Redis) -> None:
    """Of 1,920 slots another job of the highest class takes most for as long as it runs."""
    async with bench(redis, max_num_seqs=4) as at:
        large = await submit(at, priority=0, max_tokens=700)
        await has_tokens(at, large, 200)
        low = await submit(at, priority=2, max_tokens=300)
        await has_tokens(at, low, 3)
        too_large = await submit(at, priority=0, kv_tokens=1800, max_tokens=8)
        await has_tokens(at, low, 100)
        assert (await at.queue.get(low, "t")).epoch == 1
        assert (await at.queue.get(too_large, "t")).state is JobState.QUEUED
        await at.queue.cancel(large, "t")
        await ended(at, too_large)
        await ended(at, low)


async def test_a_generation_gives_way_a_bounded_number_of_times(redis: Redis) -> None:
    async with bench(redis, max_num_seqs=1) as at:
        victim = await submit(at, priority=1, max_tokens=250)
        expected_epoch = 1
        for number in range(MAX_PREEMPTIONS + 1):
            await has_tokens(at, victim, 10 * (number + 1))
            urgent = await submit(at, priority=0, max_tokens=4)
            if number == MAX_PREEMPTIONS:
                await has_tokens(at, victim, 10 * number + 60)
                assert (await at.queue.get(urgent, "t")).state is JobState.QUEUED
            else:
                await ended(at, urgent)
                expected_epoch += 2
            await at.queue.get(victim, "t")
        tokens = await ended(at, victim)
        assert len(tokens) == 250
        record = await at.queue.get(victim, "t")
        assert (record.epoch, record.num_claims) == (expected_epoch, 1)
        await ended(at, urgent)


async def test_room_in_the_cache_is_made_as_well(redis: Redis) -> None:
    async with bench(redis, max_num_seqs=4, num_blocks=21) as at:  # 20 blocks of 16
        low = [await submit(at, priority=2, max_tokens=60) for _ in range(3)]
        for generation_id in low:
            await has_tokens(at, generation_id, 20)  # 3 blocks each at least
        urgent = await submit(at, priority=0, max_tokens=8, kv_tokens=240)
        await ended(at, urgent)
        epochs = [(await at.queue.get(generation_id, "t")).epoch for generation_id in low]
        assert epochs[0] == 1, "more gave way than needed"
        assert epochs[2] > 1, "the youngest did not give way"
        tokens = [await ended(at, generation_id) for generation_id in low]
        assert tokens[0] == tokens[1] == tokens[2]
