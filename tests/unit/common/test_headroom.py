"""What a server that tells little about its memory is taken for."""

from __future__ import annotations

from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from common.errors import BackendFull
from common.headroom import Headroom
from common.redis import Redis

FULL = {"used_memory": 95, "maxmemory": 100}


class OneAnswer:
    """A server that knows INFO alone."""

    def __init__(self, info: dict[str, Any]) -> None:
        self.info = info

    async def execute_command(self, *command: str) -> dict[str, Any]:
        assert command == ("INFO", "memory")
        return self.info


@pytest.mark.parametrize("thin", [{}, {"maxmemory": 100}, {"used_memory": 95}, {"role": "master"}])
async def test_a_server_that_leaves_fields_out_has_no_bound_that_we_know_and_is_asked_again(
    thin: dict[str, Any],
) -> None:
    server = OneAnswer(FULL)
    headroom = Headroom(cast(Redis, server), 0.8)
    await headroom.measure()
    with pytest.raises(BackendFull):
        headroom.check()

    server.info = thin
    with capture_logs() as logs:
        for _ in range(3):
            await headroom.measure()
    headroom.check()
    assert headroom.used_share == 0.0
    assert [entry["event"] for entry in logs] == ["queue.memory_unknown"]

    server.info = FULL
    await headroom.measure()
    assert headroom.used_share == 0.95
    with pytest.raises(BackendFull):
        headroom.check()


async def test_what_the_server_does_not_count_itself_is_not_counted() -> None:
    headroom = Headroom(cast(Redis, OneAnswer({**FULL, "mem_not_counted_for_evict": 20})), 0.8)
    await headroom.measure()
    assert headroom.used_share == 0.75
