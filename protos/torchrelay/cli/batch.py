"""`torchrelay batch`: many requests at once, from a file of JSON lines to another."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from torchrelay.cli import connection as at
from torchrelay.cli import output
from torchrelay.client import Client, ResultPosition
from torchrelay.client.requests import Priority
from torchrelay.v1 import batch_pb2

_COLUMNS = ("ID", "NAME", "STATE", "ITEMS", "WAITING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELLED", "AGE")
_INTERRUPTED = 130  # as shells say it

batch = typer.Typer(no_args_is_help=True, help="Many requests at once, from a file of JSON lines.")

_BatchId = Annotated[str, typer.Argument(help="The batch's id.")]
_OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Where results go, a JSON object a line; default: stdout.")
]
_PriorityOption = Annotated[str | None, typer.Option("--priority", help="high, normal or low; default: low.")]


@batch.command("run")
@at.connected
def run_batch(
    file: Annotated[
        Path | None,
        typer.Argument(help='JSON lines such as {"custom_id": "a", "classify": {"model": "m", "inputs": [...]}}.'),
    ] = None,
    output_file: _OutputOption = None,
    model: Annotated[str, typer.Option("--model", "-m", help="For lines that name none.")] = "",
    batch_id: Annotated[str, typer.Option("--batch", help="Go on with this batch instead of making one.")] = "",
    priority: _PriorityOption = None,
    name: Annotated[str, typer.Option("--name", help="What lists show; default: the file's name.")] = "",
    *,
    connection: at.Connection,
) -> None:
    """Run the requests of a file, and wait for their results.

    The batch goes on if this command is interrupted: --batch with its id picks it up again, and with the same --output
    goes on behind the last result there. Exit status 1 if an item failed.
    """
    if (file is None) == (not batch_id):
        raise typer.BadParameter("give a file, or the id of a batch with --batch", param_hint="FILE")
    if file is not None and output_file is not None and output_file.exists():
        raise typer.BadParameter(f"{output_file} exists; --batch goes on with a batch", param_hint="--output")
    items = [] if file is None else read_items(file, model)
    with output.explained_errors(connection.address), connection.client() as client:
        if file is not None:
            wanted = _priority(priority)
            made = client.create_batch(items, priority=wanted, display_name=(name or file.name)[:64])
            batch_id = made.batch_id
            output.stderr.print(f"batch {batch_id}: {len(items)} items", soft_wrap=True)
        after_index = _last_index(output_file)
        try:
            ended = _copy_results(client, batch_id, after_index, output_file)
        except KeyboardInterrupt:
            where = "" if output_file is None else f" --output {output_file}"
            output.stderr.print(
                f"the batch goes on: `torchrelay batch run --batch {batch_id}{where}` reads on, "
                f"`torchrelay batch cancel {batch_id}` ends it",
                soft_wrap=True,
            )
            raise typer.Exit(_INTERRUPTED) from None
    counts = ended.counts
    others = "".join(
        f", {count} {what}" for count, what in ((counts.failed, "failed"), (counts.cancelled, "cancelled")) if count
    )
    output.stderr.print(f"{counts.succeeded} of {counts.total} succeeded{others}", soft_wrap=True)
    if counts.succeeded < counts.total:
        raise typer.Exit(1)


@batch.command("results")
@at.connected
def show_results(
    batch_id: _BatchId,
    after_index: Annotated[int, typer.Option("--after-index", min=0, help="Index of the last one known.")] = 0,
    output_file: _OutputOption = None,
    *,
    connection: at.Connection,
) -> None:
    """Print the results of a batch, in the order of their coming, until it ends."""
    with output.explained_errors(connection.address), connection.client() as client:
        _copy_results(client, batch_id, after_index or _last_index(output_file), output_file)


@batch.command("list")
@at.connected
def list_batches(
    as_json: at.JsonOption = False,
    *,
    connection: at.Connection,
) -> None:
    """List your batches, the latest first."""
    with output.explained_errors(connection.address), connection.client() as client:
        found = client.batches()
    _show(found, as_json=as_json)


@batch.command("get")
@at.connected
def get_batch(
    batch_id: _BatchId,
    as_json: at.JsonOption = False,
    *,
    connection: at.Connection,
) -> None:
    """Show what has become of a batch's items so far."""
    with output.explained_errors(connection.address), connection.client() as client:
        _show([client.get_batch(batch_id)], as_json=as_json)


@batch.command("cancel")
@at.connected
def cancel_batch(
    batch_id: _BatchId,
    *,
    connection: at.Connection,
) -> None:
    """End a batch; its results stay."""
    with output.explained_errors(connection.address), connection.client() as client:
        output.write(_state(client.cancel_batch(batch_id)) + "\n")


@batch.command("delete")
@at.connected
def delete_batch(
    batch_id: _BatchId,
    *,
    connection: at.Connection,
) -> None:
    """End a batch if it runs, and erase all that is stored of it."""
    with output.explained_errors(connection.address), connection.client() as client:
        client.delete_batch(batch_id)


def read_items(file: Path, model: str = "") -> list[batch_pb2.BatchItem]:
    """Return the items of a file; `model` is for those that name none. Raises typer.BadParameter with the line."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file} cannot be read: {error}", param_hint="FILE") from None
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = ParseDict(json.loads(line), batch_pb2.BatchItem())
        except (ValueError, ParseError) as error:
            raise typer.BadParameter(f"{file}, line {number}: {error}", param_hint="FILE") from None
        kind = item.WhichOneof("request")
        if kind is None:
            raise typer.BadParameter(f"{file}, line {number}: names no request, such as generate", param_hint="FILE")
        request = getattr(item, kind)
        request.model = request.model or model
        if not request.model:
            raise typer.BadParameter(f"{file}, line {number}: names no model; see --model", param_hint="FILE")
        items.append(item)
    if not items:
        raise typer.BadParameter(f"{file} holds no request", param_hint="FILE")
    return items


def _priority(name: str | None) -> Priority | None:
    if name is not None and name not in ("high", "normal", "low"):
        raise typer.BadParameter(f"{name} is not high, normal or low", param_hint="--priority")
    return name  # type: ignore[return-value]  # one of them


def _copy_results(client: Client, batch_id: str, after_index: int, target: Path | None) -> batch_pb2.Batch:
    """Write results as they come, under a progress bar; return the batch as it ended."""
    results = client.batch_results(batch_id, after_index)
    with _opened(target) as sink, _progress() as progress:
        task = progress.add_task("results", total=None, completed=after_index)
        for result in results:
            line = MessageToDict(result, preserving_proto_field_name=True)
            sink.write(json.dumps(line, ensure_ascii=False) + "\n")
            sink.flush()
            progress.update(task, completed=result.index, total=_total(results.position))
    assert results.position.batch is not None
    return results.position.batch


def _total(position: ResultPosition) -> int | None:
    return None if position.batch is None else position.batch.counts.total


def _progress() -> Progress:
    """A bar on stderr, and nothing where that is no terminal."""
    return Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=output.stderr,
        disable=not output.stderr.is_terminal,
    )


@contextmanager
def _opened(target: Path | None) -> Iterator[IO[str]]:
    if target is None:
        yield sys.stdout
        return
    with target.open("a", encoding="utf-8") as sink:
        yield sink


def _last_index(target: Path | None) -> int:
    """Return the index of the last result in a file; half a line behind it, as a crash leaves one, is cut off."""
    if target is None or not target.exists():
        return 0
    data = target.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(target, len(whole))
    lines = whole.splitlines()
    try:
        return int(json.loads(lines[-1])["index"]) if lines else 0
    except (ValueError, KeyError, TypeError):
        raise typer.BadParameter(f"{target} does not hold results of a batch", param_hint="--output") from None


def _state(found: batch_pb2.Batch) -> str:
    return batch_pb2.BatchState.Name(found.state).removeprefix("BATCH_STATE_").lower()


def _show(found: list[batch_pb2.Batch], *, as_json: bool) -> None:
    if as_json:
        for one in found:
            output.print_json(one)
        return
    rows: list[tuple[Any, ...]] = []
    for one in found:
        counts = one.counts
        numbers = (counts.waiting, counts.running, counts.succeeded, counts.failed, counts.cancelled)
        made = one.create_time.ToDatetime(tzinfo=UTC)
        rows.append((one.batch_id, one.display_name or "-", _state(one), counts.total, *numbers, output.ago(made)))
    output.print_table(_COLUMNS, rows)
