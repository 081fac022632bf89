"""Our connections send what those of redis-py would, also more than a socket takes, and give up when nobody reads."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
import redis as redis_sync
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from common.embedded import EmbeddedServer
from common.redis import Argument, _LeanConnection, connect, execute
from common.settings import RedisSettings
from tests.builders_common import server_under_test

ARGUMENTS = st.one_of(
    st.binary(max_size=50), st.text(max_size=20), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False)
)


@given(st.sampled_from(("SET", "EVALSHA", "CLIENT SETNAME", b"GET")), st.lists(ARGUMENTS, max_size=12))
def test_a_command_is_packed_as_redis_py_packs_it(name: str | bytes, rest: list[Argument]) -> None:
    ours = _LeanConnection().pack_command(name, *rest)  # type: ignore[arg-type]
    assert b"".join(ours) == b"".join(Connection().pack_command(name, *rest))  # type: ignore[arg-type]


async def test_many_commands_at_once_get_their_own_replies(server: EmbeddedServer, superuser: redis_sync.Redis) -> None:
    client = connect(RedisSettings(url=server.url))
    assert client.connection_pool.connection_class.__name__.startswith("Lean")
    sizes = [1 << (8 + n % 14) for n in range(60)]
    await asyncio.gather(*(execute(client, "SET", f"k{n}", bytes([n]) * size) for n, size in enumerate(sizes)))
    found = await asyncio.gather(*(execute(client, "GET", f"k{n}") for n in range(len(sizes))))
    assert found == [bytes([n]) * size for n, size in enumerate(sizes)]
    await execute(client, "SET", "large", b"x" * (24 << 20))  # far more than a socket's buffers
    assert superuser.strlen("large") == 24 << 20
    await client.aclose()


async def test_a_server_that_does_not_read_is_given_up(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path, program=server_under_test()) as running:
        client = connect(RedisSettings(url=running.url, socket_timeout_ms=2000))
        await execute(client, "PING")
        pid = int((await client.info("server"))["process_id"])
        os.kill(pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(20):
                for size in (24 << 20, 10):
                    with pytest.raises((RedisTimeoutError, RedisConnectionError)):
                        await execute(client, "SET", "k", b"x" * size)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert await execute(client, "PING")
        await client.aclose()
