"""What a gateway's process is before its first line runs: which code, and how its gRPC is set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from common.startup import CANNOT_START

UNKNOWN = "Unknown experiment"
SERVE = """
import asyncio, gateway, os, grpc.aio
async def main():
    server = grpc.aio.server()
    server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await server.stop(0)
asyncio.run(main())
print(os.environ["GRPC_EXPERIMENTS"])
"""


def run(*command: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    # What importing the package has set here is no operator's wish; nor is a path relative to another folder.
    own = {name: value for name, value in os.environ.items() if name not in ("GRPC_EXPERIMENTS", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**own, **env}, capture_output=True, text=True, timeout=60
    )


def test_grpc_knows_what_a_gateway_sets_and_an_operator_s_setting_stands() -> None:
    found = run("-c", SERVE)
    assert found.stdout == "-event_engine_listener\n"
    assert UNKNOWN not in found.stderr
    found = run("-c", SERVE, GRPC_EXPERIMENTS="-no_such_experiment")
    assert found.stdout == "-no_such_experiment\n"
    assert UNKNOWN in found.stderr  # else the first half shows nothing


def test_the_command_becomes_the_installed_gateway_wherever_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "gateway").mkdir()
    (tmp_path / "gateway" / "__init__.py").write_text("raise SystemExit('not this one')\n")
    found = run(
        "-P",
        "-c",
        "from torchrelay.cli.main import main; main()",
        "gateway",
        "--redis-url",
        "nonsense://",
        cwd=tmp_path,
    )
    assert found.returncode == CANNOT_START, found.stderr
    assert "TORCHRELAY_REDIS_URL" in found.stderr
    assert "not this one" not in found.stderr
