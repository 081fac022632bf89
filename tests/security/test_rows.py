"""Every row of the table of bad inputs is shown by a test, here or elsewhere; `make security` runs those."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.security.rows import ROWS

TESTS = Path(__file__).parent.parent


def marked_rows() -> Iterator[tuple[int, str]]:
    """Row numbers and the tests that name them, found in the sources: nothing need be imported for it."""
    for path in sorted(TESTS.rglob("test_*.py")):
        source = path.read_text()
        if "mark.row(" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for decorator in node.decorator_list:
                    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.row":
                        for argument in decorator.args:
                            yield ast.literal_eval(argument), f"{path.relative_to(TESTS.parent)}::{node.name}"


def test_there_are_sixty_rows_and_each_is_shown() -> None:
    assert [row.number for row in ROWS] == list(range(1, 61))
    shown = {number for number, _ in marked_rows()}
    assert shown == {row.number for row in ROWS}


def test_the_table_that_is_written_down_is_this_one() -> None:
    text = (Path(__file__).parent / "README.md").read_text()
    for row in ROWS:
        assert f"| {row.number} | {row.sent} | {row.status} | {row.reason} |" in text
