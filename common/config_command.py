"""`torchrelay config`: the settings in force, and what is wrong with them."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated

import typer

from common import configuration
from common.settings import PREFIX
from torchrelay.cli import output

config = typer.Typer(no_args_is_help=True, help="The settings in force, and what is wrong with them.")
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")]


@config.command("show")
def show(
    changed: Annotated[bool, typer.Option("--changed", help="Only those that a variable sets.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show every setting of gateway, worker and queue, its value, and what sets it. Secrets are masked."""
    classes = dict.fromkeys(kind for program in configuration.programs() for kind in program.classes)
    found = [
        setting for setting in configuration.settings_in_force(classes, os.environ) if setting.is_set or not changed
    ]
    if as_json:
        for setting in found:
            output.print_json(
                {
                    "variable": setting.variable,
                    "value": setting.value,
                    "source": _source(setting),
                    "description": setting.description,
                }
            )
        return
    rows = [(setting.variable, _text(setting.value), _source(setting)) for setting in found]
    output.print_table(("VARIABLE", "VALUE", "SOURCE"), rows)


@config.command("check")
def check(as_json: JsonOption = False) -> None:
    """Name variables that nothing reads, with the one that was meant, values that are none, and contradictions.

    Status 1 if there are any.
    """
    found = configuration.problems(configuration.programs(), os.environ)
    for problem in found:
        if as_json:
            output.print_json(asdict(problem))
        else:
            output.write(f"{problem.what}\n  {problem.fix}\n")
    if found:
        raise typer.Exit(1)
    if not as_json:
        number = sum(name.upper().startswith(PREFIX) for name in os.environ)
        output.write(f"{number} variables are set, and all are understood\n")


def _source(setting: configuration.Setting) -> str:
    return "variable" if setting.is_set else "default"


def _text(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
