"""One running system for every foreign caller."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.builders_compat import MODEL, caller_env, install_node_modules
from tests.builders_system import System, running_system


@pytest.fixture(scope="package")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A gateway with reflection and a worker that serves the demo model."""
    with running_system(tmp_path_factory.mktemp("compat")) as system:
        system.add_gateway(TORCHRELAY_GATEWAY_REFLECTION="true")
        system.add_worker("demo", MODEL)
        asyncio.run(system.ready(MODEL))
        yield system


@pytest.fixture(scope="package")
def env(system: System) -> dict[str, str]:
    """What a caller of that system has in its environment."""
    install_node_modules()
    return caller_env(system, system.gateways[0])
