"""Compiling the CPU kernels: once, safely beside others, and not at all without a compiler."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.kernels import build as kernels

COUNTING_COMPILER = """#!/bin/sh
case "$1" in --version) exec g++ --version;; esac
echo compiled >> "{log}"
exec g++ "$@" -O0
"""


@pytest.fixture
def compile_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler in CXX that writes a line per compilation, and is quick because it optimises nothing."""
    log, script = tmp_path / "log", tmp_path / "compiler"
    log.touch()
    script.write_text(COUNTING_COMPILER.format(log=log))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    return log


def build_generic(cache: Path) -> str:
    return str(kernels.build("generic", cache))


def test_processes_that_build_at_once_compile_once_and_leave_nothing_behind(tmp_path: Path, compile_log: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        paths = set(pool.map(build_generic, [tmp_path / "cache"] * 3))
    assert len(paths) == 1
    assert compile_log.read_text().splitlines() == ["compiled"]
    left = {path.suffix for path in (tmp_path / "cache" / "kernels").iterdir()}
    assert left <= {".so", ".lock"}
    assert CpuAttention("generic", tmp_path / "cache").name == "cpu_ext"
    assert compile_log.read_text().splitlines() == ["compiled"]


def test_another_source_compiler_or_level_gets_a_library_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = kernels.Compiler(("g++",), "g++ 12")
    paths = {kernels.library_path(level, compiler, tmp_path) for level in kernels.LEVEL_FLAGS}
    paths.add(kernels.library_path("generic", kernels.Compiler(("g++",), "g++ 13"), tmp_path))
    changed = tmp_path / "sources"
    changed.mkdir()
    for source in Path(kernels.__file__).parent.glob("*.[ch]*"):
        (changed / source.name).write_bytes(source.read_bytes() + b"\n")
    monkeypatch.setattr(kernels, "_HERE", changed)
    paths.add(kernels.library_path("generic", compiler, tmp_path))
    assert len(paths) == len(kernels.LEVEL_FLAGS) + 2


def test_a_change_of_any_one_file_makes_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = kernels.Compiler(("g++",), "g++ 12")
    sources = tmp_path / "sources"
    sources.mkdir()
    files = sorted(Path(kernels.__file__).parent.glob("*.[ch]*"))
    for file in files:
        (sources / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(kernels, "_HERE", sources)
    paths = {kernels.library_path("generic", compiler, tmp_path)}
    for file in files:
        (sources / file.name).write_bytes(file.read_bytes() + b"\n")
        paths.add(kernels.library_path("generic", compiler, tmp_path))
    assert len(paths) == len(files) + 1


def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(kernels.KernelBuildError, match=r"no C\+\+ compiler found.*apt install g\+\+"):
        CpuAttention(cache_root=tmp_path)


def test_the_command_succeeds_without_a_compiler_and_says_what_is_lost(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "worker.engine.kernels.build"],
        env={**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "attention will use torch and be slower" in result.stderr
    assert result.stdout == ""


def test_a_failing_compiler_is_quoted_and_leaves_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "broken"
    script.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo broken 1.0;; *) echo "no such header" >&2; exit 1;; esac\n'
    )
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(kernels.KernelBuildError, match="no such header"):
        kernels.build("generic", tmp_path)
    assert not list((tmp_path / "kernels").glob("*.so"))


def test_a_damaged_library_is_named_in_the_error(tmp_path: Path) -> None:
    kernels.library_path("generic", kernels.find_compiler(), tmp_path).write_bytes(b"not a library")
    with pytest.raises(kernels.KernelBuildError, match=r"cannot be loaded.*delete it"):
        CpuAttention("generic", tmp_path)


def test_a_prebuilt_library_is_found_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(kernels, "LEVEL_FLAGS", {"generic": ()})  # one compilation is enough to show it
    monkeypatch.setattr(kernels, "_FLAGS", (*kernels._FLAGS, "-O0"))
    (built,) = kernels.prebuild()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert kernels.build("generic", tmp_path / "cache") == built
    assert CpuAttention("generic", tmp_path / "cache").name == "cpu_ext"
    assert not (tmp_path / "cache").exists()


def test_a_prebuilt_library_of_another_source_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PREBUILT", tmp_path)
    kernels.prebuilt_path("generic").write_bytes(b"")
    changed = tmp_path / "sources"
    changed.mkdir()
    for source in Path(kernels.__file__).parent.glob("*.[ch]*"):
        (changed / source.name).write_bytes(source.read_bytes() + b"\n")
    monkeypatch.setattr(kernels, "_HERE", changed)
    assert not kernels.prebuilt_path("generic").exists()


def test_prebuilding_without_a_compiler_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(kernels, "_PREBUILT", tmp_path)
    with pytest.raises(kernels.KernelBuildError, match="no-such-compiler"):
        kernels.main(["--prebuild"])
