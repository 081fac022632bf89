"""One real server for the session, emptied before each test; clients as each role's user."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import redis as redis_sync

from common import keys
from common.acl import Role
from common.embedded import EmbeddedServer
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.redis import Retry
from common.settings import QueueSettings
from tests.builders_common import FlakyRedis, create_users, flaky_client, server_under_test

SHARD = keys.shard_name("tiny", "r1")
FAST_RETRY = Retry(deadline_ms=2000, base_ms=1, cap_ms=5)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path_factory.mktemp("server"), program=server_under_test()) as running:
        yield running


@pytest.fixture(scope="session")
def superuser_for_session(server: EmbeddedServer) -> Iterator[redis_sync.Redis]:
    with redis_sync.Redis(unix_socket_path=str(server.socket_path)) as client:
        client.config_set("appendfsync", "no")  # durability has its own tests; here it would only cost time
        create_users(client)
        yield client


@pytest.fixture
def superuser(superuser_for_session: redis_sync.Redis) -> redis_sync.Redis:
    """Sees and edits everything, to look inside and to move time."""
    superuser_for_session.flushall()
    return superuser_for_session


@pytest.fixture
async def gateway_redis(server: EmbeddedServer, superuser: redis_sync.Redis) -> AsyncIterator[FlakyRedis]:
    client = flaky_client(server.socket_path, Role.GATEWAY)
    yield client
    await client.aclose()


@pytest.fixture
async def worker_redis(server: EmbeddedServer, superuser: redis_sync.Redis) -> AsyncIterator[FlakyRedis]:
    client = flaky_client(server.socket_path, Role.WORKER)
    yield client
    await client.aclose()


@pytest.fixture
async def admin_redis(server: EmbeddedServer, superuser: redis_sync.Redis) -> AsyncIterator[FlakyRedis]:
    client = flaky_client(server.socket_path, Role.ADMIN)
    yield client
    await client.aclose()


@pytest.fixture
def queue(gateway_redis: FlakyRedis) -> JobQueue:
    return JobQueue(gateway_redis, keys.random_id(), QueueSettings(), retry=FAST_RETRY)


@pytest.fixture
def claims(worker_redis: FlakyRedis) -> JobClaims:
    return JobClaims(worker_redis, SHARD, keys.random_id(), QueueSettings(), retry=FAST_RETRY)
