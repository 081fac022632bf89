"""Access rules of the server's users: for each role the exact commands and keys that it needs, and nothing else.

Scripts run with the rights of the user that calls them, so a role's list holds the commands inside its scripts too.
Apply with `ACL SETUSER <name> <rules>`; `acl_file_line` gives the line for an ACL file.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Final


class Role(StrEnum):
    """Who connects."""

    GATEWAY = "gateway"
    WORKER = "worker"
    ADMIN = "admin"  # manages API keys and the registry; sees no job


_CONNECTION: Final = ("auth", "hello", "ping", "select", "client|setname", "time")
_SCRIPTS: Final = ("eval", "evalsha")
_JOB_SCRIPTS: Final = (
    "del", "exists", "expire", "pexpire", "get", "set",
    "hdel", "hexists", "hget", "hincrby", "hkeys", "hlen", "hmget", "hrandfield", "hset",
    "hstrlen",  # of programs of version 0.1 that still run beside ours
    "llen", "lpush", "ltrim",
    "sadd", "srandmember", "srem",
    "xadd", "xrange", "xrevrange", "xtrim",
    "zadd", "zcard", "zincrby", "zrange", "zrangebyscore", "zrank", "zrem", "zrevrange", "zscore",
)  # fmt: skip
_JOB_KEYS: Final = tuple(
    "~{*}:" + name
    for name in (
        "meta", "j:*", "q:*", "alone:*", "act:*", "vtc", "len", "live", "bell", "dl", "dt", "wl", "w:*", "wc:*", "wi:*",
        "credit", "gl", "g:*", "gw:*", "i:*", "usage:*", "failed", "kl", "kq", "settle",
        "dead",  # written by programs of version 0.1 that still run beside ours
    )
)  # fmt: skip
_REGISTRY: Final = ("exists", "get", "hdel", "hget", "hgetall", "hset", "hsetnx", "hvals", "incr", "set", "del")

_BATCH_SCRIPTS: Final = ("getbit", "setbit", "rpush", "lrange")

# What a gateway needs besides where replicas must confirm new jobs. `waitaof` only on servers that have it (Valkey,
# Redis 7.2): others refuse a rule that names it.
REPLICA_COMMANDS: Final = ("wait", "waitaof")

_COMMANDS: Final = {
    Role.GATEWAY: (*_CONNECTION, *_SCRIPTS, *_JOB_SCRIPTS, *_BATCH_SCRIPTS, "xread", "hgetall", "info"),
    Role.WORKER: (*_CONNECTION, *_SCRIPTS, *_JOB_SCRIPTS, "blpop", *_REGISTRY),
    Role.ADMIN: (*_CONNECTION, *_SCRIPTS, *_REGISTRY, "sadd", "smembers", "info"),
}
_KEYS: Final = {
    Role.GATEWAY: (*_JOB_KEYS, "~{t:*}:*", "~{batches}:*", "%R~{models}:*", "%R~{keys}:*"),
    Role.WORKER: (*_JOB_KEYS, "~{models}:*"),
    Role.ADMIN: ("~{models}:*", "~{keys}:*"),
}


def commands_of(role: Role) -> tuple[str, ...]:
    """What a role's user may do on a connection that is set up already, by scripts or without."""
    return tuple(command for command in dict.fromkeys(_COMMANDS[role]) if command not in (*_CONNECTION, *_SCRIPTS))


def sample_keys(role: Role) -> tuple[str, ...]:
    """A key for each pattern of keys that a role's user may use, or only read."""
    return tuple(pattern.partition("~")[2].replace("*", "x") for pattern in _KEYS[role])


def rules(role: Role, extra: Iterable[str] = ()) -> tuple[str, ...]:
    """The rules of a role for ACL SETUSER: everything taken away, then what it needs. No password among them.

    `extra` are further commands: REPLICA_COMMANDS.
    """
    commands: Iterable[str] = dict.fromkeys((*_COMMANDS[role], *extra))
    return ("reset", "on", *_KEYS[role], "resetchannels", "-@all", *(f"+{command}" for command in commands))


def acl_file_line(role: Role, username: str, password_sha256: str, extra: Iterable[str] = ()) -> str:
    """One line of an ACL file; `password_sha256` is the password's SHA-256 in hex, `extra` as in `rules`."""
    return f"user {username} {' '.join(rules(role, extra))} #{password_sha256}".replace(" reset on ", " on ", 1)
