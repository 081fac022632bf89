"""What doctor says of this machine: each fault with its remedy, and nothing where all is well."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from common import doctor as doctor_module
from common.diagnosis import host, interpreter
from common.diagnosis.findings import Check, Finding, Level, Surroundings, failure, ok, warning
from common.diagnosis.server import is_local, memory_findings
from common.doctor import diagnose, show

GB = 10**9
QUIET = {"proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\n"}


def machine(folder: Path, **files: str) -> Path:
    """A root directory with these files of /proc and /sys; two underscores stand for a slash."""
    for name, text in {**QUIET, **{name.replace("__", "/"): text for name, text in files.items()}}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("TORCHRELAY_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(interpreter, "is_profiled", lambda: True)  # also where this one is not


async def test_a_machine_where_all_is_well_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "queue").mkdir()
    where = Surroundings(data_dir=tmp_path, root=machine(tmp_path))
    checks: list[Check] = [host.check_settings, host.check_software, host.check_disk, host.check_memory]
    found = await diagnose(checks, where)
    assert {finding.level for finding in found} == {Level.OK}, found
    assert [finding.check for finding in found] == ["settings", "software", "disk", "memory"]
    assert not any(finding.fix for finding in found)
    assert host.kernel_findings(where.root) == []
    assert await host.check_disk(Surroundings(data_dir=tmp_path / "nothing")) == []
    assert await host.check_memory(Surroundings(root=tmp_path / "nothing")) == []


async def test_settings_are_checked_as_config_check_does() -> None:
    where = Surroundings(environment={"TORCHRELAY_REDIS_ULR": "x"})
    (found,) = await host.check_settings(where)
    assert (found.level, found.fix) == (Level.FAILURE, "rename it to TORCHRELAY_REDIS_URL")


async def test_packages_that_are_missing_old_or_of_another_release_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        "no-such-package>=1",
        "grpcio<1",
        "structlog>=25",
        "numpy>=1; extra == 'worker'",
        "nothing>=1; python_version < '3'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    (_, found) = await host.check_software(Surroundings())
    assert found.level is Level.FAILURE
    assert found.what.startswith("packages are missing or of another version: no-such-package>=1, grpcio<1 (is ")
    assert "structlog" not in found.what
    assert "-m pip install --upgrade torchrelay==" in found.fix
    monkeypatch.setattr(metadata, "requires", lambda name: [])
    monkeypatch.setattr(metadata, "version", lambda name: "9" if name == "torchrelay" else "8")
    (found,) = await host.check_software(Surroundings())
    assert found == failure(
        "software", "torchrelay 9 and torchrelay-client 8 do not belong together", "pip install torchrelay-client==9"
    )


async def test_a_python_that_is_slower_than_need_be_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "is_profiled", lambda: False)
    (_, found) = await host.check_software(Surroundings())
    assert (found.level, found.check) == (Level.WARNING, "software")
    assert "--enable-optimizations" in found.fix


@pytest.mark.parametrize(("free", "level"), [(6 * GB, Level.OK), (4 * GB, Level.WARNING), (GB // 4, Level.FAILURE)])
async def test_a_disk_that_fills_is_said_before_it_is_full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, level: Level
) -> None:
    (tmp_path / "queue").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    (found,) = await host.check_disk(Surroundings(data_dir=tmp_path))
    assert found.level is level
    assert ("--data-dir" in found.fix) == (level is not Level.OK)


async def test_a_machine_without_memory_and_with_a_kernel_in_the_way_is_told_so(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        proc__meminfo="MemTotal: 1000000 kB\nMemFree: 900 kB\nMemAvailable: 40000 kB\n",
        proc__sys__vm__overcommit_memory="0\n",
        sys__kernel__mm__transparent_hugepage__enabled="[always] madvise never\n",
    )
    (found,) = await host.check_memory(Surroundings(root=root))
    assert (found.level, found.what) == (Level.WARNING, "0.0 of 1.0 GB of memory are available")
    assert "TORCHRELAY_ENGINE_KV_CACHE_BYTES" in found.fix
    overcommit, pages = host.kernel_findings(root)
    assert (overcommit.level, overcommit.fix.split()[:2]) == (Level.WARNING, ["sysctl", "vm.overcommit_memory=1,"])
    assert (pages.level, "echo madvise" in pages.fix) == (Level.WARNING, True)


@pytest.mark.parametrize(
    ("memory", "found"),
    [
        ({}, []),
        ({"maxmemory": 0}, [(Level.WARNING, "set maxmemory")]),
        ({"maxmemory": 100, "used_memory": 10, "maxmemory_policy": "noeviction"}, [(Level.OK, "")]),
        ({"maxmemory": 100, "used_memory": 90}, [(Level.FAILURE, "raise maxmemory")]),
        (
            {"maxmemory": 0, "maxmemory_policy": "allkeys-lru"},
            [(Level.FAILURE, "maxmemory-policy noeviction"), (Level.WARNING, "set maxmemory")],
        ),
    ],
)
def test_a_server_that_drops_or_refuses_work_is_found(memory: dict[str, Any], found: list[tuple[Level, str]]) -> None:
    findings = memory_findings(memory, 0.8, is_own=False)
    assert [finding.level for finding in findings] == [level for level, _ in found]
    assert all(fix in finding.fix for finding, (_, fix) in zip(findings, found, strict=True))


def test_the_server_of_serve_need_not_have_a_bound() -> None:
    (found,) = memory_findings({"maxmemory": 0}, 0.8, is_own=True)
    assert found.level is Level.OK


@pytest.mark.parametrize(
    ("url", "is_here"),
    [
        ("unix:///tmp/x.sock", True), ("redis://127.0.0.1:6379/0", True), ("redis://u:p@localhost/0", True),
        ("rediss://[::1]:1/0", True), ("redis://queue:6379/0", False), ("redis+sentinel://a:1,b:2/main/0", False),
    ],
)  # fmt: skip
def test_only_a_server_of_this_machine_depends_on_its_kernel(url: str, is_here: bool) -> None:
    assert is_local(url) is is_here


# -- the verb


async def _broken(where: Surroundings) -> list[Finding]:
    raise RuntimeError("what nobody thought of")


async def _good(where: Surroundings) -> list[Finding]:
    return [ok("good", "all is [well]")]


async def _warns(where: Surroundings) -> list[Finding]:
    return [warning("queue memory", "it is tight", "make room")]


async def test_a_check_that_fails_itself_hides_no_other() -> None:
    found = await diagnose([_broken, _good], Surroundings())
    assert [(one.level, one.check) for one in found] == [(Level.FAILURE, "_broken"), (Level.OK, "good")]
    assert "RuntimeError: what nobody thought of" in found[0].what


def test_findings_are_lines_with_their_remedy_below(capsys: pytest.CaptureFixture[str]) -> None:
    found = [ok("good", "all is [well]"), failure("queue", "it does not answer", "start it")]
    show(found, Console(highlight=False, width=30))
    assert capsys.readouterr().out.splitlines() == [
        "ok       good   all is [well]",
        "failure  queue  it does not answer",
        "                -> start it",
        "failures: 1, warnings: 0",
    ]


@pytest.mark.parametrize(("checks", "status"), [([_good, _warns], 0), ([_good, _broken, _warns], 1)])
def test_the_verb_ends_with_1_where_something_fails(
    monkeypatch: pytest.MonkeyPatch, checks: list[Check], status: int
) -> None:
    import json

    import typer

    monkeypatch.setattr(doctor_module, "all_checks", lambda: checks)
    app = typer.Typer()
    app.command()(doctor_module.doctor)
    result = CliRunner().invoke(app, ["--json"])
    assert result.exit_code == status, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == len(checks)
    assert found[-1] == {"check": "queue memory", "level": "warning", "what": "it is tight", "fix": "make room"}
    assert f"failures: {status}, warnings: 1" in CliRunner().invoke(app, []).stdout
