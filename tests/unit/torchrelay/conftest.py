from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.torchrelay.toy import Toy, serving


@pytest.fixture(scope="session")
def served_toy() -> Iterator[Toy]:
    with serving() as toy:
        yield toy


@pytest.fixture
def toy(served_toy: Toy) -> Toy:
    served_toy.reset()
    return served_toy
