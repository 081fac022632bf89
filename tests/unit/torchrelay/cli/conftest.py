"""The command, run against a server on a socket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.unit.torchrelay.toy import Toy
from torchrelay.cli.main import make_app


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    return make_app()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Without the variables and files of whoever runs the tests."""
    for name in (
        "ADDRESS",
        "ADMIN_ADDRESS",
        "API_KEY",
        "ADMIN_KEY",
        "TOKEN",
        "TLS_CA",
        "TLS_CERT",
        "TLS_KEY",
        "INSECURE",
    ):
        monkeypatch.delenv(f"TORCHRELAY_{name}", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


class Command:
    """Runs the command against the toy."""

    def __init__(self, app: typer.Typer, toy: Toy) -> None:
        self._app = app
        self.toy = toy

    def __call__(self, *args: str, status: int = 0, stdin: str | None = None) -> Any:
        env = {"TORCHRELAY_ADDRESS": self.toy.address, "TORCHRELAY_ADMIN_ADDRESS": self.toy.address}
        result = CliRunner(env=env).invoke(self._app, args, input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result

    def objects(self, *args: str) -> list[Any]:
        """Each line of stdout as JSON."""
        return [json.loads(line) for line in self(*args).stdout.splitlines()]


@pytest.fixture
def run(app: typer.Typer, toy: Toy) -> Command:
    return Command(app, toy)
