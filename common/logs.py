"""Log set-up: events with fields, as JSON lines for machines or coloured lines for people, on stderr."""

from __future__ import annotations

import logging
import sys
from enum import StrEnum
from typing import Any, TextIO

import structlog


class LogFormat(StrEnum):
    AUTO = "auto"  # TEXT on a terminal, else JSON
    JSON = "json"
    TEXT = "text"


def set_up_logs(level: str = "INFO", log_format: LogFormat = LogFormat.AUTO, stream: TextIO | None = None) -> None:
    """Send structlog's events and the standard library's records (of other packages) to `stream`, in one form.

    To be called once, at the start of a process. Raises ValueError for an unknown level.
    """
    target = stream or sys.stderr
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"no such log level: {level}")
    if log_format is LogFormat.AUTO:
        log_format = LogFormat.TEXT if target.isatty() else LogFormat.JSON
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    if log_format is LogFormat.JSON:
        shared.append(structlog.processors.format_exc_info)
        renderer: Any = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=target.isatty())
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(number)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
