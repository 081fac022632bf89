"""The fault table names what exists: every row, every kind of fault, every test."""

from __future__ import annotations

import re
from pathlib import Path

from tests.chaos.faults import FAULTS

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| (\d+) \| (.+?) \| (.+) \|$", Path(__file__).with_name("README.md").read_text(), re.MULTILINE)


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_all_47_rows_are_there_and_show_something() -> None:
    assert [number for number, _, _ in ROWS] == [str(number) for number in range(1, 48)]
    assert [number for number, _, cell in ROWS if not named(cell)] == []


def test_every_name_is_that_of_a_fault_a_target_or_a_test() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for number, _, cell in ROWS:
        for name in named(cell):
            if name.startswith("make "):
                assert f"\n{name.removeprefix('make ')}:" in makefile, f"row {number}: {name}"
            elif "::" in name:
                path, _, test = name.partition("::")
                assert f"def {test}(" in (ROOT / path).read_text(), f"row {number}: {name}"
            else:
                assert name in FAULTS, f"row {number}: {name}"


def test_every_kind_of_fault_stands_in_a_row() -> None:
    known = {name for _, _, cell in ROWS for name in named(cell)}
    assert set(FAULTS) - known == {"reset-connections-to-server"}  # a part of rows 17 and 23
