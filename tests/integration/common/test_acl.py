"""What each role's user may not do. What it may is shown by all other tests here: they run as these users."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import redis as redis_sync
from redis.exceptions import NoPermissionError, ResponseError

from common import keys
from common.acl import Role, acl_file_line
from common.redis import execute
from tests.builders_common import FlakyRedis
from tests.integration.common.conftest import SHARD

# A refusal inside a script is a plain error in redis-py, and each server has its own words for it.
DENIED = r"(?i)no permissions|can't run this command|can't access|NOPERM|ACL failure"
FOR_NOBODY = [
    ("FLUSHALL",),
    ("CONFIG", "SET", "save", ""),
    ("CONFIG", "GET", "*"),
    ("KEYS", "*"),
    ("SCAN", "0"),
    ("ACL", "LIST"),
    ("SHUTDOWN",),
    ("CLIENT", "LIST"),
    ("MONITOR",),
    ("SUBSCRIBE", "x"),
    ("REPLICAOF", "NO", "ONE"),
    ("SCRIPT", "FLUSH"),
    ("GET", "anything"),
    ("EVAL", "return redis.call('GET', 'anything')", "0"),
    ("EVAL", "return redis.call('KEYS', '*')", "0"),
]
OF_OTHERS = {
    Role.GATEWAY: [
        ("HSET", keys.api_key("x"), "tenant", "root"),
        ("SADD", keys.API_KEY_IDS, "x"),
        ("HSET", keys.MODEL_CARDS, "x", "y"),
        ("SET", keys.model_blob("0"), "x"),
        ("EVAL", "return redis.call('HSET', '{keys}:k:x', 'tenant', 'root')", "0"),
    ],
    Role.WORKER: [
        ("HGETALL", keys.api_key("x")),
        ("HGET", keys.api_key("x"), "digest"),
        ("SMEMBERS", keys.API_KEY_IDS),
    ],
    Role.ADMIN: [("HGET", keys.job(SHARD, "x"), "b"), ("XREAD", "STREAMS", keys.job_log(SHARD, "x"), "0")],
}


@pytest.fixture(params=list(Role))
def role(request: pytest.FixtureRequest) -> Role:
    found: Role = request.param
    return found


async def test_a_roles_user_can_do_nothing_outside_its_role(
    role: Role, gateway_redis: FlakyRedis, worker_redis: FlakyRedis, admin_redis: FlakyRedis
) -> None:
    client = {Role.GATEWAY: gateway_redis, Role.WORKER: worker_redis, Role.ADMIN: admin_redis}[role]
    for command in (*FOR_NOBODY, *OF_OTHERS[role]):
        with pytest.raises(ResponseError, match=DENIED):
            await execute(client, *command)


def test_a_line_of_an_acl_file_is_understood_by_a_server(
    role: Role, superuser: redis_sync.Redis, tmp_path: Path
) -> None:
    line = acl_file_line(role, "somebody", hashlib.sha256(b"secret").hexdigest())
    user, name, *rules = line.split()
    assert (user, name) == ("user", "somebody")
    superuser.execute_command("ACL", "SETUSER", name, *rules)
    with redis_sync.Redis(
        unix_socket_path=superuser.connection_pool.connection_kwargs["path"], username=name, password="secret"
    ) as client:
        assert client.ping()
        with pytest.raises(NoPermissionError):
            client.flushall()
    superuser.execute_command("ACL", "DELUSER", name)
