"""`torchrelay bench`, `bench compare` and `bench plot`: their options, and what they print."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from torchrelay.admin.v1beta1 import fleet_pb2, fleet_pb2_grpc
from torchrelay.cli import connection as at
from torchrelay.cli import output
from torchrelay.cli.admin import AdminKeyOption, admin_channel
from torchrelay.cli.bench import records
from torchrelay.cli.bench.compare import Difference, compare
from torchrelay.cli.bench.load import Connections
from torchrelay.cli.bench.plan import Plan, make_plan, run_plan
from torchrelay.cli.bench.plot import NoMatplotlib, draw
from torchrelay.cli.bench.records import Record
from torchrelay.cli.bench.samples import Run, best_level
from torchrelay.cli.generate import choose_model
from torchrelay.client import Client, RetryPolicy

_SECRETS = frozenset({"api_key", "token", "admin_key"})
# A refusal counts as one, instead of being waited for; a stream that was accepted and broke is still resumed.
_NO_RETRY = RetryPolicy(first_contact_s=0.0)
_MODEL_FIELDS = ("name", "revision", "family", "dtype", "weight_format", "attention_backend", "num_workers")

bench = typer.Typer(invoke_without_command=True)


@bench.callback()
@at.connected
def measure(
    context: typer.Context,
    concurrency: Annotated[
        str | None,
        typer.Option(
            "--concurrency", "-c", show_default="1,4,16", help="Closed loop: callers at a time; a list runs each."
        ),
    ] = None,
    rate: Annotated[
        str, typer.Option("--rate", help="Open loop: requests a second, at random moments; a list runs each.")
    ] = "",
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests", "-r", min=1, show_default="4", help="Requests per caller; with --rate, of each rate in all."
        ),
    ] = None,
    duration: Annotated[
        str,
        typer.Option(
            "--duration",
            show_default="30s with --rate",
            help="How long requests begin at each level, instead of a number.",
        ),
    ] = "",
    prompt_words: Annotated[
        str | None,
        typer.Option(
            "--prompt-words",
            show_default="64",
            help="Random words of each prompt: a number, a range such as 16-512, or lognormal:MEDIAN,SIGMA.",
        ),
    ] = None,
    shared_prefix_words: Annotated[
        int, typer.Option("--shared-prefix-words", min=0, help="Words in front that all prompts of a level share.")
    ] = 0,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help='JSON lines with "prompt" or "messages", and "max_tokens"; asked in order, over and over.'
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of each answer.")] = 64,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Answers end at --max-tokens alone, so that all are of one length.")
    ] = False,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Requests that are sent before and not measured.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Draws the words, lengths and arrivals.")] = 1,
    slo: Annotated[
        str,
        typer.Option(
            "--slo", help="Objectives of a request, such as ttft=500ms,itl=50ms,tpot=30ms,e2e=10s, for its goodput."
        ),
    ] = "",
    goodput: Annotated[
        float, typer.Option("--goodput", min=0.0, max=1.0, help="The share of requests that has to meet them.")
    ] = 0.99,
    model: Annotated[str, typer.Option("--model", "-m", help="Model name.")] = "",
    output_file: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Save every request in this file, for compare and plot; .gz is compressed."
        ),
    ] = None,
    admin_address: Annotated[
        str,
        typer.Option(
            "--admin-address", envvar="TORCHRELAY_ADMIN_ADDRESS", help="Admin port to ask for the workers' version."
        ),
    ] = "",
    admin_key: AdminKeyOption = None,
    as_json: at.JsonOption = False,
    *,
    connection: at.Connection,
) -> None:
    """Measure latency and throughput: TTFT, time between tokens, end to end, tokens a second, goodput.

    With --concurrency so many callers wait for each answer before they ask again. With --rate requests arrive at
    random moments (a Poisson process) whatever becomes of those before, and latencies count from the moment of arrival:
    that is what a public service sees. A message of several tokens counts as so many gaps of equal length in ITL.
    """
    if context.invoked_subcommand is not None:
        return
    plan = make_plan(
        concurrency=concurrency,
        rate=rate,
        requests=requests,
        duration=duration,
        prompts=prompts,
        prompt_words=prompt_words,
        shared_prefix_words=shared_prefix_words,
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        warmup=warmup,
        seed=seed,
        slo=slo,
        target=goodput,
    )
    if output_file is not None and not output_file.resolve().parent.is_dir():
        raise typer.BadParameter(f"{output_file.parent} is no folder", param_hint="--output")
    with output.explained_errors(connection.address):
        with connection.client() as client:
            name = choose_model(client, model)
            about = _about(context, client, name)
        if output_file is not None:
            about["server_versions"] = _server_versions(admin_address, admin_key, connection)
        runs = asyncio.run(_run(connection, name, plan))
    if output_file is not None:
        records.write(output_file, Record(about, runs, plan.slo, plan.target))
    _print(name, plan, runs, as_json=as_json)
    if any(run.failures for run in runs):
        raise typer.Exit(1)


@bench.command("compare")
def compare_runs(
    before: Annotated[Path, typer.Argument(metavar="A", help="A run saved with --output.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="The run to hold against it.")],
    fail_above: Annotated[
        str, typer.Option("--fail-above", help="Exit with status 1 if a figure is worse by more, such as 5%.")
    ] = "",
    confidence: Annotated[float, typer.Option("--confidence", min=0.5, max=0.995, help="Of each interval.")] = 0.99,
    as_json: at.JsonOption = False,
) -> None:
    """Show how two saved runs differ, level by level, with bootstrap intervals: noise is not called a regression.

    A difference counts as better or worse where its interval does not hold zero. The interval is of what varies between
    the requests of a run; a machine that is slower today looks like a regression, so run both in turns. Percentages of
    requests differ in points.
    """
    limit = _percent(fail_above) if fail_above else None
    try:
        one, other = records.read(before), records.read(after)
        differences = compare(one, other, confidence)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for what, a, b in records.what_differs(one, other):
        output.stderr.print(f"[yellow]the runs differ in their {what}: {escape(a)}, and {escape(b)}[/]", soft_wrap=True)
    if as_json:
        for difference in differences:
            output.print_json(_difference_json(difference))
    else:
        interval = f"{confidence * 100:g} % INTERVAL"
        columns = ("LEVEL", "FIGURE", "A", "B", "CHANGE", interval, "VERDICT")
        output.print_table(columns, [_difference_row(difference) for difference in differences])
    if limit is not None:
        regressions = [difference for difference in differences if difference.is_regression(limit)]
        for found in regressions:
            what = f"{found.figure} at {found.level} is worse by {_signed(found.change)}, above {fail_above}"
            output.stderr.print(f"[red]error:[/] {what}", soft_wrap=True)
        if regressions:
            raise typer.Exit(1)


@bench.command("plot")
def plot_runs(
    files: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs saved with --output.")],
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pictures.")] = Path(),
) -> None:
    """Draw saved runs: TTFT, ITL, throughput and goodput against callers or arrivals; bench.png has all of them.

    Needs matplotlib: pip install 'torchrelay-client[bench]'.
    """
    try:
        loaded = [(path.name.removesuffix(".gz").removesuffix(".json"), records.read(path)) for path in files]
        paths = draw(loaded if len(loaded) > 1 else [("", loaded[0][1])], folder)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    except NoMatplotlib as error:
        output.stderr.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    output.write("".join(f"{path}\n" for path in paths))


async def _run(connection: at.Connection, model: str, plan: Plan) -> list[Run]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Rarely enough that drawing is no load of its own.
    with Progress(*columns, console=output.stderr, transient=True, refresh_per_second=2) as progress:

        def begin(what: str, total: int | None) -> Callable[[], None]:
            task = progress.add_task(what, total=total)
            return lambda: progress.advance(task)

        # Clients with the same options would share one connection.
        async with Connections(lambda number: connection.aio_client(_NO_RETRY, [("bench.connection", number)])) as pool:
            return await run_plan(pool, model, plan, begin)


def _about(context: typer.Context, client: Client, name: str) -> dict[str, Any]:
    """Return what a saved run says of itself."""
    model: dict[str, Any] = {"name": name}
    for served in client.models():
        if served.name == name:
            shown = MessageToDict(served, preserving_proto_field_name=True)
            model = {key: shown[key] for key in _MODEL_FIELDS if key in shown}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(context),
        "client_version": version("torchrelay-client"),
        "model": model,
    }


def _command(context: typer.Context) -> list[str]:
    """Return the options that were given, as one would give them again, but for credentials."""
    words = ["torchrelay", "bench"]
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name) if parameter.name else None
        if source is None or source.name != "COMMANDLINE" or parameter.name in _SECRETS:
            continue
        value = context.params[str(parameter.name)]
        words += [parameter.opts[0]] if value is True else [parameter.opts[0], str(value)]
    return words


def _server_versions(address: str, key: str | None, connection: at.Connection) -> list[str] | None:
    """Return the versions of the workers, which the admin port alone tells; None where it is not named."""
    if not address:
        return None
    with admin_channel(address, key, connection.tls) as channel:
        workers = fleet_pb2_grpc.FleetServiceStub(channel).ListWorkers(fleet_pb2.ListWorkersRequest()).workers
    return sorted({worker.version for worker in workers})


def _print(model: str, plan: Plan, runs: Sequence[Run], *, as_json: bool) -> None:
    if as_json:
        for run in runs:
            output.print_json({"model": model} | run.report(plan.slo))
    else:
        columns = [
            "ARRIVALS" if plan.levels[0].is_open else "CALLERS", "REQUESTS", "ERRORS", "TOK/S", "TTFT p50/p99 ms",
            "ITL p50/p99 ms", "E2E p50/p99 ms", "QUEUED p50/p99 ms",
        ]  # fmt: skip
        columns += ["GOODPUT"] if plan.slo else []
        output.print_table(columns, [_row(run, plan) for run in runs])
    # Not data, but what to think of it.
    say = output.stderr.print
    if plan.slo is not None:
        best = best_level(runs, plan.slo, plan.target)
        found = f"{best} {'requests/s' if best.is_open else 'callers'}".replace("/s r", " r") if best else "none"
        say(f"highest load with {plan.target * 100:g} % of requests within {plan.slo}: {found}", soft_wrap=True)
    for run in runs:
        for reason, count in run.report()["errors"].items():
            say(f"[red]{run.level}: {count} requests ended with {reason}[/]", soft_wrap=True)
        if run.is_generator_bound():
            say(
                f"[yellow]{run.level}: this load generator was late itself (p99 {_late_ms(run):.0f} ms, using "
                f"{run.cpu_s / run.elapsed_s:.0%} of a core): these figures hold its own delays. Run it on a machine "
                f"of its own, several beside each other, or with less load.[/]",
                soft_wrap=True,
            )


def _late_ms(run: Run) -> float:
    report = run.report()["generator"]
    return float((report["late_send_ms"] or report["loop_lag_ms"]).get("p99", 0.0))


def _row(run: Run, plan: Plan) -> list[object]:
    report = run.report(plan.slo)

    def pair(name: str) -> str:
        values = report[name]
        return f"{values['p50']:.0f} / {values['p99']:.0f}" if values else "-"

    row = [run.level, report["num_requests"], report["num_errors"], report["output_tokens_per_s"]]
    row += [pair(name) for name in ("ttft_ms", "itl_ms", "e2e_ms", "queue_ms")]
    if plan.slo:
        row.append(f"{report['goodput']['fraction']:.1%}, {report['goodput']['requests_per_s']:g}/s")
    return row


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value < 100 or not text.endswith("%"):
        raise typer.BadParameter("takes a percentage, such as 5%", param_hint="--fail-above")
    return value


def _signed(share: float) -> str:
    return f"{share:+.1%}"


def _difference_row(difference: Difference) -> tuple[object, ...]:
    interval = difference.interval
    return (
        difference.level,
        difference.figure,
        f"{difference.before:.4g}",
        f"{difference.after:.4g}",
        _signed(difference.change),
        f"{_signed(interval.low)} to {_signed(interval.high)}" if interval else "-",
        difference.verdict.value,
    )


def _difference_json(difference: Difference) -> dict[str, Any]:
    interval = difference.interval
    return difference.level.keys() | {
        "figure": difference.figure,
        "before": round(difference.before, 4),
        "after": round(difference.after, 4),
        "change": round(difference.change, 5),
        "interval": [round(interval.low, 5), round(interval.high, 5)] if interval else None,
        "verdict": difference.verdict.name.lower(),
    }
