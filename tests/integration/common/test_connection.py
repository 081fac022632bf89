"""Scripts share one connection, commands that wait have their own; what is lost, slow or nonsense reaches who asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_sync
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, NoScriptError, OutOfMemoryError, ReadOnlyError
from redis.exceptions import TimeoutError as RedisTimeoutError

from common.acl import Role
from common.embedded import EmbeddedServer
from common.redis import Redis, connect, execute
from common.settings import RedisSettings
from tests.builders_common import PASSWORD, server_under_test, stopped


async def test_many_commands_at_once_get_their_own_replies(server: EmbeddedServer, superuser: redis_sync.Redis) -> None:
    client = connect(RedisSettings(url=server.url))
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
        with stopped(running):
            async with asyncio.timeout(20):
                for size in (24 << 20, 10):
                    with pytest.raises((RedisTimeoutError, RedisConnectionError)):
                        await execute(client, "SET", "k", b"x" * size)
        assert await execute(client, "PING")
        await client.aclose()


ECHO = "return ARGV[1]"


async def run_echo(client: Redis, text: str | bytes) -> bytes:
    found: bytes = await execute(client, "EVAL", ECHO, 0, text)
    return found


@pytest.fixture
async def client(server: EmbeddedServer, superuser: redis_sync.Redis) -> AsyncIterator[Redis]:
    made = connect(RedisSettings(url=server.url))
    yield made
    await made.aclose()


def clients_of_others(superuser: redis_sync.Redis) -> set[str]:
    return {found["id"] for found in superuser.client_list(_type="normal")} - {str(superuser.client_id())}


async def until_blocked(superuser: redis_sync.Redis, number: int) -> None:
    async with asyncio.timeout(3):  # sooner than a connection's own time limit
        while superuser.info("clients")["blocked_clients"] != number:  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0.01)


async def test_many_scripts_at_once_share_a_connection_and_get_their_own_replies(
    client: Redis, superuser: redis_sync.Redis
) -> None:
    await run_echo(client, "first")
    before = clients_of_others(superuser)
    texts = [bytes([n % 256]) * (1 << (8 + n % 14)) for n in range(60)]
    assert await asyncio.gather(*(run_echo(client, text) for text in texts)) == texts
    assert clients_of_others(superuser) == before


async def test_an_error_is_raised_for_the_script_that_made_it(client: Redis) -> None:
    found = await asyncio.gather(
        run_echo(client, "a"),
        execute(client, "EVALSHA", "0" * 40, 0),
        execute(client, "EVAL", "return redis.error_reply('OOM is what it says')", 0),
        execute(client, "EVAL", "return {1, redis.status_reply('fine'), false}", 0),
        run_echo(client, "b"),
        return_exceptions=True,
    )
    assert isinstance(found[1], NoScriptError)
    assert isinstance(found[2], OutOfMemoryError)
    assert (found[0], found[3], found[4]) == (b"a", [1, b"fine", None], b"b")


async def test_who_leaves_does_not_shift_the_replies_of_others(client: Redis, superuser: redis_sync.Redis) -> None:
    await run_echo(client, "open")
    superuser.execute_command("CLIENT", "PAUSE", 200)
    leaving, staying = (asyncio.create_task(run_echo(client, text)) for text in ("leaving", "staying"))
    await asyncio.sleep(0.02)
    leaving.cancel()
    assert await asyncio.wait_for(staying, 10) == b"staying"
    assert leaving.cancelled()


async def test_commands_that_wait_do_not_hold_up_scripts_nor_each_other(
    client: Redis, superuser: redis_sync.Redis
) -> None:
    waiting = [asyncio.create_task(client.execute_together(("BLPOP", name, 60), ("ECHO", name))) for name in "ab"]
    await asyncio.sleep(0.05)
    assert await asyncio.wait_for(run_echo(client, "meanwhile"), 10) == b"meanwhile"
    superuser.rpush("b", "1")
    assert await asyncio.wait_for(waiting[1], 10) == [[b"b", b"1"], b"b"]
    assert not waiting[0].done()
    superuser.rpush("a", "2")
    assert await asyncio.wait_for(waiting[0], 10) == [[b"a", b"2"], b"a"]


async def test_who_stops_waiting_takes_nothing(client: Redis, superuser: redis_sync.Redis) -> None:
    """Else what comes would go to nobody, and the next one would wait behind it."""
    waiting = asyncio.create_task(client.execute_together(("BLPOP", "a", 60)))
    await until_blocked(superuser, 1)
    waiting.cancel()
    await asyncio.wait([waiting])
    await until_blocked(superuser, 0)
    superuser.rpush("a", "1")
    assert await asyncio.wait_for(client.execute_together(("BLPOP", "a", 60)), 10) == [[b"a", b"1"]]


async def test_a_client_that_is_closed_tells_who_waits(client: Redis) -> None:
    waiting = asyncio.create_task(client.execute_together(("BLPOP", "a", 60)))
    await asyncio.sleep(0.05)
    await client.aclose()
    with pytest.raises(RedisConnectionError):
        await asyncio.wait_for(waiting, 10)


async def test_a_connection_that_the_server_ends_is_opened_anew(client: Redis, superuser: redis_sync.Redis) -> None:
    await run_echo(client, "open")
    superuser.execute_command("CLIENT", "PAUSE", 10_000, "WRITE")
    blocked = client.execute_together(("BLPOP", "a", 60))
    waiting = [asyncio.create_task(run_echo(client, "lost")), asyncio.create_task(blocked)]
    await asyncio.sleep(0.05)
    superuser.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    for task in waiting:
        with pytest.raises(RedisConnectionError):
            await asyncio.wait_for(task, 10)
    superuser.execute_command("CLIENT", "UNPAUSE")
    assert await run_echo(client, "again") == b"again"
    assert await client.execute_together(("PING",)) == [b"PONG"]


async def test_a_script_without_an_answer_in_time_gives_the_connection_up(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path, program=server_under_test()) as running:
        client = connect(RedisSettings(url=running.url, socket_timeout_ms=2000))
        await run_echo(client, "open")
        texts = ("a", b"x" * (24 << 20))
        with stopped(running):
            async with asyncio.timeout(20):
                found = await asyncio.gather(*(run_echo(client, text) for text in texts), return_exceptions=True)
        assert [type(error) for error in found] == [RedisTimeoutError, RedisTimeoutError]
        assert await run_echo(client, "again") == b"again"
        await client.aclose()


async def test_a_server_that_has_become_a_replica_is_left(client: Redis, superuser: redis_sync.Redis) -> None:
    """The next connection is opened where the sentinels say then."""
    await run_echo(client, "open")
    await client.execute_together(("PING",))
    before = clients_of_others(superuser)
    superuser.execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        with pytest.raises(ReadOnlyError):
            await execute(client, "EVAL", "return redis.call('SET', KEYS[1], '1')", 1, "k")
        assert isinstance((await client.execute_together(("SET", "k", "1")))[0], ReadOnlyError)
        assert await run_echo(client, "again") == b"again"
    finally:
        superuser.execute_command("REPLICAOF", "NO", "ONE")
    assert len(before) == 2
    assert not before & clients_of_others(superuser)


async def test_scripts_that_find_no_connection_wait_for_the_same_one() -> None:
    """One after another, the last of many would wait many times as long as a connection may take."""
    num_connections = 0

    async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        await reader.read()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(never_answer, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        client = connect(RedisSettings(url=f"redis://127.0.0.1:{port}", socket_timeout_ms=2000))
        leaving, *waiting = (asyncio.create_task(run_echo(client, "a")) for _ in range(20))
        await asyncio.sleep(0.05)
        leaving.cancel()
        found = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 15)
        assert all(isinstance(error, (RedisTimeoutError, RedisConnectionError)) for error in found)
        assert num_connections == 1
        opening = asyncio.create_task(run_echo(client, "a"))
        await asyncio.sleep(0.05)
        await client.aclose()  # whoever still waits is told by an error, not cancelled
        with pytest.raises((RedisTimeoutError, RedisConnectionError)):
            await opening


async def test_what_is_no_answer_ends_the_connection() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Signs in, and then talks nonsense."""
        await reader.read(1000)
        writer.write(b"%1\r\n+proto\r\n:3\r\n")
        await reader.read(1000)
        writer.write(b"hello\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        client = connect(RedisSettings(url=f"redis://127.0.0.1:{port}"))
        with pytest.raises(RedisConnectionError, match="makes no sense"):
            await asyncio.wait_for(run_echo(client, "a"), 10)
        await client.aclose()


@pytest.mark.parametrize("argument", [None, True, "\ud800"], ids=ascii)
async def test_a_script_that_cannot_be_sent_mixes_nothing_up(client: Redis, argument: Any) -> None:
    await run_echo(client, "open")
    with pytest.raises((TypeError, ValueError)):
        await run_echo(client, argument)
    assert await run_echo(client, "mine") == b"mine"


async def test_scripts_are_run_as_the_clients_user(server: EmbeddedServer, superuser: redis_sync.Redis) -> None:
    client = connect(RedisSettings(url=server.url, username=Role.GATEWAY.value, password=PASSWORD))
    assert await run_echo(client, "a") == b"a"
    with pytest.raises(NoPermissionError):
        await execute(client, "EVAL", "return redis.call('SET', KEYS[1], '1')", 1, "elsewhere")
    await client.aclose()
