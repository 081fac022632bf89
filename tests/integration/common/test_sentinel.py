"""A real sentinel, a real failover: clients go on with the new primary, and what was lost is told, never mixed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common import keys
from common.acl import Role, rules
from common.errors import BackendRefused, BackendUnavailable, ResultLost
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import JobState
from common.redis import Redis, Retry, connect, execute
from common.settings import QueueSettings, RedisSettings
from tests.builders_common import PASSWORD, make_event, make_job, server_under_test
from tests.builders_replicas import (
    Node,
    Proxy,
    running_node,
    running_proxy,
    running_sentinel,
    wait_until,
)
from tests.integration.common.conftest import SHARD
from tests.ports import free_port

ROOM = 10_000
NAME = "queue"
PATIENT = Retry(deadline_ms=30_000, base_ms=20, cap_ms=200)


@dataclass
class Watched:
    """A primary and a replica behind a sentinel; the replica hears the primary through a proxy."""

    primary: Node
    replica: Node
    link: Proxy
    sentinel_port: int

    def settings(self, role: Role, **fields: object) -> RedisSettings:
        hosts = f"127.0.0.1:{free_port()},127.0.0.1:{self.sentinel_port}"  # the first does not answer
        return RedisSettings(
            url=f"redis+sentinel://{hosts}/{NAME}/0", username=role.value, password=PASSWORD, **fields  # type: ignore[arg-type]
        )  # fmt: skip


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    program = server_under_test()
    with (
        running_node(tmp_path / "one", program) as primary,
        running_node(tmp_path / "two", program) as replica,
        running_proxy(primary.port) as link,
    ):
        for node in (primary, replica):  # access rules are not replicated
            for role in Role:
                node.client.execute_command("ACL", "SETUSER", role.value, *rules(role), f">{PASSWORD}")
        replica.follow(primary, through=link.port)
        with running_sentinel(tmp_path / "sentinel", NAME, primary, program=program) as port:
            yield Watched(primary, replica, link, port)


@pytest.fixture
async def gateway(watched: Watched) -> AsyncIterator[Redis]:
    client = connect(watched.settings(Role.GATEWAY))
    yield client
    await client.aclose()


@pytest.fixture
async def worker(watched: Watched) -> AsyncIterator[Redis]:
    client = connect(watched.settings(Role.WORKER))
    yield client
    await client.aclose()


async def test_after_a_failover_clients_go_on_and_lost_events_are_told(
    watched: Watched, gateway: Redis, worker: Redis
) -> None:
    queue = JobQueue(gateway, keys.random_id(), QueueSettings(), retry=PATIENT)
    claims = JobClaims(worker, SHARD, keys.random_id(), QueueSettings(), retry=PATIENT)
    kept = (await queue.enqueue(SHARD, make_job())).generation_id
    cut = (await queue.enqueue(SHARD, make_job())).generation_id
    await claims.claim(2, ROOM, ROOM)
    await claims.commit([make_event(kept, (1,)), make_event(cut, (1,))])
    wait_until(lambda: watched.replica.offset == watched.primary.offset, "the replica's offset")

    watched.link.freeze()
    await claims.commit([make_event(cut, (2,), first=1)])
    seen = (await queue.read_log(cut, "acme")).events  # a client has received both
    assert len(seen) == 2
    watched.primary.server.kill()
    watched.link.cut()

    # The same objects, the same connections' pools: the next commands find the new primary by themselves.
    result = await claims.commit([make_event(kept, (2,), first=1), make_event(cut, (3,), first=2)])
    assert watched.replica.info()["role"] == "master"
    assert result.lost == {cut: "diverged"}
    with pytest.raises(ResultLost):
        await queue.attach(cut, "acme", 2, seen[-1].chain_hash)
    with pytest.raises(ResultLost):
        await queue.read_log(cut, "acme", 2, seen[-1].chain_hash)
    after = await queue.attach(kept, "acme", 1, (await queue.read_log(kept, "acme")).events[0].chain_hash)
    assert [event.sequence for event in after.events] == [2]
    await claims.commit([make_event(kept, (3,), first=2, terminal=JobState.DONE)])
    assert (await queue.get(kept, "acme")).state is JobState.DONE
    assert (await queue.enqueue(SHARD, make_job())).place >= 1


async def test_without_a_primary_the_queue_is_unavailable(watched: Watched, gateway: Redis) -> None:
    queue = JobQueue(gateway, keys.random_id(), QueueSettings(), retry=Retry(deadline_ms=50))
    await queue.enqueue(SHARD, make_job())
    watched.replica.server.kill()
    watched.primary.server.kill()
    with pytest.raises(BackendUnavailable):
        await queue.enqueue(SHARD, make_job())


async def test_a_wrong_password_is_no_reason_to_wait(watched: Watched) -> None:
    settings = watched.settings(Role.GATEWAY).model_copy(update={"username": "nobody"})
    client = connect(settings)
    try:
        with pytest.raises(BackendRefused):
            await PATIENT.call(lambda: execute(client, "PING"))
    finally:
        await client.aclose()


async def test_sentinels_have_credentials_of_their_own(tmp_path: Path) -> None:
    program = server_under_test()
    with (
        running_node(tmp_path / "one", program) as primary,
        running_sentinel(tmp_path / "s", NAME, primary, "requirepass watch", program=program) as port,
    ):
        url = f"redis+sentinel://127.0.0.1:{port}/{NAME}"
        client = connect(RedisSettings(url=url, sentinel_password="watch"))
        try:
            assert await PATIENT.call(lambda: execute(client, "PING"))
        finally:
            await client.aclose()
        stranger = connect(RedisSettings(url=url))
        try:
            with pytest.raises((BackendRefused, BackendUnavailable)):
                await Retry(deadline_ms=50).call(lambda: execute(stranger, "PING"))
        finally:
            await stranger.aclose()
