"""The command `torchrelay`: the client's verbs, and the server's where it is installed."""

from __future__ import annotations

from importlib.metadata import entry_points, version
from typing import Annotated

import typer

from torchrelay.cli import output
from torchrelay.cli.batch import batch
from torchrelay.cli.bench import bench
from torchrelay.cli.dead_letters import dead_letters
from torchrelay.cli.fleet import drain, queue
from torchrelay.cli.generate import chat, generate
from torchrelay.cli.inspect import cancel, erase, models, ps
from torchrelay.cli.keys import keys
from torchrelay.cli.logs import logs
from torchrelay.cli.tasks import answer, classify, embed, entities, rerank
from torchrelay.cli.tenants import tenants
from torchrelay.cli.top import top
from torchrelay.cli.usage import usage

ENTRY_POINTS = "torchrelay.commands"


def make_app() -> typer.Typer:
    """Build the command.

    A server verb is an entry point that names a function, or a Typer application with verbs of its own.
    """
    app = typer.Typer(
        no_args_is_help=True, pretty_exceptions_show_locals=False, help="Serve and call open transformer models."
    )
    server = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)
    for point in server:
        if point.name != "models":
            _add(app, point.name, point.load())
    clients = (generate, chat, embed, classify, entities, answer, rerank, cancel, erase, usage)
    for verb in (*clients, top, ps, queue, drain):
        app.command(verb.__name__)(verb)
    all_models = typer.Typer(no_args_is_help=True, help=models.info.help)
    for point in server:
        if point.name == "models":  # verbs that need the model's files join those that only look
            all_models.registered_commands += point.load().registered_commands
    all_models.registered_commands += models.registered_commands
    app.add_typer(all_models, name="models")
    app.add_typer(batch, name="batch")
    app.add_typer(bench, name="bench")
    app.add_typer(keys, name="keys")
    app.add_typer(tenants, name="tenants")
    app.add_typer(logs, name="logs")
    app.add_typer(dead_letters, name="dead-letters")
    app.command("version")(show_version)
    return app


def show_version(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print the versions of client and server."""
    found = {"torchrelay-client": version("torchrelay-client")}
    if entry_points(group=ENTRY_POINTS):
        found["torchrelay"] = version("torchrelay")
    if as_json:
        output.print_json(found)
    else:
        output.write("".join(f"{name} {number}\n" for name, number in found.items()))


def main() -> None:
    make_app()()


def _add(app: typer.Typer, name: str, verb: object) -> None:
    if isinstance(verb, typer.Typer):
        app.add_typer(verb, name=name)
    else:
        app.command(name)(verb)  # type: ignore[type-var]
