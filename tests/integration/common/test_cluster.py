"""The scripts on a server in cluster mode, which refuses a script that touches a key of another hash slot."""

from __future__ import annotations

import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis as redis_sync

from common import keys
from common.batches import Batches, BatchState, NewBatch, Outcome, Owner, Result
from common.embedded import find_server
from common.job_claims import JobClaims
from common.job_queue import START_CURSOR, JobQueue
from common.jobs import JobState, WorkerInfo
from common.redis import Redis, connect
from common.registry import ModelRegistry
from common.settings import QueueSettings, RedisSettings
from tests.builders_common import make_event, make_job, server_under_test
from tests.integration.common.conftest import FAST_RETRY, SHARD
from tests.integration.common.test_registry import FILES, make_card
from tests.ports import free_port

ROOM = 10_000


@pytest.fixture(scope="module")
def cluster_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder: Path = tmp_path_factory.mktemp("cluster")
    port = free_port(also=10_000)  # for the cluster bus
    program = server_under_test() or find_server()
    options = [
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(folder),
        "--save",
        "",
        "--cluster-enabled",
        "yes",
    ]
    process = subprocess.Popen([str(program), *options], stdout=subprocess.DEVNULL)
    try:
        with redis_sync.Redis(port=port) as client:
            end = time.monotonic() + 20
            is_assigned = False
            while True:
                try:
                    if not is_assigned:
                        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
                        is_assigned = True
                    client.set("probe", 1)
                    break
                except redis_sync.RedisError:
                    assert time.monotonic() < end, "the cluster does not come up"
                    time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture
async def client(cluster_port: int) -> AsyncIterator[Redis]:
    made = connect(RedisSettings(url=f"redis://127.0.0.1:{cluster_port}"))
    yield made
    await made.aclose()


async def test_every_script_keeps_to_its_slot(client: Redis) -> None:
    settings = QueueSettings(worker_lease_ms=100)
    queue = JobQueue(client, keys.random_id(), settings, retry=FAST_RETRY)
    other = JobQueue(client, keys.random_id(), settings, retry=FAST_RETRY)
    claims = JobClaims(client, SHARD, keys.random_id(), settings, retry=FAST_RETRY)
    ids = [
        (await queue.enqueue(SHARD, make_job(tenant, idempotency_key="k"))).generation_id
        for tenant in ("acme", "{other}", "a:b")
    ]
    await queue.heartbeat({SHARD: START_CURSOR})
    assert len(await claims.claim(3, ROOM, ROOM, wait=True)) == 3
    await claims.commit([make_event(generation_id, (1,)) for generation_id in ids])
    await claims.heartbeat(WorkerInfo(model="tiny"))
    await claims.release(ids[:1])
    assert await claims.owned() == []
    assert len(await claims.claim(1, ROOM, ROOM)) == 1
    items, _ = await queue.replies({SHARD: START_CURSOR}, 100)
    assert len(items) >= 6
    assert len((await other.attach(ids[0], "acme")).events) == 1
    await other.detach(ids[0])
    await queue.cancel(ids[1], None)
    await claims.commit([make_event(ids[2], (2,), first=1, terminal=JobState.DONE)])
    assert await queue.lookup_idempotency([SHARD], "a:b", "k", b"") == ids[2]
    assert await queue.workers(SHARD)
    assert (await queue.shape(SHARD)).num_waiting == 0
    for upkeep in (queue.reap, queue.sweep):
        await upkeep(SHARD)
    assert await queue.list_inflight(SHARD) == []
    await claims.leave()


async def test_the_registry_keeps_to_its_slot(client: Redis) -> None:
    registry = ModelRegistry(client, retry=FAST_RETRY)
    card = make_card()
    await registry.publish(card, FILES)
    assert await registry.list() == [card]
    assert await registry.delete(card.shard)


async def test_the_scripts_of_batches_keep_to_their_slots(client: Redis) -> None:
    batches = Batches(client, keys.random_id(), retry=FAST_RETRY)
    ids = [keys.new_batch_id() for _ in range(3)]
    for batch_id in ids:
        await batches.append("acme", batch_id, 0, [b"one", b"two"])
        await batches.start(
            NewBatch(
                batch_id=batch_id,
                owner=Owner("acme", "k1"),
                total=2,
                priority=2,
                idempotency_key=batch_id,
                max_batches=3,
                retention_ms=1000,
                lifetime_ms=1000,
            )
        )
    assert {batch_id for _, batch_id in await batches.due()} == set(ids)
    lease = await batches.take("acme", ids[0], 1000)
    assert lease is not None
    assert await batches.items("acme", ids[0], 0, 9) == [b"one", b"two"]
    await batches.renew(lease.batch, 1000, num_running=1, fed_below=2)
    done = [Result(index, Outcome.SUCCEEDED, b"result") for index in range(2)]
    assert await batches.finish(lease.batch, done) is BatchState.DONE
    assert len((await batches.results("acme", ids[0], 0))[1]) == 2
    await batches.cancel("acme", ids[1])
    await batches.delete("acme", ids[2])
    await batches.erase(await batches.get("acme", ids[1]))
    assert [record.batch_id for record in await batches.all_of("acme")] == [ids[0]]
