from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from common.logs import LogFormat, set_up_logs


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


def test_an_exception_is_part_of_its_line() -> None:
    stream = io.StringIO()
    set_up_logs("INFO", LogFormat.JSON, stream)
    try:
        raise ValueError("a bug")
    except ValueError:
        structlog.get_logger().exception("handler.failed", incident="i1")
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: a bug" in json.loads(line)["exception"]


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


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="no such log level"):
        set_up_logs("LOUD")
