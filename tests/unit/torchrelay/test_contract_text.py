"""The contract is read as it stands: its comments keep to the width of the code, and to what the code does."""

from __future__ import annotations

from pathlib import Path

import torchrelay
from common.structured import MAX_BYTES
from gateway.conversation import MAX_SCHEMA_BYTES
from worker.structured import MAX_NUMBER_CHARS

ROOT = Path(next(iter(torchrelay.__path__)))
WIDTH = 120
SOURCES = sorted([*ROOT.rglob("*.proto"), *(path for path in ROOT.rglob("*.py") if not path.stem.count("_pb2"))])


def test_no_line_is_longer_than_the_code_s() -> None:
    assert len(SOURCES) > 20
    for path in SOURCES:
        assert [line for line in path.read_text().splitlines() if len(line) > WIDTH] == [], path


def test_limits_in_comments_are_those_in_force() -> None:
    text = " ".join((ROOT / "v1" / "generation.proto").read_text().replace("//", " ").split())
    assert f"at most {MAX_NUMBER_CHARS} characters" in text
    assert MAX_SCHEMA_BYTES == MAX_BYTES == 64 << 10
    assert "At most 64 KiB, and as much for all tools together" in text
