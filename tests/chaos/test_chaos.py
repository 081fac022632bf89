"""A short run of what `make chaos` does for half an hour, and of one mutant that it must see.

As processes of their own: they start others all the time, which a process full of threads should not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.chaos import shim

pytestmark = pytest.mark.skipif(shim.compiler() is None, reason="needs a C compiler")


def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run a program of the harness; return its status, its last line's figures, and all that it said."""
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=400, check=False)
    said = done.stdout + done.stderr[-5000:]
    lines = done.stdout.splitlines()
    assert lines, said
    return done.returncode, json.loads(lines[-1]), said


@pytest.mark.timeout(500)
def test_nothing_is_lost_whatever_is_done_to_the_system() -> None:
    status, figures, said = run(
        "tests.chaos.run", "--seed", "4", "--duration", "20", "--interval", "0.9", "--prompts", "6", "--callers", "16"
    )
    assert status == 0, said
    assert figures["violations"] == 0
    assert figures["kinds"] >= 12
    assert figures["faults"] >= 15
    assert figures["accepted"] >= 30
    assert figures["in_flight_on_what_was_hit"] >= 10


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_broken_program_is_seen() -> None:
    status, figures, said = run("tests.chaos.run_mutants", "takeover_from_the_start")
    assert status == 0, said
    assert figures == {"target": "chaos-mutants", "mutants": 1, "caught": 1, "missed": []}
