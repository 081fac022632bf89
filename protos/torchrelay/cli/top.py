"""`torchrelay top`: the fleet as it works, in a terminal."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import grpc
import typer
from rich.console import Console
from rich.live import Live

from torchrelay.admin.v1beta1 import fleet_pb2 as pb
from torchrelay.cli import connection as at
from torchrelay.cli import output
from torchrelay.cli.admin import AdminKeyOption, admin_channel
from torchrelay.cli.fleet_rates import Rates
from torchrelay.cli.fleet_stream import Update, follow, request_of
from torchrelay.cli.fleet_view import Frame

_INTERVAL_S = 0.5
_POLL_S = 0.1
_RATES_S = 3.0  # longer than two heartbeats are apart
_MAX_GENERATIONS = 100
_PIPE_WIDTH, _PIPE_HEIGHT = 120, 60


def top(
    model: Annotated[str, typer.Option("--model", "-m", help="Only this model's workers and queue.")] = "",
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per snapshot on stdout; with --once, one.")
    ] = False,
    interval_s: Annotated[
        float, typer.Option("--interval", min=0.5, max=60.0, help="Seconds between two pictures.")
    ] = _INTERVAL_S,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """Watch workers, queues and the longest running generations. q or Ctrl-C ends it; a pipe gets one picture."""
    console = Console(highlight=False)
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        updates = follow(channel, request_of(model, interval_s, max_generations=_MAX_GENERATIONS))
        with contextlib.suppress(KeyboardInterrupt):
            if as_json:
                _print_json(updates, once=once)
            elif once or not console.is_terminal:
                _print_once(updates, console)
            else:
                _live(updates, console)


def _print_json(updates: Iterator[Update], *, once: bool) -> None:
    for update in updates:
        if update.snapshot is None:
            output.stderr.print(update.note, soft_wrap=True)
            continue
        output.print_json(update.snapshot)
        if once:
            return


def _print_once(updates: Iterator[Update], console: Console, monotonic: Callable[[], float] = time.monotonic) -> None:
    """Print one picture, once two reports of each worker give its rate, or after a while."""
    rates, until = Rates(), monotonic() + _RATES_S
    for update in updates:
        if update.snapshot is None:
            continue
        rates.add(update.snapshot)
        if rates.is_known(update.snapshot) or monotonic() >= until:
            width, height = (console.width, console.height) if console.is_terminal else (_PIPE_WIDTH, _PIPE_HEIGHT)
            if not console.is_terminal:
                console.width = width
            console.print(Frame(update.snapshot, rates).render(width, max(height, _PIPE_HEIGHT)))
            return


def _live(updates: Iterator[Update], console: Console) -> None:
    """Show each update until somebody presses q. Raises what the stream raises."""
    arrived: queue.SimpleQueue[Update | BaseException] = queue.SimpleQueue()
    threading.Thread(target=_pump, args=(updates, arrived), daemon=True).start()
    rates = Rates()
    last: pb.FleetSnapshot | None = None
    with (
        _pressed() as pressed,
        _interrupted() as interrupted,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while not pressed("q") and not interrupted():
            update: Update | None = None
            for update in _take_all(arrived):
                if update.snapshot is not None:
                    last = update.snapshot
                    rates.add(last)
            if update is not None and last is not None:
                frame = Frame(last, rates, update.note)
                live.update(frame.render(console.width, console.height), refresh=True)


def _take_all(arrived: queue.SimpleQueue[Update | BaseException]) -> Iterator[Update]:
    """Yield what has arrived, after a short wait for it: of more than one only the last is worth drawing.

    Raises what the stream has raised.
    """
    with contextlib.suppress(queue.Empty):
        found = arrived.get(timeout=_POLL_S)
        while True:
            if isinstance(found, BaseException):
                raise found
            yield found
            found = arrived.get_nowait()


def _pump(updates: Iterator[Update], arrived: queue.SimpleQueue[Update | BaseException]) -> None:
    """Hand updates to the thread that draws: that one must not wait for a gateway while somebody presses a key."""
    try:
        for update in updates:
            arrived.put(update)
    except (grpc.RpcError, ValueError) as error:  # ValueError: the channel is closed, since somebody pressed q
        arrived.put(error)


@contextlib.contextmanager
def _interrupted() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed. As an exception it could come up where gRPC lets none through, and be lost there."""
    found = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: found.set())
    try:
        yield found.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _pressed() -> Iterator[Callable[[str], bool]]:
    """Whether a key has been pressed, of a terminal that does not wait for a line; never where stdin is none."""
    try:
        import termios
        import tty
    except ImportError:  # no POSIX terminal: Ctrl-C ends it
        yield lambda key: False
        return
    if not sys.stdin.isatty():
        yield lambda key: False
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(key: str) -> bool:
        readable, _, _ = select.select([descriptor], [], [], 0)
        return bool(readable) and key.encode() in os.read(descriptor, 64)  # not by sys.stdin, which keeps what follows

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
