"""What every server process does first: read its settings, set logs up, and name variables that nothing reads."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Final, TypeVar

import structlog
from pydantic import ValidationError
from pydantic_settings import BaseSettings

from common.huge_pages import use_huge_pages
from common.logs import set_hooks, set_up_logs
from common.sealing import EncryptionSettings
from common.settings import (
    LogSettings,
    MetricsSettings,
    QueueSettings,
    RedisSettings,
    describe_errors,
    unknown_variables,
)
from common.telemetry.tracing import TracingSettings

_T = TypeVar("_T")

CANNOT_START: Final = 78  # EX_CONFIG of sysexits.h: starting again would end the same way

SHARED_SETTINGS: tuple[type[BaseSettings], ...] = (
    LogSettings,
    RedisSettings,
    QueueSettings,
    EncryptionSettings,
    MetricsSettings,
    TracingSettings,
)


def read_settings(read: Callable[[], _T], *own: type[BaseSettings]) -> _T:
    """Return what `read` makes of the environment, with logs set up; `own` are the role's settings classes.

    Ends the process with CANNOT_START and one line per fault where a setting is wrong. A variable that nothing reads is
    logged with the one that was probably meant.
    """
    try:
        log_settings = LogSettings()
        set_up_logs(log_settings.level, log_settings.format)
        set_hooks()
        if not log_settings.core_dumps:
            _leave_no_core()
        settings = read()
    except ValidationError as error:
        sys.stderr.write(describe_errors(error))
        raise SystemExit(CANNOT_START) from None
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(CANNOT_START) from None
    for variable in unknown_variables(os.environ, (*SHARED_SETTINGS, *own)):
        structlog.get_logger().warning("settings.unknown", variable=variable.name, did_you_mean=variable.nearest)
    return settings


def _leave_no_core() -> None:
    """A crash leaves no image of our memory, which holds what callers wrote."""
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))


def settle_heap() -> None:
    """Leave what was made so far out of garbage collection: a full one would stop a worker for a fifth of a second.

    Then move it into huge pages. To be called once, when a process is ready to serve.
    """
    gc.collect()
    gc.freeze()
    use_huge_pages()


def stop_at_signals(stop: asyncio.Event) -> None:
    """From now on SIGTERM and SIGINT set `stop`, of the running loop, and once it is closed do nothing.

    Not by the loop's own handlers: closing a loop puts the default ones back, and a second signal in the moment before
    `ignore_signals` would kill a process that has done all it was asked to.
    """
    loop = asyncio.get_running_loop()

    def handle(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(stop.set)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def ignore_signals() -> None:
    """From now on SIGTERM and SIGINT do nothing: all is done, and who asks again must not be told of a violent end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
