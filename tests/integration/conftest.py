"""Gateways and workers of these tests start in a second; those that `torchrelay serve` and shells start, as ever."""

from __future__ import annotations

import pytest

from tests.builders_system import start_zygotes


@pytest.fixture(autouse=True, scope="session")
def _zygotes(tmp_path_factory: pytest.TempPathFactory) -> None:
    start_zygotes(tmp_path_factory.mktemp("zygotes"))
