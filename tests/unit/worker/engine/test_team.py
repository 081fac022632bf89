"""The team of threads that goes through a step's phases, with more threads than cores: they are held up everywhere."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

import pytest

from worker.engine.kernels.build import KernelBuildError, find_compiler

_HEADER: Final = Path(__file__).parents[4] / "worker" / "engine" / "kernels" / "team.h"
_STRESS: Final = Path(__file__).with_name("team_stress.cpp")
_NUM_THREADS: Final = str(2 * (os.cpu_count() or 1) + 1)
_GRANTED: Final = "seat_.compare_exchange_strong(state_, state_ | kWriting, std::memory_order_acq_rel)"
_CLAIMED: Final = "compare_exchange_weak(claimed, claimed + 1, std::memory_order_acq_rel)"
_LAST_PIECE: Final = "+ 1 < phase.num_pieces) return;"


def num_wrong(folder: Path, before: str = "", after: str = "") -> int:
    """Run the stress, with a piece of the header replaced; return how many sums are wrong, -1 if it does not end."""
    header = _HEADER.read_text()
    assert before in header
    (folder / "team.h").write_text(header.replace(before, after) if before else header)
    program = folder / "stress"
    try:
        compiler = find_compiler()
    except KernelBuildError as error:
        pytest.skip(str(error))
    command = [*compiler.command, "-std=c++17", "-O2", "-pthread", f"-I{folder}", str(_STRESS), "-o", str(program)]
    subprocess.run(command, check=True, timeout=120)
    try:
        done = subprocess.run([program, _NUM_THREADS], capture_output=True, text=True, check=True, timeout=60)
    except subprocess.TimeoutExpired:
        return -1
    return int(done.stdout)


def test_every_unit_is_written_once_and_after_the_phase_before(tmp_path: Path) -> None:
    assert num_wrong(tmp_path) == 0


def test_the_stress_finds_a_team_that_lets_every_thread_write(tmp_path: Path) -> None:
    assert num_wrong(tmp_path, _GRANTED, "true") != 0


def test_the_stress_finds_a_phase_that_ends_before_its_last_piece(tmp_path: Path) -> None:
    assert num_wrong(tmp_path, _LAST_PIECE, "+ 2 < phase.num_pieces) return;") != 0


def test_the_stress_finds_a_piece_that_two_threads_have(tmp_path: Path) -> None:
    assert num_wrong(tmp_path, _CLAIMED, _CLAIMED.replace("claimed, claimed + 1", "claimed, claimed")) != 0
