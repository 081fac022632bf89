"""`torchrelay doctor`: looks at everything that serving needs, and says what is wrong and what to do."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import entry_points
from typing import Final

import typer
from rich.console import Console
from rich.text import Text

from common.diagnosis.findings import Check, Finding, Level, Surroundings, failure
from common.diagnosis.host import check_disk, check_memory, check_settings, check_software
from common.diagnosis.server import check_server
from common.logs import set_up_logs
from common.serve import data_dir_of
from torchrelay.cli import connection as at
from torchrelay.cli import output
from torchrelay.cli.admin import AdminKeyOption

ENTRY_POINTS: Final = "torchrelay.checks"
OWN_CHECKS: Final[tuple[Check, ...]] = (check_settings, check_software, check_server, check_disk, check_memory)
_CHECK_S: Final = 60.0
_STYLES: Final = {Level.OK: "green", Level.WARNING: "yellow", Level.FAILURE: "bold red"}


def all_checks() -> list[Check]:
    """Our own checks, then those of the programs that are installed."""
    found = list(OWN_CHECKS)
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        found += point.load()()
    return found


async def diagnose(checks: Sequence[Check], where: Surroundings) -> list[Finding]:
    """Run checks one after another. One that fails itself, or takes too long, is a finding too."""
    found: list[Finding] = []
    for check in checks:
        name = check.__name__.removeprefix("check_")
        try:
            async with asyncio.timeout(_CHECK_S):
                found += await check(where)
        except TimeoutError:
            found.append(failure(name, f"looking at it took over {_CHECK_S:.0f} s", "run doctor again"))
        except Exception as error:  # noqa: BLE001 - the others are to be seen all the same
            what = f"looking at it failed: {type(error).__name__}: {error}"
            found.append(failure(name, what, "report this: a check must not fail itself"))
    return found


@at.connected
def doctor(
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    *,
    connection: at.Connection,
) -> None:
    """Look at settings, software, the queue's server, gateway, models and devices; say what is wrong and what to do.

    Status 1 if anything fails. Changes nothing.
    """
    set_up_logs("CRITICAL")  # what libraries would say on the way is said here in its place
    where = Surroundings(
        environment=os.environ,
        connection=connection,
        admin_address=admin_address,
        admin_key=admin_key,
        data_dir=data_dir_of(None),
    )
    found = asyncio.run(diagnose(all_checks(), where))
    if as_json:
        for finding in found:
            output.print_json(asdict(finding))
    else:
        show(found, Console(highlight=False))
    if any(finding.level is Level.FAILURE for finding in found):
        raise typer.Exit(1)


def show(found: Sequence[Finding], console: Console) -> None:
    """Print findings, each on a line, with what to do below it where there is something."""
    width = max((len(finding.check) for finding in found), default=0)
    for finding in found:
        line = Text(f"{finding.level.value:<9}", _STYLES[finding.level])
        line.append(f"{finding.check:<{width}}  {finding.what}", "default")
        console.print(line, soft_wrap=True)
        if finding.fix:
            console.print(Text(f"{'':<9}{'':<{width}}  -> {finding.fix}", "dim"), soft_wrap=True)
    counts = {level: sum(finding.level is level for finding in found) for level in Level}
    console.print(f"failures: {counts[Level.FAILURE]}, warnings: {counts[Level.WARNING]}", soft_wrap=True)
