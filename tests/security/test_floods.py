"""HTTP/2 abused: whatever one connection does, others are served, and memory stays bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system
from tests.security.attacks import ATTACKS
from tests.security.flood import suffer

FRAMES = 1000
MOST_MB = 120


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    with running_system(tmp_path_factory.mktemp("system")) as system:
        system.add_gateway()
        system.add_worker(folder, "tiny")
        asyncio.run(system.ready("tiny"))
        yield system


@pytest.mark.parametrize("name", ATTACKS)
async def test_a_flood_on_one_connection_fails_no_call_on_another(name: str, system: System) -> None:
    damage = await suffer(system, name, FRAMES)
    assert damage.failed_probes == 0
    assert damage.serves_afterwards
    assert damage.rss_growth_mb < MOST_MB
