from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
import structlog
import torch

from common.errors import InvalidRequest
from common.logs import LogFormat, describe_exception, log_uncaught, set_hooks, set_up_logs


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_events_and_foreign_records_are_json_lines_of_one_form() -> None:
    stream = io.StringIO()
    set_up_logs("INFO", LogFormat.JSON, stream)
    structlog.get_logger("ours").info("job.finished", generation_id="m.x", ttft_ms=12)
    logging.getLogger("theirs").warning("careful: %s", 3)
    ours, theirs = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (ours["event"], ours["generation_id"], ours["ttft_ms"], ours["level"]) == ("job.finished", "m.x", 12, "info")
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("careful: 3", "warning", "theirs")
    assert set(ours) >= {"timestamp"} <= set(theirs)


def test_what_is_below_the_level_is_not_written() -> None:
    stream = io.StringIO()
    set_up_logs("warning", LogFormat.JSON, stream)
    structlog.get_logger().info("quiet")
    logging.getLogger("theirs").info("quiet")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("log_format", [LogFormat.JSON, LogFormat.TEXT])
@pytest.mark.parametrize("logger", ["ours", "theirs"])
def test_an_exception_is_named_and_located_without_its_text(log_format: LogFormat, logger: str) -> None:
    stream = io.StringIO()
    set_up_logs("DEBUG", log_format, stream)
    prompt = "what a caller wrote"
    try:
        json.loads(prompt)
    except ValueError as error:
        if logger == "ours":
            structlog.get_logger().exception("handler.failed", incident="i1")
            structlog.get_logger().error("handler.failed", exc_info=error)
        else:
            logging.getLogger("theirs").exception("failed")
    written = stream.getvalue()
    assert "JSONDecodeError" in written
    assert "test_logs.py" in written
    assert "caller" not in written.replace("test_an_exception", "")
    assert "Expecting" not in written


def test_our_own_errors_and_the_machine_s_keep_their_text() -> None:
    assert describe_exception(InvalidRequest("must be at least 1")) == "InvalidRequest: must be at least 1"
    assert describe_exception(OSError(28, "No space left")) == "OSError: [Errno 28] No space left"
    assert describe_exception(ValueError("what a caller wrote")) == "ValueError"
    with pytest.raises(RuntimeError) as inside:
        torch.zeros(1).backward()
    assert describe_exception(inside.value).startswith("RuntimeError: element 0 of tensors")


def test_what_ends_the_process_is_named_too() -> None:
    stream = io.StringIO()
    set_up_logs("INFO", LogFormat.JSON, stream)
    try:
        raise KeyError("what a caller wrote")
    except KeyError as error:
        log_uncaught(KeyError, error, error.__traceback__)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["error"]) == ("process.crashed", "KeyError")
    assert "wrote" not in stream.getvalue()


CANARY = "what a caller wrote"


@pytest.fixture
def hooks() -> Iterator[None]:
    before = sys.excepthook, sys.unraisablehook, threading.excepthook
    set_hooks()
    yield
    sys.excepthook, sys.unraisablehook, threading.excepthook = before


def fail() -> None:
    raise ValueError(CANARY)


async def leave_a_task() -> None:
    async def failing() -> None:
        fail()

    task = asyncio.create_task(failing(), name=CANARY)
    await asyncio.wait([task])
    del task
    gc.collect()


async def fail_in_a_callback() -> None:
    loop = asyncio.get_running_loop()
    loop.call_soon(lambda _: fail(), CANARY)
    loop.call_exception_handler({"message": f"Unhandled (({CANARY}))", "exception": ValueError(CANARY)})
    await asyncio.sleep(0)


async def leave_a_generator() -> None:
    async def failing() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            fail()

    generator = failing()
    await anext(generator)
    await asyncio.get_running_loop().shutdown_asyncgens()


@pytest.mark.parametrize("log_format", [LogFormat.JSON, LogFormat.TEXT])
@pytest.mark.parametrize("program", [leave_a_task, fail_in_a_callback, leave_a_generator])
def test_what_asyncio_says_of_an_exception_nobody_awaits_holds_no_text(
    program: Callable[[], Coroutine[Any, Any, None]], log_format: LogFormat
) -> None:
    stream = io.StringIO()
    set_up_logs("DEBUG", log_format, stream)
    asyncio.run(program())
    written = stream.getvalue()
    assert CANARY not in written
    assert "ValueError" in written
    assert "test_logs.py" in written or program is fail_in_a_callback


def test_what_asyncio_says_without_an_object_is_kept() -> None:
    stream = io.StringIO()
    set_up_logs("DEBUG", LogFormat.JSON, stream)
    logging.getLogger("asyncio").error("Task was destroyed but it is pending!\ntask: <Task name=%r>", CANARY)
    logging.getLogger("theirs").error("a list <1> (2)")
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (first["event"], second["event"]) == ("Task was destroyed but it is pending!", "a list <1> (2)")


@pytest.mark.usefixtures("hooks")
def test_what_ends_a_thread_is_named_without_its_text(capfd: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    set_up_logs("INFO", LogFormat.JSON, stream)
    for target in (fail, sys.exit):
        thread = threading.Thread(target=target, name="the-thread")
        thread.start()
        thread.join()
    line = json.loads(stream.getvalue())
    assert (line["event"], line["error"], line["thread"]) == ("thread.crashed", "ValueError", "the-thread")
    assert line["frames"][-1].startswith("test_logs.py")
    assert CANARY not in stream.getvalue() + "".join(capfd.readouterr())


@pytest.mark.usefixtures("hooks")
def test_what_a_finalizer_raises_is_named_without_its_text(capfd: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    set_up_logs("INFO", LogFormat.JSON, stream)

    class Failing:
        def __del__(self) -> None:
            fail()

    Failing()
    gc.collect()
    line = json.loads(stream.getvalue())
    assert (line["event"], line["error"]) == ("exception.unraisable", "ValueError")
    assert CANARY not in stream.getvalue() + "".join(capfd.readouterr())


def test_text_is_for_people_and_json_for_a_pipe() -> None:
    stream = io.StringIO()
    set_up_logs("INFO", LogFormat.TEXT, stream)
    structlog.get_logger().info("server.started", port=1)
    assert "server.started" in stream.getvalue()
    assert not stream.getvalue().startswith("{")
    piped = io.StringIO()
    set_up_logs("INFO", LogFormat.AUTO, piped)
    structlog.get_logger().info("server.started")
    assert json.loads(piped.getvalue())["event"] == "server.started"


def test_what_json_has_no_form_for_is_shown_as_python_writes_it() -> None:
    stream = io.StringIO()
    set_up_logs("INFO", LogFormat.JSON, stream)
    structlog.get_logger().info("odd", a_set=frozenset({1}), a_lone_surrogate="\udc80", a_large_number=1 << 70)
    line = json.loads(stream.getvalue())
    assert (line["a_set"], line["a_lone_surrogate"], line["a_large_number"]) == ("frozenset({1})", "\udc80", 1 << 70)


@pytest.mark.parametrize("log_format", [LogFormat.JSON, LogFormat.TEXT])
def test_a_stream_that_is_closed_and_a_field_that_cannot_be_shown_harm_nobody(log_format: LogFormat) -> None:
    class Broken:
        def __repr__(self) -> str:
            raise KeyError("what a caller wrote")

    stream = io.StringIO()
    set_up_logs("INFO", log_format, stream)
    log = structlog.get_logger("ours")
    log.info("odd", broken=Broken())
    written = stream.getvalue()
    assert all(part in written for part in ("odd", "info", "a field cannot be shown"))
    assert "wrote" not in written
    stream.close()
    log.info("too late")


def test_loggers_that_were_used_before_follow_when_logs_are_set_up_again() -> None:
    first, second = io.StringIO(), io.StringIO()
    set_up_logs("INFO", LogFormat.JSON, first)
    log = structlog.get_logger("ours")
    log.info("one")
    set_up_logs("INFO", LogFormat.JSON, second)
    log.info("two")
    assert [json.loads(stream.getvalue())["event"] for stream in (first, second)] == ["one", "two"]


def test_a_line_may_be_written_in_the_midst_of_another() -> None:
    """By a finalizer or a signal's handler, in the same thread."""

    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            if "outer" in text:
                structlog.get_logger().info("inner")
            return super().write(text)

    stream = Interrupted()
    set_up_logs("INFO", LogFormat.JSON, stream)
    writing = threading.Thread(target=lambda: structlog.get_logger().info("outer"), daemon=True)
    writing.start()
    writing.join(10)
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["inner", "outer"]


def test_lines_of_many_threads_and_of_other_libraries_do_not_mix() -> None:
    """The stream takes a line in two parts, which nothing may come between."""

    class InParts(io.StringIO):
        def write(self, text: str) -> int:
            written = super().write(text[:10])
            time.sleep(0.001)
            return written + super().write(text[10:])

    stream = InParts()
    set_up_logs("INFO", LogFormat.JSON, stream)

    def write(number: int) -> None:
        for index in range(10):
            structlog.get_logger().info("ours", number=number, index=index)
            logging.getLogger("theirs").warning("theirs")

    threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = [json.loads(line)["event"] for line in stream.getvalue().splitlines()]
    assert sorted(events) == ["ours"] * 40 + ["theirs"] * 40


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="no such log level"):
        set_up_logs("LOUD")
