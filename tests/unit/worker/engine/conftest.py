"""Models for the engine's tests; and the CPU kernels of all instruction sets, compiled while other tests run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders_models import write_tiny_model

ROOT = Path(__file__).parents[4]
BUILD = """
import os
from worker.engine.kernels import build as kernels

os.nice(19)
for level in kernels.supported_levels():
    kernels.build(level)
"""
BUILDING = pytest.StashKey[subprocess.Popen[bytes]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """A test whose library is not ready waits for it as any process does that finds another building."""
    wants_levels = any("level" in item.callspec.params for item in session.items if hasattr(item, "callspec"))
    if wants_levels and not session.config.option.collectonly:
        # If it fails, so does the test that builds for itself then, and says why.
        session.config.stash[BUILDING] = subprocess.Popen(
            [sys.executable, "-c", BUILD],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    building = session.config.stash.get(BUILDING, None)
    if building is not None:
        building.wait()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a model, not to be changed."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model_dir(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
