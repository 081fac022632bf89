"""Connections to the server, and the one place where an operation is tried again.

redis-py's own retries are off: it repeats a command whose reply was lost up to ten times, silently. Here every
operation is a script or command that bears repetition, and `Retry.call` repeats it with capped exponential backoff and
full jitter.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

from redis import exceptions as redis_errors
from redis.asyncio.retry import Retry as RedisPyRetry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig

from common.errors import BackendFull, BackendRefused, BackendUnavailable, ServingError
from common.sentinel import connect_to_primary, is_sentinel_url, parse_sentinel_url
from common.settings import RedisSettings
from common.wire import Argument, WiredRedis

Redis: TypeAlias = WiredRedis
T = TypeVar("T")

BLOCK_MARGIN_MS: Final = 500  # a blocking read must answer before the socket gives up
# redis-py turns most of these into subclasses of ResponseError; the prefix is what all servers and versions agree on.
_TRY_AGAIN: Final = (
    "READONLY", "LOADING", "BUSY", "MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "NOREPLICAS", "NOSCRIPT",
    "MISCONF", "UNBLOCKED",
)  # fmt: skip
_RETRY_AFTER_MS: Final = 1000


def connect(settings: RedisSettings) -> Redis:
    """A client with its own connection pool; connects at the first command. Close it with `aclose()`.

    For a sentinel address, a client of whichever server is the primary. Raises ValueError for an address that is none.
    """
    options = connection_options(settings)
    if is_sentinel_url(settings.url):
        address = parse_sentinel_url(settings.url)
        return connect_to_primary(address, options, _sentinel_options(settings, options))
    client: WiredRedis = WiredRedis.from_url(settings.url, **options)  # type: ignore[assignment]
    return client


def _sentinel_options(settings: RedisSettings, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of connections to sentinels: as to servers, but with credentials of their own."""
    own = {name: value for name, value in options.items() if name not in ("username", "password", "max_connections")}
    if settings.sentinel_username is not None:
        own["username"] = settings.sentinel_username
    if settings.sentinel_password is not None:
        own["password"] = settings.sentinel_password.get_secret_value()
    return own


def connection_options(settings: RedisSettings) -> dict[str, Any]:
    """redis-py's options for these settings, without the URL."""
    options: dict[str, Any] = {
        "protocol": 3,
        "decode_responses": False,
        "socket_timeout": settings.socket_timeout_ms / 1000,
        "socket_connect_timeout": settings.connect_timeout_ms / 1000,
        "max_connections": settings.max_connections,
        "retry": RedisPyRetry(NoBackoff(), 0),
        "retry_on_error": [],
        "health_check_interval": 0,
        # Two commands that redis-py would send on each connection, and that our users' access rules do not hold.
        "driver_info": None,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
    if settings.username is not None:
        options["username"] = settings.username
    if settings.password is not None:
        options["password"] = settings.password.get_secret_value()
    if settings.url.startswith(("rediss://", "rediss+sentinel://")):
        options["ssl_check_hostname"] = settings.tls_check_hostname
        for name, path in (
            ("ssl_ca_certs", settings.tls_ca_file),
            ("ssl_certfile", settings.tls_cert_file),
            ("ssl_keyfile", settings.tls_key_file),
        ):
            if path is not None:
                options[name] = str(path)
    return options


async def execute(redis: Redis, *command: Argument) -> Any:
    """Send one command, once. The one typed door to redis-py's untyped `execute_command`; raises its errors."""
    return await redis.execute_command(*command)


def block_ms(settings: RedisSettings, wanted_ms: int) -> int:
    """How long a blocking command may wait: as wanted, but below the socket's timeout, or each would be an error."""
    return max(1, min(wanted_ms, settings.socket_timeout_ms - BLOCK_MARGIN_MS))


def is_retryable(error: BaseException) -> bool:
    """Whether the same operation may succeed when sent again."""
    if isinstance(error, redis_errors.AuthenticationError | redis_errors.NoPermissionError) or is_untrusted(error):
        return False
    if isinstance(error, redis_errors.ConnectionError | redis_errors.TimeoutError | OSError):
        return True
    if isinstance(error, redis_errors.NoScriptError | redis_errors.ReadOnlyError | redis_errors.TryAgainError):
        return True
    return isinstance(error, redis_errors.ResponseError) and str(error).startswith(_TRY_AGAIN)


def is_untrusted(error: BaseException | None) -> bool:
    """Whether a server's certificate was the reason: another authority's, another host's, or out of its time."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def domain_error(error: BaseException) -> ServingError:
    """The domain's name for a server or connection error."""
    if isinstance(error, redis_errors.OutOfMemoryError) or str(error).startswith("OOM"):
        return BackendFull("the queue's server is out of memory", retry_after_ms=_RETRY_AFTER_MS)
    if is_untrusted(error):  # unavailable all the same: certificates are renewed, and nobody is to be restarted then
        return BackendUnavailable(
            "the queue's server shows a certificate that is not trusted",
            reason="BACKEND_UNTRUSTED",
            retry_after_ms=_RETRY_AFTER_MS,
        )
    if is_retryable(error):
        return BackendUnavailable("the queue's server does not answer", retry_after_ms=_RETRY_AFTER_MS)
    if str(error).startswith("SCHEMA"):
        message = "the queue belongs to programs of another schema version"
        return BackendRefused(message, reason="SCHEMA_MISMATCH", metadata={"error": str(error)})
    return BackendRefused("the queue's server refuses a command", metadata={"error": type(error).__name__})


@dataclass(frozen=True, slots=True)
class Retry:
    """Policy of repetition: pauses are uniform in [0, min(cap, base * 2**try)], until the deadline (full jitter)."""

    deadline_ms: int = 10_000
    base_ms: int = 20
    cap_ms: int = 1_000

    @classmethod
    def from_settings(cls, settings: RedisSettings) -> Retry:
        return cls(settings.retry_deadline_ms, settings.retry_base_ms, settings.retry_cap_ms)

    async def call(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Run `operation` until it succeeds. It must bear repetition: a try whose reply was lost may have taken effect.

        Raises BackendFull (out of memory: not repeated), BackendRefused (not repeated), or BackendUnavailable at the
        deadline, or at once where the server's certificate is not trusted; the server's error is the cause.
        """
        end = time.monotonic() + self.deadline_ms / 1000
        attempt = 0
        while True:
            try:
                return await operation()
            except (redis_errors.RedisError, OSError) as error:
                pause = random.uniform(0, min(self.cap_ms, self.base_ms * 2 ** min(attempt, 16))) / 1000
                if not is_retryable(error) or time.monotonic() + pause >= end:
                    raise domain_error(error) from error
            attempt += 1
            await asyncio.sleep(pause)
