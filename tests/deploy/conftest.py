"""Tests of what the chart renders need Helm, which `make deploy-check` brings; the others run with all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.deploy.charts import Helm, Rendered, tools_dir, value_sets

if tools_dir() is None:
    collect_ignore_glob = ["test_rendered_*.py"]

Render = Callable[..., Rendered]


@pytest.fixture(scope="session")
def helm() -> Iterator[Helm]:
    tools = tools_dir()
    assert tools is not None
    with Helm(tools) as helm:
        yield helm


@pytest.fixture(scope="session")
def render(helm: Helm) -> Render:
    """Renders the chart with the values given as keywords."""

    def render(**values: Any) -> Rendered:
        return helm.render(values)

    return render


@pytest.fixture(scope="session")
def examples(helm: Helm) -> dict[str, Rendered]:
    """Every example, rendered."""
    return {name: helm.render(values) for name, values in value_sets().items()}
