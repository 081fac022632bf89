"""Levels of modules, applied to a process and taken back."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from common.errors import InvalidRequest
from common.logs import LogFormat, set_up_logs
from common.redis import connect
from common.settings import RedisSettings
from common.telemetry.log_levels import LevelFollower, LogLevels, check_module


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    for name in ("ours", "ours.deep", "theirs"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    structlog.reset_defaults()


@pytest.fixture
def follower() -> LevelFollower:
    return LevelFollower(LogLevels(connect(RedisSettings())))  # asked by nobody here


def events(stream: io.StringIO) -> list[str]:
    found = [json.loads(line)["event"] for line in stream.getvalue().splitlines()]
    return [event for event in found if not event.startswith("log_level.")]


def test_a_module_and_those_below_it_follow_and_others_do_not(follower: LevelFollower) -> None:
    stream = io.StringIO()
    set_up_logs("INFO", LogFormat.JSON, stream)
    deep, other = structlog.get_logger("ours.deep"), structlog.get_logger("theirs")
    deep.debug("before")
    follower.apply({"ours": "DEBUG", "theirs": "ERROR"})
    deep.debug("while")
    other.warning("quiet")
    other.error("loud")
    follower.apply({})
    deep.debug("after")
    other.warning("again")
    assert events(stream) == ["while", "loud", "again"]


def test_the_nearest_level_holds(follower: LevelFollower) -> None:
    stream = io.StringIO()
    set_up_logs("INFO", LogFormat.JSON, stream)
    follower.apply({"ours": "DEBUG", "ours.deep": "WARNING"})
    structlog.get_logger("ours.deep").info("deep")
    structlog.get_logger("ours").debug("shallow")
    logging.getLogger("ours.deep.library").warning("library")
    assert events(stream) == ["shallow", "library"]


def test_changes_are_logged_once(follower: LevelFollower) -> None:
    stream = io.StringIO()
    set_up_logs("INFO", LogFormat.JSON, stream)
    for _ in range(3):
        follower.apply({"ours": "DEBUG"})
    follower.apply({})
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["event"], line["module"]) for line in lines] == [
        ("log_level.set", "ours"),
        ("log_level.ended", "ours"),
    ]


@pytest.mark.parametrize("name", ["", ".", "worker.", "a b", "worker/agent", "x" * 101])
def test_what_is_no_module_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_module(name)
    assert [violation.field for violation in caught.value.violations] == ["module"]
