"""Servers behind Sentinel: their address, and a client that always finds the present primary.

`redis+sentinel://[user:password@]host:port,host:port/<master name>[/<db>]`, or `rediss+sentinel://` for TLS to both the
sentinels and the servers. The client asks the sentinels whenever it opens a connection, by redis-py's own support.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool

from common.wire import WiredRedis

DEFAULT_PORT: Final = 26379
_URL: Final = re.compile(
    r"(?P<tls>rediss|redis)\+sentinel://"
    r"(?:(?P<user>[^:@/]*)(?::(?P<password>[^@/]*))?@)?"
    r"(?P<hosts>[^@/]+)/(?P<name>[^/]+)(?:/(?P<db>\d*))?"
)
_HOST: Final = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::(?P<port>\d{1,5}))?")


@dataclass(frozen=True, slots=True)
class SentinelAddress:
    """Where the sentinels are, and what of theirs is meant."""

    sentinels: tuple[tuple[str, int], ...]
    master_name: str
    db: int = 0
    username: str | None = None  # of the servers, not of the sentinels
    password: str | None = None
    is_tls: bool = False


def is_sentinel_url(url: str) -> bool:
    return url.startswith(("redis+sentinel:", "rediss+sentinel:"))


def parse_sentinel_url(url: str) -> SentinelAddress:
    """Take an address apart. Raises ValueError, without repeating the password that it may hold."""
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError("a sentinel address is redis+sentinel://host:port,host:port/<master name>/<db>")
    sentinels = []
    for part in match["hosts"].split(","):
        found = _HOST.fullmatch(part)
        port = int(found["port"] or DEFAULT_PORT) if found is not None else 0
        if found is None or not 0 < port < 1 << 16:
            raise ValueError("a sentinel address names each sentinel as host or host:port, with commas between")
        sentinels.append((found["host"].strip("[]"), port))
    return SentinelAddress(
        sentinels=tuple(sentinels),
        master_name=unquote(match["name"]),
        db=int(match["db"] or 0),
        username=unquote(match["user"]) if match["user"] else None,
        password=unquote(match["password"]) if match["password"] else None,
        is_tls=match["tls"] == "rediss",
    )


class _PrimaryClient(WiredRedis):
    """A client of the present primary; closes the connections to the sentinels too."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        pool = self.connection_pool
        if self.auto_close_connection_pool and isinstance(pool, SentinelConnectionPool):  # not one connection's client
            await pool.sentinel_manager.aclose()


def connect_to_primary(
    address: SentinelAddress, options: Mapping[str, Any], sentinel_options: Mapping[str, Any]
) -> WiredRedis:
    """A client with its own pool. `options` are those of each connection to a server, the others to a sentinel.

    While no sentinel knows a primary, commands raise redis-py's ConnectionError.
    """
    servers: dict[str, Any] = {"db": address.db, "ssl": address.is_tls, **options}
    if address.username is not None:
        servers.setdefault("username", address.username)
    if address.password is not None:
        servers.setdefault("password", address.password)
    of_sentinels = {"ssl": address.is_tls, **sentinel_options}
    sentinel = Sentinel(address.sentinels, sentinel_kwargs=of_sentinels, **servers)  # type: ignore[no-untyped-call]
    client: WiredRedis = sentinel.master_for(address.master_name, redis_class=_PrimaryClient)
    return client
