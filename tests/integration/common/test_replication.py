"""A new job counts once replicas have it: a real primary, a real replica, which stops and lags."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from redis.exceptions import ResponseError

from common import keys
from common.acl import REPLICA_COMMANDS, Role, rules
from common.errors import BackendRefused, BackendUnavailable, ReplicationUnconfirmed
from common.job_queue import JobQueue
from common.redis import Argument, Redis, connect, connection_options
from common.replication import ReplicaAcks
from common.scripts import Script, ScriptRunner
from common.settings import QueueSettings, RedisSettings
from tests.builders_common import PASSWORD, make_job, mutate, server_under_test
from tests.builders_replicas import Node, running_node, wait_until
from tests.integration.common.conftest import FAST_RETRY, SHARD


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    folder = tmp_path_factory.mktemp("replicas")
    program = server_under_test()
    with running_node(folder / "one", program) as one, running_node(folder / "two", program) as two:
        two.follow(one)
        yield one, two


@pytest.fixture
def primary(nodes: tuple[Node, Node]) -> Iterator[Node]:
    one, two = nodes
    one.client.flushall()
    yield one
    two.thaw()
    wait_until(lambda: one.offset == two.offset, "the replica's offset")


@pytest.fixture
def replica(nodes: tuple[Node, Node], primary: Node) -> Node:
    return nodes[1]


def has_waitaof(node: Node) -> bool:
    try:
        node.client.execute_command("WAITAOF", 0, 0, 1)
    except ResponseError:
        return False
    return True


def make_settings(node: Node, **fields: object) -> RedisSettings:
    """As the gateway's user, which may wait for replicas."""
    user = "gateway-with-replicas"
    extra = REPLICA_COMMANDS if has_waitaof(node) else REPLICA_COMMANDS[:1]
    node.client.execute_command("ACL", "SETUSER", user, *rules(Role.GATEWAY, extra), f">{PASSWORD}")
    options: dict[str, object] = {"min_replicas": 1, "wait_timeout_ms": 700, **fields}
    return RedisSettings(url=node.server.url, username=user, password=PASSWORD, **options)  # type: ignore[arg-type]


class Clients:
    """Makes gateways' queues, each with connections of its own."""

    def __init__(self) -> None:
        self._redis: list[Redis] = []

    def queue(self, settings: RedisSettings, overrides: dict[str, Script] | None = None) -> JobQueue:
        redis = connect(settings)
        self._redis.append(redis)
        runner = ScriptRunner(redis, overrides)
        acks = ReplicaAcks(redis, settings)
        return JobQueue(redis, keys.random_id(), QueueSettings(), retry=FAST_RETRY, scripts=runner, acks=acks)

    async def close(self) -> None:
        for redis in self._redis:
            await redis.aclose()


@pytest.fixture
async def clients() -> AsyncIterator[Clients]:
    made = Clients()
    yield made
    await made.close()


@pytest.mark.parametrize("sync", ["disk", "memory"])
async def test_an_accepted_job_is_on_the_replica(primary: Node, replica: Node, clients: Clients, sync: str) -> None:
    queue = clients.queue(make_settings(primary, replica_sync=sync))
    for _ in range(2):  # the script is not known at first: both ways
        accepted = await queue.enqueue(SHARD, make_job())
        assert replica.client.exists(keys.job(SHARD, accepted.generation_id))


@pytest.mark.parametrize("sync", ["disk", "memory"])
async def test_a_stopped_replica_leaves_the_outcome_unknown_until_it_goes_on(
    primary: Node, replica: Node, clients: Clients, sync: str
) -> None:
    settings = make_settings(primary, replica_sync=sync)
    queue, other = clients.queue(settings), clients.queue(settings)
    replica.freeze()
    job = make_job(idempotency_key="k", disconnect_grace_ms=60_000)
    with pytest.raises(ReplicationUnconfirmed) as caught:
        await queue.enqueue(SHARD, job)
    assert (caught.value.reason, caught.value.metadata) == ("REPLICATION_UNCONFIRMED", {"limit": "1", "got": "0"})
    assert "idempotency key" in caught.value.message
    assert caught.value.retry_after_ms
    with pytest.raises(ReplicationUnconfirmed):  # a repeat is not better off, though it makes no second job
        await other.enqueue(SHARD, job)
    replica.thaw()
    accepted = await other.enqueue(SHARD, job)
    assert accepted.duplicate
    assert [record.generation_id for record in await queue.list_inflight(SHARD)] == [accepted.generation_id]
    assert replica.client.exists(keys.job(SHARD, accepted.generation_id))


async def test_the_same_id_is_not_accepted_by_a_repeat_either(primary: Node, replica: Node, clients: Clients) -> None:
    settings = make_settings(primary)
    replica.freeze()
    job = make_job(generation_id=keys.new_generation_id(SHARD))
    for queue in (clients.queue(settings), clients.queue(settings)):
        with pytest.raises(ReplicationUnconfirmed):
            await queue.enqueue(SHARD, job)


async def test_a_repeat_that_writes_nothing_would_be_confirmed_by_nobody(
    primary: Node, replica: Node, clients: Clients
) -> None:
    """Why enqueue writes in any case: without, the wait of another connection has nothing to wait for."""
    if not has_waitaof(primary):
        pytest.skip("older servers count reads as writes here, so that a repeat waits in any case")
    settings = make_settings(primary)
    replica.freeze()
    job = make_job(idempotency_key="k")
    with pytest.raises(ReplicationUnconfirmed):
        await clients.queue(settings).enqueue(SHARD, job)
    mutant = mutate("enqueue", "call('HSET', KEYS[1], 'waited', int(now))", "do end")
    assert (await clients.queue(settings, mutant).enqueue(SHARD, job)).duplicate


async def test_without_replicas_demanded_nobody_waits(primary: Node, replica: Node, clients: Clients) -> None:
    replica.freeze()
    await clients.queue(make_settings(primary, min_replicas=0)).enqueue(SHARD, make_job())


async def test_more_replicas_than_there_are_confirm_nothing(primary: Node, replica: Node, clients: Clients) -> None:
    with pytest.raises(ReplicationUnconfirmed) as caught:
        await clients.queue(make_settings(primary, min_replicas=2)).enqueue(SHARD, make_job())
    assert caught.value.metadata == {"limit": "2", "got": "1"}


async def test_a_server_without_waitaof_is_asked_with_wait(primary: Node, replica: Node, clients: Clients) -> None:
    settings = make_settings(primary)
    sent: list[Argument] = []

    class OlderServer(Redis):
        async def execute_command(self, *args: Any, **options: Any) -> Any:
            sent.append(args[0])
            if args[0] == "WAITAOF":
                raise ResponseError("unknown command 'WAITAOF', with args beginning with: '0' '1' '5'")
            return await super().execute_command(*args, **options)

    redis = OlderServer.from_url(settings.url, **connection_options(settings))
    try:
        queue = JobQueue(redis, keys.random_id(), QueueSettings(), retry=FAST_RETRY, acks=ReplicaAcks(redis, settings))
        accepted = [(await queue.enqueue(SHARD, make_job())).generation_id for _ in range(2)]
        assert {record.generation_id for record in await queue.list_inflight(SHARD)} == set(accepted)
    finally:
        await redis.aclose()
    assert sent.count("WAITAOF") == 1
    assert sent.count("WAIT") >= 2


async def test_a_user_that_may_not_wait_is_told_so(primary: Node, replica: Node, clients: Clients) -> None:
    settings = make_settings(primary)
    primary.client.execute_command("ACL", "SETUSER", "plain", *rules(Role.GATEWAY), f">{PASSWORD}")
    with pytest.raises(BackendRefused):
        await clients.queue(settings.model_copy(update={"username": "plain"})).enqueue(SHARD, make_job())


async def test_a_primary_without_its_least_replicas_is_unavailable_and_recovers(
    primary: Node, replica: Node, clients: Clients
) -> None:
    """min-replicas-to-write: an old primary that is cut off accepts nothing (NOREPLICAS)."""
    queue = clients.queue(make_settings(primary, min_replicas=0))
    primary.client.config_set("min-replicas-to-write", 2)
    try:
        with pytest.raises(BackendUnavailable) as caught:
            await queue.enqueue(SHARD, make_job())
        assert "NOREPLICAS" in str(caught.value.__cause__)
        assert primary.client.hlen(keys.meta(SHARD)) == 0
    finally:
        primary.client.config_set("min-replicas-to-write", 0)
    await queue.enqueue(SHARD, make_job())
