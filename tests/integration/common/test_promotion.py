"""A replica that was behind becomes the primary: the tail is lost. Clients, gateways and workers that are ahead of the
log learn it; nobody gets a mix of the lost output and the new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis as redis_sync

from common import keys
from common.acl import Role, rules
from common.errors import GenerationNotFound, ResultLost
from common.generation import OutputDelta
from common.job_claims import JobClaims
from common.job_queue import START_CURSOR, JobQueue
from common.jobs import ItemKind, JobState, LogEvent, LostReason, Reason
from common.redis import Redis, Retry, connect
from common.scripts import ScriptRunner
from common.settings import QueueSettings, RedisSettings
from gateway.progress import LogPosition
from tests.builders_common import PASSWORD, make_event, make_job, mutate, server_under_test
from tests.builders_replicas import Node, Proxy, running_node, running_proxy, wait_until
from tests.integration.common.conftest import SHARD
from tests.integration.common.test_job_claims import ROOM

PATIENT = Retry(deadline_ms=10_000, base_ms=5, cap_ms=50)


@dataclass
class Cluster:
    """Whoever connects to `front` speaks to the primary of the moment."""

    one: Node
    two: Node
    front: Proxy

    def part(self) -> None:
        """From here on the replica hears nothing; all before has reached it."""
        wait_until(lambda: self.one.offset == self.two.offset, "the replica's offset")
        self.two.promote()

    def fail_over(self) -> None:
        self.one.server.kill()
        self.front.switch(self.two.port)

    def end_leases(self) -> None:
        now = self.two.client.time()[0] * 1000
        self.two.client.hset(keys.meta(SHARD), mapping={"grace": 0, "reaped": now})
        for worker_id in self.two.client.zrange(keys.worker_leases(SHARD), 0, -1):
            self.two.client.zadd(keys.worker_leases(SHARD), {worker_id: 1})


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    program = server_under_test()
    with running_node(tmp_path / "one", program) as one, running_node(tmp_path / "two", program) as two:
        for node in (one, two):
            for role in Role:
                node.client.execute_command("ACL", "SETUSER", role.value, *rules(role), f">{PASSWORD}")
        two.follow(one)
        with running_proxy(one.port) as front:
            yield Cluster(one, two, front)


@pytest.fixture
async def clients(cluster: Cluster) -> AsyncIterator[tuple[Redis, Redis]]:
    """As gateway and as worker."""
    url = f"redis://127.0.0.1:{cluster.front.port}"
    made = [
        connect(RedisSettings(url=url, username=role.value, password=PASSWORD)) for role in (Role.GATEWAY, Role.WORKER)
    ]
    yield made[0], made[1]
    for client in made:
        await client.aclose()


@pytest.fixture
def queue(clients: tuple[Redis, Redis]) -> JobQueue:
    return JobQueue(clients[0], keys.random_id(), QueueSettings(), retry=PATIENT)


def new_worker(clients: tuple[Redis, Redis]) -> JobClaims:
    return JobClaims(clients[1], SHARD, keys.random_id(), QueueSettings(), retry=PATIENT)


def tokens(events: tuple[LogEvent, ...]) -> list[int]:
    return [token for event in events if event.body for delta in event.body.deltas for token in delta.token_ids]


async def run_two_lives(cluster: Cluster, clients: tuple[Redis, Redis], queue: JobQueue) -> tuple[str, LogEvent]:
    """A generation whose second event, which a client has, is lost and written anew with another token.

    Returns its id and that event; the log is as long as before then, and goes on.
    """
    generation_id = (await queue.enqueue(SHARD, make_job())).generation_id
    worker = new_worker(clients)
    await worker.claim(1, ROOM, ROOM)
    await worker.commit([make_event(generation_id, (1,))])
    cluster.part()
    await worker.commit([make_event(generation_id, (2,), first=1)])
    lost = (await queue.read_log(generation_id, "acme")).events[-1]
    cluster.fail_over()
    cluster.end_leases()
    await queue.reap(SHARD)
    second = new_worker(clients)
    (job,) = await second.claim(1, ROOM, ROOM)
    assert tokens(job.events) == [1]
    await second.commit([make_event(generation_id, (9,), first=1)])
    await second.commit([make_event(generation_id, (10,), first=2)])
    return generation_id, lost


async def test_a_client_ahead_of_the_log_gets_result_lost_even_when_it_is_as_long_again(
    cluster: Cluster, clients: tuple[Redis, Redis], queue: JobQueue
) -> None:
    generation_id, lost = await run_two_lives(cluster, clients, queue)
    for read in (queue.attach, queue.read_log):
        with pytest.raises(ResultLost):
            await read(generation_id, "acme", lost.sequence, lost.chain_hash)
    whole = await queue.attach(generation_id, "acme")  # who begins again gets one whole output
    assert tokens(whole.events) == [1, 9, 10]


async def test_a_gateway_never_hands_on_what_does_not_continue_what_it_has(
    cluster: Cluster, clients: tuple[Redis, Redis], queue: JobQueue
) -> None:
    generation_id, lost = await run_two_lives(cluster, clients, queue)
    first, second, third = (await queue.read_log(generation_id, "acme")).events
    position = LogPosition()
    position.advance(first)
    position.advance(lost)
    with pytest.raises(ResultLost):
        position.advance(third)
    fresh = LogPosition()
    assert [fresh.advance(event).deltas[0].token_ids for event in (first, second, third)] == [(1,), (9,), (10,)]


async def test_without_the_hash_the_output_would_be_mixed(
    cluster: Cluster, clients: tuple[Redis, Redis], queue: JobQueue
) -> None:
    generation_id, lost = await run_two_lives(cluster, clients, queue)
    runner = ScriptRunner(clients[0], mutate("attach", "hash_of(entry_after[2][2]) ~= hash", "false"))
    trusting = JobQueue(clients[0], keys.random_id(), QueueSettings(), retry=PATIENT, scripts=runner)
    rest = await trusting.attach(generation_id, "acme", lost.sequence, lost.chain_hash)
    assert tokens(rest.events) == [10]  # behind the client's 1, 2: a text that no worker ever wrote


async def test_a_worker_ahead_of_the_store_drops_its_jobs(
    cluster: Cluster, clients: tuple[Redis, Redis], queue: JobQueue
) -> None:
    worker = new_worker(clients)
    ahead, level = [(await queue.enqueue(SHARD, make_job())).generation_id for _ in range(2)]
    await worker.claim(2, ROOM, ROOM)
    await worker.commit([make_event(ahead, (1,)), make_event(level, (1,))])
    waiting = (await queue.enqueue(SHARD, make_job())).generation_id
    cluster.part()
    unknown = (await queue.enqueue(SHARD, make_job())).generation_id
    await worker.claim(2, ROOM, ROOM)
    await worker.commit([make_event(ahead, (2,), first=1)])
    cluster.fail_over()

    result = await worker.commit(
        [
            make_event(ahead, (3,), first=2),
            make_event(level, (2,), first=1),
            make_event(waiting, (1,)),
            make_event(unknown, (1,)),
        ]
    )
    assert result.lost == {ahead: LostReason.DIVERGED, waiting: LostReason.TAKEN, unknown: LostReason.GONE}
    assert worker.held == {level}
    assert tokens((await queue.read_log(ahead, "acme")).events) == [1]
    assert tokens((await queue.read_log(level, "acme")).events) == [1, 2]
    assert result.has_unknown_jobs  # the one that diverged is still its own there: it begins anew from its log
    (again,) = await worker.owned()
    assert (again.generation_id, tokens(again.events)) == (ahead, [1])
    await worker.commit([make_event(ahead, (7,), first=1)])
    assert tokens((await queue.read_log(ahead, "acme")).events) == [1, 7]


async def test_a_job_that_was_lost_is_made_again_by_its_idempotency_key(
    cluster: Cluster, clients: tuple[Redis, Redis], queue: JobQueue
) -> None:
    kept_job, lost_job = (make_job(idempotency_key=key, request_digest=b"d") for key in ("kept", "lost"))
    kept = await queue.enqueue(SHARD, kept_job)
    cluster.part()
    lost = await queue.enqueue(SHARD, lost_job)
    cluster.fail_over()
    with pytest.raises(GenerationNotFound):
        await queue.attach(lost.generation_id, "acme")
    again = await queue.enqueue(SHARD, lost_job)
    assert (again.duplicate, again.generation_id != lost.generation_id) == (False, True)
    assert (await queue.enqueue(SHARD, lost_job)).generation_id == again.generation_id
    assert (await queue.enqueue(SHARD, kept_job)).generation_id == kept.generation_id


async def test_an_end_that_was_lost_is_not_followed_by_another_text(
    cluster: Cluster, clients: tuple[Redis, Redis], queue: JobQueue
) -> None:
    generation_id = (await queue.enqueue(SHARD, make_job())).generation_id
    worker = new_worker(clients)
    await worker.claim(1, ROOM, ROOM)
    await worker.commit([make_event(generation_id, (1,))])
    cluster.part()
    await worker.commit([make_event(generation_id, (2,), first=1, terminal=JobState.DONE)])
    *_, end = (await queue.read_log(generation_id, "acme")).events
    assert end.kind is ItemKind.DONE
    cluster.fail_over()
    record = await queue.get(generation_id, "acme")
    assert (record.state, record.reason, record.sequence) == (JobState.RUNNING, Reason.NONE, 1)
    with pytest.raises(ResultLost):
        await queue.attach(generation_id, "acme", end.sequence, end.chain_hash)
    assert (await worker.commit()).has_unknown_jobs
    (again,) = await worker.owned()  # it runs to another end, for whoever asks from the start
    await worker.commit([make_event(again.generation_id, (8,), first=1, terminal=JobState.DONE)])
    assert tokens((await queue.read_log(generation_id, "acme")).events) == [1, 8]


async def test_a_gateway_that_only_hears_replies_goes_on_hearing_them(
    cluster: Cluster, clients: tuple[Redis, Redis], queue: JobQueue
) -> None:
    """The reply stream was replicated as far as the log: what comes next is heard, or the heartbeat says otherwise."""
    generation_id = (await queue.enqueue(SHARD, make_job())).generation_id
    worker = new_worker(clients)
    await worker.claim(1, ROOM, ROOM)
    await worker.commit([make_event(generation_id, (1,))])
    _, cursors = await queue.replies({SHARD: START_CURSOR}, 100)
    cluster.part()
    await worker.commit([make_event(generation_id, (2,), first=1)])
    _, cursors = await queue.replies(cursors, 100)
    cluster.fail_over()
    await worker.commit([make_event(generation_id, (3,), first=2)])
    assert await worker.owned()
    await worker.commit([make_event(generation_id, (7,), first=1)])

    async def heard() -> list[int]:
        items, _ = await queue.replies(cursors, 100)
        deltas: list[OutputDelta] = [delta for item in items if item.body for delta in item.body.deltas]
        return [token for delta in deltas for token in delta.token_ids]

    async with asyncio.timeout(10):
        while not await heard():
            pass
    assert await heard() == [7]


def test_the_old_primary_takes_nothing_without_its_replica(cluster: Cluster) -> None:
    """Configured as the manual says, the half that was cut off refuses, so that nothing can be lost there."""
    cluster.one.client.config_set("min-replicas-to-write", 1)
    cluster.one.client.config_set("min-replicas-max-lag", 10)
    assert cluster.one.client.set("probe", 1)
    cluster.part()
    wait_until(lambda: cluster.one.info()["connected_slaves"] == 0, "the loss of the replica")
    with pytest.raises(redis_sync.ResponseError, match="NOREPLICAS"):
        cluster.one.client.set("probe", 2)
