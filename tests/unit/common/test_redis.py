from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from redis import exceptions as redis_errors

from common.errors import BackendFull, BackendRefused, BackendUnavailable
from common.redis import BLOCK_MARGIN_MS, Retry, block_ms, connect, is_retryable
from common.settings import RedisSettings

FAST = Retry(deadline_ms=200, base_ms=1, cap_ms=2)


def failing(error: Exception, times: int) -> tuple[Callable[[], Awaitable[str]], list[int]]:
    """An operation that raises so many times, then succeeds; and the list of its calls."""
    calls: list[int] = []

    async def operation() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return operation, calls


@pytest.mark.parametrize(
    "error",
    [
        redis_errors.ConnectionError("reset"),
        redis_errors.TimeoutError("no reply"),
        redis_errors.BusyLoadingError("LOADING"),
        redis_errors.ReadOnlyError("READONLY"),
        redis_errors.NoScriptError("NOSCRIPT"),
        redis_errors.ResponseError("MISCONF disk full"),
        redis_errors.ResponseError("NOREPLICAS not enough"),
        redis_errors.ResponseError("BUSY running a script"),
        ConnectionResetError(),
    ],
)
async def test_a_passing_fault_is_tried_again(error: Exception) -> None:
    operation, calls = failing(error, 3)
    assert await FAST.call(operation) == "done"
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (redis_errors.OutOfMemoryError("OOM command not allowed"), BackendFull),
        (redis_errors.ResponseError("OOM command not allowed"), BackendFull),
        (redis_errors.NoPermissionError("NOPERM"), BackendRefused),
        (redis_errors.AuthenticationError("WRONGPASS"), BackendRefused),
        (redis_errors.ResponseError("WRONGTYPE"), BackendRefused),
        (redis_errors.ResponseError("SCHEMA stored 2, spoken 1"), BackendRefused),
    ],
)
async def test_what_a_repeat_cannot_mend_is_told_at_once(error: Exception, kind: type[Exception]) -> None:
    operation, calls = failing(error, 1)
    with pytest.raises(kind) as caught:
        await FAST.call(operation)
    assert caught.value.__cause__ is error
    assert len(calls) == 1


async def test_a_lasting_fault_ends_at_the_deadline() -> None:
    operation, calls = failing(redis_errors.ConnectionError("down"), 10**9)
    with pytest.raises(BackendUnavailable) as caught:
        await asyncio.wait_for(FAST.call(operation), 5)
    assert len(calls) > 1
    assert caught.value.retry_after_ms


async def test_a_fault_of_our_own_is_not_tried_again() -> None:
    operation, calls = failing(ValueError("a bug"), 1)
    with pytest.raises(ValueError, match="a bug"):
        await FAST.call(operation)
    assert len(calls) == 1


def test_a_cancelled_call_is_not_retryable() -> None:
    assert not is_retryable(asyncio.CancelledError())


def test_a_blocking_read_answers_before_the_socket_gives_up() -> None:
    settings = RedisSettings(socket_timeout_ms=3000)
    assert block_ms(settings, 10_000) == 3000 - BLOCK_MARGIN_MS
    assert block_ms(settings, 100) == 100


async def test_the_clients_own_retries_are_off() -> None:
    client = connect(RedisSettings(url="redis://127.0.0.1:1/0"))
    retry = client.connection_pool.connection_kwargs["retry"]
    assert retry.get_retries() == 0
    await client.aclose()


async def test_tls_options_reach_the_connection() -> None:
    client = connect(RedisSettings(url="rediss://host/0", tls_ca_file="/ca.pem", tls_check_hostname=False))  # type: ignore[arg-type]
    options = client.connection_pool.connection_kwargs
    assert (options["ssl_ca_certs"], options["ssl_check_hostname"]) == ("/ca.pem", False)
    await client.aclose()
