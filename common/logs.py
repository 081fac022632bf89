"""Log set-up: events with fields, as JSON lines for machines or coloured lines for people, on stderr."""

from __future__ import annotations

import logging
import sys
from enum import StrEnum
from typing import Any, TextIO

import structlog

from common.log_sink import LineSink, writer_of


class LogFormat(StrEnum):
    AUTO = "auto"  # TEXT on a terminal, else JSON
    JSON = "json"
    TEXT = "text"


class _SinkHandler(logging.Handler):
    """Writes to a stream's descriptor, and never waits for room there."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._sink = LineSink(writer_of(stream.fileno()))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._sink.write_line(self.format(record))
        except Exception:  # noqa: BLE001 - as in logging's own handlers: a record that cannot be shown harms nobody
            self.handleError(record)


def _handler(target: TextIO) -> logging.Handler:
    try:
        target.fileno()
    except (AttributeError, OSError, ValueError):  # text in memory
        return logging.StreamHandler(target)
    return _SinkHandler(target)


def set_up_logs(level: str = "INFO", log_format: LogFormat = LogFormat.AUTO, stream: TextIO | None = None) -> None:
    """Send structlog's events and the standard library's records (of other packages) to `stream`, in one form.

    Nothing waits for whoever reads standard error: a line that it cannot take now is dropped. To be called once, at the
    start of a process. Raises ValueError for an unknown level.
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
    handler = _handler(target)
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
