"""Levels of logs, set while processes run: stored beside the registry, read by every gateway and worker.

Each is set for a time, so that nobody has to remember to take it back.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import structlog

from common import keys
from common.errors import InvalidRequest, ServingError
from common.redis import Redis, Retry, execute

log = structlog.get_logger()

LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR")
MAX_LEVELS: Final = 100  # at a time
_POLL_S: Final = 2.0
_MODULE: Final = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_MAX_MODULE: Final = 100


class ModuleLevel(NamedTuple):
    """The level of a module and of those below it, until a time in ms since the epoch."""

    module: str
    level: str
    until_ms: int


class LogLevels:
    """Levels as stored. Methods raise the errors of `Retry` besides what they name."""

    def __init__(
        self,
        redis: Redis,
        *,
        retry: Retry | None = None,
        wall_clock_ms: Callable[[], float] = lambda: time.time() * 1000,
    ) -> None:
        self._redis = redis
        self._retry = retry or Retry()
        self._now_ms = wall_clock_ms

    async def _execute(self, *command: str | bytes | int) -> Any:
        return await self._retry.call(lambda: execute(self._redis, *command))

    async def current(self) -> list[ModuleLevel]:
        """Return the levels that hold now, by module."""
        return [level for level in await self._stored() if level.until_ms > self._now_ms()]

    async def _stored(self) -> list[ModuleLevel]:
        stored = await self._execute("HGETALL", keys.LOG_LEVELS)
        return [found for name, value in sorted(stored.items()) if (found := _parse(name, value)) is not None]

    async def set(self, module: str, level: str, ttl_ms: int) -> ModuleLevel:
        """Set a module's level for a time. Raises InvalidRequest for what is no module, and for too many."""
        check_module(module)
        live = set()
        for old in await self._stored():
            if old.until_ms > self._now_ms():
                live.add(old.module)
            else:
                await self._execute("HDEL", keys.LOG_LEVELS, old.module)
        if len(live | {module}) > MAX_LEVELS:
            raise InvalidRequest("too many modules have a level of their own", field="module", limit=MAX_LEVELS)
        made = ModuleLevel(module, level, int(self._now_ms()) + ttl_ms)
        await self._execute("HSET", keys.LOG_LEVELS, module, f"{level} {made.until_ms}")
        return made

    async def delete(self, module: str) -> None:
        """Take a module's level back, if it has one. Raises InvalidRequest for what is no module."""
        check_module(module)
        await self._execute("HDEL", keys.LOG_LEVELS, module)


def check_module(module: str) -> None:
    """Raise InvalidRequest for what cannot be a module's name."""
    if len(module) > _MAX_MODULE or not _MODULE.fullmatch(module):
        raise InvalidRequest(
            "a module is names of letters, digits and '_' with '.' between them, such as worker.agent",
            field="module",
            limit=_MAX_MODULE,
        )


def _parse(name: bytes, value: bytes) -> ModuleLevel | None:
    """None for what a later version may have written."""
    level, _, until = value.decode(errors="replace").partition(" ")
    return ModuleLevel(name.decode(), level, int(until)) if level in LEVELS and until.isdecimal() else None


class LevelFollower:
    """Keeps this process's loggers at the levels that are stored."""

    def __init__(self, levels: LogLevels) -> None:
        self._levels = levels
        self._applied: dict[str, str] = {}

    async def run(self) -> None:
        """Run until cancelled. While the server is away, what was applied stays, beyond its time if need be."""
        while True:
            try:
                self.apply({level.module: level.level for level in await self._levels.current()})
            except ServingError as error:
                log.debug("log_levels.unavailable", reason=error.reason)
            await asyncio.sleep(_POLL_S)

    def apply(self, wanted: Mapping[str, str]) -> None:
        """Set these levels, and take back those of before that are not among them."""
        for module in self._applied.keys() - wanted.keys():
            logging.getLogger(module).setLevel(logging.NOTSET)
            log.info("log_level.ended", module=module)
        for module, level in wanted.items():
            if self._applied.get(module) != level:
                logging.getLogger(module).setLevel(level)
                log.info("log_level.set", module=module, to=level)
        self._applied = dict(wanted)
