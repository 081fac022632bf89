"""Lines that can wait are written together, in their order, under their own time."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from common.late_log import LateLog
from common.logs import LogFormat, set_up_logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    written = io.StringIO()
    set_up_logs("INFO", LogFormat.JSON, written)
    yield written
    structlog.contextvars.clear_contextvars()
    root.handlers = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


async def written(stream: io.StringIO, count: int) -> list[dict[str, object]]:
    async with asyncio.timeout(10):
        while len(lines(stream)) < count:  # noqa: ASYNC110 - text in memory sets no event
            await asyncio.sleep(0.005)
    return lines(stream)


async def test_lines_wait_and_then_stand_in_order_under_the_time_at_which_they_were_noted(stream: io.StringIO) -> None:
    times = iter([1_700_000_000.5, 1_700_000_001.25])
    late, log = LateLog(0.05, wall_clock=lambda: next(times)), structlog.get_logger("ours")
    late.info(log, "first", number=1)
    late.info(log, "second")
    log.info("at once")
    assert [line["event"] for line in lines(stream)] == ["at once"]
    _, first, second = await written(stream, 3)
    assert first == {
        "event": "first",
        "number": 1,
        "level": "info",
        "timestamp": "2023-11-14T22:13:20.500000Z",
    }
    assert (second["event"], second["timestamp"]) == ("second", "2023-11-14T22:13:21.250000Z")


async def test_its_time_has_the_form_of_every_other_line_s(stream: io.StringIO) -> None:
    late, log = LateLog(0.0), structlog.get_logger("ours")
    late.info(log, "late")
    log.info("at once")
    at_once, noted = await written(stream, 2)
    assert len(str(noted["timestamp"])) == len(str(at_once["timestamp"]))
    assert str(noted["timestamp"]) <= str(at_once["timestamp"])


async def test_what_comes_after_a_round_is_written_in_the_next(stream: io.StringIO) -> None:
    late, log = LateLog(0.01), structlog.get_logger("ours")
    for count in (1, 2, 3):
        late.info(log, "line", count=count)
        assert [line["count"] for line in await written(stream, count)] == list(range(1, count + 1))


async def test_a_line_is_nobody_else_s_part(stream: io.StringIO) -> None:
    """Written beside the call that noted the first of them, they must not bear what that call was about."""
    late, log = LateLog(0.01), structlog.get_logger("ours")
    with structlog.contextvars.bound_contextvars(call="a call"):
        late.info(log, "of a call")
    late.info(log, "of none")
    assert all("call" not in line for line in await written(stream, 2))


def test_the_end_of_a_process_writes_what_waits_and_another_loop_begins_anew(stream: io.StringIO) -> None:
    late, log = LateLog(60.0), structlog.get_logger("ours")

    async def note(event: str) -> None:
        late.info(log, event)

    asyncio.run(note("left behind"))
    assert lines(stream) == []
    late.flush()
    assert [line["event"] for line in lines(stream)] == ["left behind"]
    quick = LateLog(0.0)

    async def note_and_wait() -> None:
        quick.info(log, "in another loop")
        await written(stream, 3)

    async def leave() -> None:
        quick.info(log, "left behind again")

    asyncio.run(leave())
    asyncio.run(note_and_wait())
    assert [line["event"] for line in lines(stream)][1:] == ["left behind again", "in another loop"]


async def test_a_level_holds_for_late_lines_too(stream: io.StringIO) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    late = LateLog(0.0)
    late.info(structlog.get_logger("ours"), "quiet")
    late.info(structlog.get_logger("ours"), "quiet too")
    late.flush()
    assert stream.getvalue() == ""
