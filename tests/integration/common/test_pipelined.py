"""Many callers on one connection: each gets its own reply, whatever becomes of the others and of the connection."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_sync
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from common.acl import Role
from common.embedded import EmbeddedServer
from common.pipelined import PipelinedConnection
from common.redis import connect
from common.settings import RedisSettings
from tests.builders_common import PASSWORD, server_under_test


@pytest.fixture
async def pipelined(server: EmbeddedServer, superuser: redis_sync.Redis) -> AsyncIterator[PipelinedConnection]:
    client = connect(RedisSettings(url=server.url))
    connection = PipelinedConnection(client, 5)
    yield connection
    await connection.aclose()
    await client.aclose()


async def test_each_caller_gets_its_own_reply(pipelined: PipelinedConnection) -> None:
    async def caller(number: int) -> bool:
        value = bytes([number % 256]) * (1 + number * 37 % 9000)
        assert await pipelined.execute_command("SET", f"k{number}", value) in (b"OK", True)
        return bool(await pipelined.execute_command("GET", f"k{number}") == value)

    assert all(await asyncio.gather(*map(caller, range(300))))
    assert await pipelined.execute_command("GET", "nothing") is None
    assert await pipelined.execute_command("HGETALL", "nothing") in ({}, [])


async def test_an_error_is_its_callers_alone(pipelined: PipelinedConnection) -> None:
    results = await asyncio.gather(
        pipelined.execute_command("SET", "k", 1),
        pipelined.execute_command("LPUSH", "k", 1),
        pipelined.execute_command("EVALSHA", "0" * 40, 0),
        pipelined.execute_command("INCR", "k"),
        return_exceptions=True,
    )
    assert isinstance(results[1], ResponseError)
    assert isinstance(results[2], NoScriptError)
    assert results[3] == 2


async def test_a_caller_that_leaves_mixes_nothing_up(pipelined: PipelinedConnection) -> None:
    await pipelined.execute_command("PING")
    for number in range(200):
        leaving = asyncio.create_task(pipelined.execute_command("ECHO", "of who left"))
        staying = asyncio.create_task(pipelined.execute_command("ECHO", str(number)))
        await asyncio.sleep(0)
        leaving.cancel()
        assert await staying == str(number).encode()


@pytest.mark.parametrize("value", [None, True, "\ud800"], ids=ascii)
async def test_a_command_that_cannot_be_sent_mixes_nothing_up(pipelined: PipelinedConnection, value: Any) -> None:
    await pipelined.execute_command("PING")
    with pytest.raises((TypeError, ValueError)):
        await pipelined.execute_command("ECHO", value)
    assert await pipelined.execute_command("ECHO", "mine") == b"mine"


async def test_a_lost_connection_ends_what_waits_and_the_next_command_makes_another(
    pipelined: PipelinedConnection, superuser: redis_sync.Redis
) -> None:
    number = await pipelined.execute_command("CLIENT", "ID")
    waiting = asyncio.create_task(pipelined.execute_command("BLPOP", "nothing", 5))
    while "cmd=blpop" not in superuser.execute_command("CLIENT", "LIST", "ID", number).decode():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    superuser.client_kill_filter(_id=str(number))
    with pytest.raises(RedisConnectionError):
        await waiting
    assert await pipelined.execute_command("CLIENT", "ID") != number


async def test_a_server_that_stops_is_given_up(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path, program=server_under_test()) as running:
        client = connect(RedisSettings(url=running.url))
        pid = int((await client.info("server"))["process_id"])
        connection = PipelinedConnection(client, 2)
        await connection.execute_command("PING")
        os.kill(pid, signal.SIGSTOP)
        try:
            results = await asyncio.gather(
                *(connection.execute_command("PING") for _ in range(5)), return_exceptions=True
            )
        finally:
            os.kill(pid, signal.SIGCONT)
        assert all(isinstance(result, RedisTimeoutError) for result in results)
        assert await connection.execute_command("PING")
        await connection.aclose()
        await client.aclose()


async def test_it_connects_as_the_clients_user(server: EmbeddedServer, superuser: redis_sync.Redis) -> None:
    client = connect(RedisSettings(url=server.url, username=Role.GATEWAY.value, password=PASSWORD))
    connection = PipelinedConnection(client, 5)
    assert await connection.execute_command("PING")
    with pytest.raises(NoPermissionError):
        await connection.execute_command("FLUSHALL")
    await connection.aclose()
    await client.aclose()
