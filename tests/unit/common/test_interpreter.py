"""Which Python make installs into: any that will do, those before that were compiled with a profile of themselves."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from common.diagnosis import interpreter

ROOT = Path(__file__).parents[3]


def build(monkeypatch: pytest.MonkeyPatch, options: str | None, prefix: str) -> None:
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: options if name == "CONFIG_ARGS" else None)
    monkeypatch.setattr(sys, "base_prefix", prefix)


@pytest.mark.parametrize(
    ("options", "prefix", "is_profiled"),
    [
        ("'--enable-shared' '--enable-optimizations' '--with-lto'", "/usr/local", True),  # an image's
        ("'--prefix=/home/me/.pyenv/versions/3.13.0' '--enable-shared'", "/home/me/.pyenv/versions/3.13.0", False),
        ("'--enable-shared' '--prefix=/usr' '--with-dtrace'", "/usr", True),  # Debian's
        (None, "C:\\Python313", True),  # built in another way, which says nothing
    ],
)
def test_a_build_tells_whether_it_was_profiled(
    monkeypatch: pytest.MonkeyPatch, options: str | None, prefix: str, *, is_profiled: bool
) -> None:
    build(monkeypatch, options, prefix)
    assert interpreter.is_profiled() is is_profiled


def test_one_that_is_too_old_or_makes_no_environments_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build(monkeypatch, "--enable-optimizations", "/usr/local")
    assert interpreter.main() == 0
    assert capsys.readouterr().out == f"0 {sys.executable}\n"
    build(monkeypatch, "", "/usr/local")
    monkeypatch.setattr(sys, "version_info", (3, 10, 14))
    assert interpreter.main() == 1
    monkeypatch.setattr(sys, "version_info", (3, 11, 0))
    monkeypatch.setitem(sys.modules, "ensurepip", None)  # Debian without python3-venv
    assert interpreter.main() == 1
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_prefers_a_profiled_one_and_takes_the_first_otherwise(tmp_path: Path) -> None:
    """Interpreters are stood for by scripts that answer as interpreter.py does."""

    def chosen(*answers: tuple[str, str]) -> str:
        folders = []
        for name, answer in answers:
            folder = Path(tempfile.mkdtemp(suffix=" with a space", dir=tmp_path))
            path = folder / name
            path.write_text(f'#!/bin/sh\n[ "$2" = common/diagnosis/interpreter.py ] && {answer}\n')
            path.chmod(0o755)
            folders.append(str(folder))
        show = tmp_path / "show.mk"
        show.write_text("show:\n\t@echo '$(PYTHON)'\n")
        made = subprocess.run(
            ["make", "-s", "-f", "Makefile", "-f", str(show), "show"],
            cwd=ROOT,
            env={"PATH": ":".join([*folders, "/bin-without-python", *tools(tmp_path)])},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()

    assert chosen(("python3", "exit 1"), ("python3", "echo 1 first"), ("python3.12", "echo 1 second")) == "first"
    assert chosen(("python3", "echo 1 first"), ("python3.12", "echo 0 a profiled one")) == "a profiled one"
    assert chosen(("python3", "exit 1")) == ""


def tools(folder: Path) -> list[str]:
    """A folder with the programs that the choice itself takes, and no Python."""
    found = folder / "tools"
    if not found.exists():
        found.mkdir()
        for name in ("make", "sh", "sort", "sed", "uname", "cut", "printf", "echo"):
            path = shutil.which(name)
            if path is not None:
                (found / name).symlink_to(path)
    return [str(found)]
