"""The queue's server: whether it answers, whom it lets in, and whether it keeps what it is given."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import ValidationError
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from common import keys
from common.acl import Role, commands_of, sample_keys
from common.configuration import masked
from common.diagnosis.findings import Finding, Surroundings, failure, ok, warning
from common.diagnosis.host import is_readable, kernel_findings
from common.embedded import EmbeddedServer, describe_durability
from common.errors import ServingError
from common.redis import Redis, Retry, connect, execute, is_untrusted
from common.registry import ModelRegistry
from common.scripts import ScriptRunner, as_list
from common.settings import QueueSettings, RedisSettings

CHECK: Final = "queue"
_ANSWER_S: Final = 5.0
_MAX_SKEW_S: Final = 2.0
_LEAST_VERSION: Final = (7, 0)
_PROBE_SHARD: Final = "doctor"
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_NOT_KNOWN: Final = re.compile(r"NOAUTH|WRONGPASS|username-password pair|already authenticated")
_ACL_FIX: Final = "load the lines of `torchrelay acl` into the server's aclfile (ACL LOAD), and use their users"
_PERSISTENCE_FIX: Final = "on the server: appendonly yes, appendfsync always (`torchrelay serve` does so by itself)"


async def check_server(where: Surroundings) -> Sequence[Finding]:
    """All of the server that TORCHRELAY_REDIS_* names, or of the one that `torchrelay serve` keeps on this machine."""
    try:
        settings, queue_settings = RedisSettings(), QueueSettings()
    except ValidationError:
        return []  # the settings' own check says so
    socket = EmbeddedServer(where.data_dir / "queue").socket_path
    is_own = not where.is_set("TORCHRELAY_REDIS_URL") and socket.exists()
    if is_own:
        settings = settings.model_copy(update={"url": f"unix://{socket}"})
    unreadable = [
        failure(CHECK, f"TORCHRELAY_REDIS_{name.upper()}={path} cannot be read", "correct the path, or its permissions")
        for name in ("tls_ca_file", "tls_cert_file", "tls_key_file")
        if (path := getattr(settings, name)) is not None and not is_readable(Path(path))
    ]
    if unreadable:
        return unreadable
    redis = connect(settings)
    try:
        unreachable = await _reach(redis, settings)
        if unreachable is not None:
            return [unreachable]
        found = await _look(redis, settings, queue_settings, where, is_own=is_own)
    finally:
        await redis.aclose()
    if is_local(settings.url):
        found += kernel_findings(where.root)
    return found


def is_local(url: str) -> bool:
    """Whether a server's address is on this machine."""
    return url.startswith("unix:") or urlsplit(url).hostname in _LOOPBACK


def _name(settings: RedisSettings) -> str:
    return f"the queue's server at {masked(settings.url)}"


async def _reach(redis: Redis, settings: RedisSettings) -> Finding | None:
    name = _name(settings)
    try:
        async with asyncio.timeout(_ANSWER_S):
            await execute(redis, "PING")
    except (RedisError, OSError, TimeoutError) as error:
        if is_untrusted(error):
            return failure(
                CHECK,
                f"{name} shows a certificate that is not trusted",
                "set TORCHRELAY_REDIS_TLS_CA_FILE to who signed it, and the host name that it bears in the URL",
            )
        if isinstance(error, AuthenticationError) or _NOT_KNOWN.search(str(error)):
            return failure(
                CHECK,
                f"{name} does not take this user and password",
                "set TORCHRELAY_REDIS_USERNAME and TORCHRELAY_REDIS_PASSWORD, or put them into TORCHRELAY_REDIS_URL",
            )
        if isinstance(error, ResponseError):
            return failure(CHECK, f"{name} refuses PING: {error}", _ACL_FIX)
        return failure(
            CHECK,
            f"{name} does not answer: {str(error) or type(error).__name__}",
            "start it (`torchrelay serve` brings one along), or set TORCHRELAY_REDIS_URL to where it is",
        )
    return None


async def _look(
    redis: Redis, settings: RedisSettings, queue_settings: QueueSettings, where: Surroundings, *, is_own: bool
) -> list[Finding]:
    server, memory = await _info(redis, "server"), await _info(redis, "memory")
    version = str(server.get("redis_version", ""))
    name = f"Valkey {server['valkey_version']}" if "valkey_version" in server else f"Redis {version}"
    if version and tuple(map(int, version.split(".")[:2])) < _LEAST_VERSION:
        return [failure(CHECK, f"{_name(settings)} is Redis {version}", "upgrade it to Redis 7 or Valkey")]
    found = [ok(CHECK, f"{_name(settings)} answers: {name if version else 'it does not tell its version'}")]
    found += memory_findings(memory, queue_settings.max_memory_share, is_own=is_own)
    for look in (
        _permissions(redis),
        _durability(redis),
        _replicas(redis, settings),
        _clock(redis, where),
        _schema(redis),
    ):
        try:
            found += await look
        except (RedisError, OSError, ServingError) as error:
            cause = error.__cause__ or error
            found.append(failure(CHECK, f"{_name(settings)} refused a question, or broke off: {cause}", _ACL_FIX))
    return found


async def _info(redis: Redis, section: str) -> dict[str, Any]:
    try:
        reply = await execute(redis, "INFO", section)
    except ResponseError:
        return {}
    return dict(reply)


async def _permissions(redis: Redis) -> list[Finding]:
    """Whether this user may do what some role does, as the server itself tells: nothing is tried out."""
    runner = ScriptRunner(redis)
    missing: dict[Role, list[str]] = {}
    for role in (Role.GATEWAY, Role.WORKER):
        wanted = [*commands_of(role), *sample_keys(role)]
        try:
            refused = as_list(await runner.run("permitted", keys.meta(_PROBE_SHARD), *wanted))
        except ResponseError as error:
            return [failure("permissions", f"the user of the queue may not run its scripts: {error}", _ACL_FIX)]
        missing[role] = [one.decode() for one in refused]
    complete = [role.value for role, lacking in missing.items() if not lacking]
    if complete:
        return [ok("permissions", f"the user of the queue may do what a {' and a '.join(complete)} does")]
    role, lacking = min(missing.items(), key=lambda one: len(one[1]))
    more = f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
    what = f"the user of the queue lacks, of a {role.value}'s rights: {', '.join(lacking[:8])}{more}"
    return [failure("permissions", what, _ACL_FIX)]


async def _durability(redis: Redis) -> list[Finding]:
    durability = await describe_durability(redis)
    if durability.survives_process is False or durability.survives_host is False:
        return [warning("persistence", durability.summary(), _PERSISTENCE_FIX)]
    return [ok("persistence", durability.summary())]


def memory_findings(memory: dict[str, Any], max_share: float, *, is_own: bool) -> list[Finding]:
    """What INFO memory says of a server's bound and of what happens at it. `is_own`: it is that of `serve`."""
    if "maxmemory" not in memory:
        return []
    found = []
    limit, used = int(memory["maxmemory"]), int(memory.get("used_memory", 0))
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        found.append(
            failure(
                "queue memory",
                f"the server evicts keys when it is full ({policy}): accepted work would vanish",
                "on the server: maxmemory-policy noeviction",
            )
        )
    if not limit and is_own:
        found.append(ok("queue memory", "the server of `torchrelay serve` has no bound but this machine's memory"))
    elif not limit:
        found.append(
            warning(
                "queue memory",
                "the server has no maxmemory: the host ends it when memory is short",
                "on the server: set maxmemory, below what its host or container grants",
            )
        )
    elif used > max_share * limit:
        found.append(
            failure(
                "queue memory",
                f"{used / limit:.0%} of the server's maxmemory are used: above {max_share:.0%} no new work is accepted",
                "raise maxmemory, shorten TORCHRELAY_QUEUE_RETENTION_MS, or purge dead letters",
            )
        )
    else:
        found.append(ok("queue memory", f"{used / limit:.0%} of maxmemory are used"))
    return found


async def _replicas(redis: Redis, settings: RedisSettings) -> list[Finding]:
    if not settings.min_replicas:
        return []
    connected = int((await _info(redis, "replication")).get("connected_slaves", 0))
    what = f"{connected} replicas are connected, {settings.min_replicas} must confirm each new job"
    if connected < settings.min_replicas:
        return [failure("replicas", what, "bring replicas up, or lower TORCHRELAY_REDIS_MIN_REPLICAS")]
    return [ok("replicas", what)]


async def _clock(redis: Redis, where: Surroundings) -> list[Finding]:
    before = where.wall_clock()
    seconds, microseconds = await execute(redis, "TIME")
    skew = int(seconds) + int(microseconds) / 1e6 - (before + where.wall_clock()) / 2
    if abs(skew) <= _MAX_SKEW_S:
        return [ok("clock", "the queue's server and this machine agree on the time")]
    way = "ahead of" if skew > 0 else "behind"
    what = f"the clock of the queue's server is {abs(skew):.1f} s {way} this machine's"
    return [warning("clock", what, "synchronise both clocks (chrony, ntpd): keys and tokens expire by them")]


async def _schema(redis: Redis) -> list[Finding]:
    found: list[Finding] = []
    for card in await ModelRegistry(redis, retry=Retry(deadline_ms=2000)).list():
        stored = await execute(redis, "HGET", keys.meta(card.shard), "schema")
        if stored is not None and int(stored) != keys.SCHEMA_VERSION:
            found.append(
                failure(
                    "schema",
                    f"the queue of {card.name} is of schema {int(stored)}, this version speaks {keys.SCHEMA_VERSION}",
                    "run programs of one version on one server; point this one to a server of its own",
                )
            )
    return found
