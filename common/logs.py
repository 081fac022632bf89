"""Log set-up: events with fields, as JSON lines for machines or coloured lines for people, on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable, MutableMapping
from enum import StrEnum
from typing import Any, Final, TextIO, cast

import structlog

from common.log_sink import LineSink, writer_of

_OWN_PACKAGES: Final = ("common", "gateway", "worker", "torchrelay")
_TENSOR_LIBRARIES: Final = ("torch", "triton")
_AFTER_MESSAGE: Final = re.compile(r"[<(\n]")
_NUMBERS: Final = {name.lower(): number for name, number in logging.getLevelNamesMapping().items()}
_ENCODE: Final = json.JSONEncoder(default=repr).encode


class LogFormat(StrEnum):
    AUTO = "auto"  # TEXT on a terminal, else JSON
    JSON = "json"
    TEXT = "text"


class _Handler(logging.Handler):
    """Writes lines to a descriptor, and never waits for room there, or to text in memory. Never raises."""

    def __init__(self, target: TextIO) -> None:
        super().__init__()
        self._write: Callable[[str], object]
        try:
            self._write = LineSink(writer_of(target.fileno())).write_line
        except (AttributeError, OSError, ValueError):  # text in memory
            self._write = lambda line: target.write(f"{line}\n")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(self.format(record))
        except Exception:  # noqa: BLE001 - as in logging's own handlers: a record that cannot be shown harms nobody
            self.handleError(record)

    def write_line(self, line: str) -> None:
        """Write what is finished. In the midst of another line too: a finalizer that fails there has one of its own."""
        with cast("threading.RLock", self.lock), contextlib.suppress(Exception):
            self._write(line)


class _Logger:
    """What structlog hands a finished line to. Its level is that of the module's logger in the standard library."""

    def __init__(self, of_module: logging.Logger) -> None:
        self.effective_level = of_module.getEffectiveLevel
        self.debug = self.info = self.warning = self.error = self.critical = _write_line


def _write_line(line: str) -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Handler):
            handler.write_line(line)


def _filter_by_level(logger: _Logger, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if _NUMBERS[method] < logger.effective_level():
        raise structlog.DropEvent
    return event


def name_exception(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Say of an exception what it was and where, never its text or local variables: they may hold what a caller wrote.

    Of our own exceptions the text is kept, since it is written here (see `common.errors`).
    """
    found = event.pop("exc_info", None)
    if found is True:
        found = sys.exc_info()
    error = found[1] if isinstance(found, tuple) else found
    if isinstance(error, BaseException):
        event.setdefault("error", describe_exception(error))
        event["frames"] = frames_of(error)
    return event


def cut_foreign_message(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Keep of asyncio's own messages what happened, not the objects: it writes exceptions and tasks out, text and all.

    `Task exception was never retrieved\\nfuture: <Task ... exception=ValueError('what a caller wrote')>` is one.
    """
    if str(event.get("logger", "")).partition(".")[0] == "asyncio":
        event["event"] = _AFTER_MESSAGE.split(str(event.get("event", "")), maxsplit=1)[0].strip()
    return event


def describe_exception(error: BaseException) -> str:
    """The name of an exception, with its text if that can only come from us, the machine or the tensor library."""
    trace = traceback.extract_tb(error.__traceback__, limit=-1)
    is_of_tensors = bool(trace) and any(f"/{name}/" in trace[-1].filename for name in _TENSOR_LIBRARIES)
    module = type(error).__module__.partition(".")[0]
    if module in (*_OWN_PACKAGES, *_TENSOR_LIBRARIES) or isinstance(error, OSError | MemoryError) or is_of_tensors:
        return f"{type(error).__name__}: {error}"
    return type(error).__name__


def frames_of(error: BaseException) -> list[str]:
    """Where an exception came through, outermost first."""
    return [
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]


def log_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """As sys.excepthook: what ends the process is named like everything else."""
    if isinstance(error, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    structlog.get_logger().critical("process.crashed", exc_info=error.with_traceback(trace))


def log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """As threading.excepthook: what ends a thread is named like everything else."""
    if failure.exc_type is SystemExit:
        return
    name = failure.thread.name if failure.thread is not None else ""
    structlog.get_logger().error("thread.crashed", thread=name, exc_info=_raised(failure))


def log_unraisable(failure: sys.UnraisableHookArgs) -> None:
    """As sys.unraisablehook: what is raised where nothing can be, such as in a finalizer.

    The object that it happened in is not shown, since it may hold what a caller wrote.
    """
    kind = type(failure.object).__qualname__
    structlog.get_logger().error("exception.unraisable", object=kind, exc_info=_raised(failure))


def _raised(failure: threading.ExceptHookArgs | sys.UnraisableHookArgs) -> BaseException:
    error = failure.exc_value or failure.exc_type()
    return error.with_traceback(failure.exc_traceback)


def set_hooks() -> None:
    """Name every exception that nobody catches in the log, instead of printing it with its text."""
    sys.excepthook = log_uncaught
    sys.unraisablehook = log_unraisable
    threading.excepthook = log_thread_failure


def _render_json(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    return _ENCODE(event)


def _harmless(render: Callable[[Any, str, MutableMapping[str, Any]], str]) -> Callable[..., str]:
    """As in logging's own handlers: a line that cannot be shown harms nobody, whatever its fields' own code raises."""

    def show(logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
        try:
            return render(logger, method, dict(event))
        except Exception:  # noqa: BLE001 - see above
            shown = {name: event[name] for name in ("event", "level", "timestamp") if isinstance(event.get(name), str)}
            return render(logger, method, {**shown, "error": "a field cannot be shown"})

    return show


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
        structlog.processors.MaybeTimeStamper(fmt="iso", utc=True),  # see common/late_log.py
        structlog.processors.StackInfoRenderer(),
        name_exception,
    ]
    renderer: Any = _render_json
    if log_format is LogFormat.TEXT:
        renderer = structlog.dev.ConsoleRenderer(colors=target.isatty())
    handler = _Handler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, cut_foreign_message, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(number)
    module_logger = structlog.stdlib.LoggerFactory(ignore_frame_names=[__name__])
    structlog.configure(
        # By the level of the module's logger, which may be another one later (see common/telemetry/log_levels.py). What
        # is written need not pass through it: a record of the standard library takes three times as long.
        processors=[_filter_by_level, *shared, _harmless(renderer)],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=lambda *args: _Logger(module_logger(*args)),
        cache_logger_on_first_use=True,
    )
