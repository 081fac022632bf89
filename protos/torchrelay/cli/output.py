"""What commands print: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchrelay.client.errors import RelayError, from_rpc_error

stderr = Console(stderr=True, highlight=False)


def print_json(value: Mapping[str, Any] | Message) -> None:
    """Print one object on one line; 64-bit numbers of messages are JSON strings, as in protobuf's own mapping."""
    if isinstance(value, Message):
        value = MessageToDict(value, preserving_proto_field_name=True)
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; plain columns where stdout is not a terminal."""
    console = Console(highlight=False)
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))  # names may hold brackets
    if not console.is_terminal:
        console.width = 10_000
    console.print(table)


def write(text: str) -> None:
    """Write a piece of generated text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def size(num_bytes: int) -> str:
    """Return a number of bytes in MB or GB (powers of 1,000); "-" for 0, which stands for not known."""
    if not num_bytes:
        return "-"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def ago(moment: datetime) -> str:
    """Return how long ago a moment was, in its largest unit."""
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"


@contextmanager
def explained_errors(address: str, option: str = "--address") -> Iterator[None]:
    """Turn failed calls into lines that say what to do, and exit code 1. `option` sets the address."""
    try:
        yield
    except RelayError as error:
        failure = error
    except grpc.RpcError as error:
        failure = from_rpc_error(error)
    else:
        return
    print_error(failure, address, option)
    raise typer.Exit(1)


def print_error(error: RelayError, address: str, option: str = "--address") -> None:
    """Print what happened and what to do about it, unwrapped, on stderr."""
    stderr.print(f"[red]error:[/] {escape(explain(error, address, option))}", soft_wrap=True)


def explain(error: RelayError, address: str, option: str = "--address") -> str:
    """Say what happened and what to do about it."""
    if error.code is grpc.StatusCode.UNAVAILABLE:
        lines = [_unavailable(error, address, option)]
    else:
        advice = _ADVICE.get(error.code)
        lines = [advice(error) if advice else str(error)]
    lines += [f"  {violation.field}: {violation.description}" for violation in error.violations]
    if error.reason:
        lines.append(f"  reason {error.reason}" + "".join(f", {k} {v}" for k, v in error.metadata.items()))
    if error.generation_id:
        lines.append(f"  generation {error.generation_id}")
    return "\n".join(lines)


def _unavailable(error: RelayError, address: str, option: str) -> str:
    if error.reason:
        return f"{error.message} (the gateway at {address} answered; its back-end did not)"
    return f"nothing answers at {address}; start a server with `torchrelay serve`, or set {option}"


def _unauthenticated(error: RelayError) -> str:
    if error.reason == "CREDENTIALS_MISSING":
        return "no API key; make one with `torchrelay keys create TENANT` and pass --api-key or set TORCHRELAY_API_KEY"
    return f"{error.message}; check --api-key or TORCHRELAY_API_KEY"


def _exhausted(error: RelayError) -> str:
    wait = f"; try again in {error.retry_delay_s:.1f} s" if error.retry_delay_s is not None else ""
    return error.message + wait


def _not_found(error: RelayError) -> str:
    what_to_do = {
        "MODEL_NOT_FOUND": "`torchrelay models list` shows those that are served",
        "BATCH_NOT_FOUND": "`torchrelay batch list` shows yours",
        "API_KEY_NOT_FOUND": "`torchrelay keys list` shows the ids of keys",
        "WORKER_NOT_FOUND": "`torchrelay ps --workers` shows those that are alive",
    }.get(error.reason)
    return f"{error.message}; {what_to_do}" if what_to_do else error.message


_ADVICE: dict[grpc.StatusCode, Callable[[RelayError], str]] = {
    grpc.StatusCode.UNAUTHENTICATED: _unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: _exhausted,
    grpc.StatusCode.PERMISSION_DENIED: lambda error: f"this key may not do that: {error.message}",
    grpc.StatusCode.NOT_FOUND: _not_found,
    grpc.StatusCode.INVALID_ARGUMENT: lambda error: f"the request was refused: {error.message}",
    grpc.StatusCode.FAILED_PRECONDITION: lambda error: error.message,
    grpc.StatusCode.DEADLINE_EXCEEDED: lambda error: f"out of time: {error.message}",
}
