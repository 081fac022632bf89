"""`torchrelay serve`: the whole system on one machine, in one terminal.

Starts a server for the queue, a gateway and workers as child processes, waits until the model answers, says how to call
it, and starts again whatever ends unasked.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

import grpc
import structlog
import typer
from rich.console import Console

from common.api_keys import ApiKeys
from common.banner import banner
from common.children import die_with_parent
from common.embedded import EmbeddedServer, EmbeddedServerError, describe_durability
from common.errors import ServingError, Unauthenticated
from common.grants import Grants, Scope
from common.keys import PRIORITY_CLASSES
from common.redis import connect
from common.settings import RedisSettings
from common.startup import CANNOT_START, read_settings
from torchrelay.cli.connection import credentials_file
from torchrelay.client import Client, RelayError
from torchrelay.client.channel import is_loopback
from torchrelay.v1 import model_pb2

log = structlog.get_logger()

_DEV_TENANT: Final = "dev"
_POLL_S: Final = 0.1
_STOP_S: Final = 40.0
_MAX_RESTART_PAUSE_S: Final = 10.0
_SERVER_PAUSE_S: Final = 2.0
_STEADY_S: Final = 30.0  # a child that lived so long has not failed at its start


class ChildRefusedError(Exception):
    """A child cannot start, and has said why; it would not on another try either."""


@dataclass(slots=True)
class Child:
    """A process that is kept running."""

    name: str
    module: str
    env: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause_s: float = 0.0
    restart_at: float = 0.0

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", self.module],
            env={**os.environ, **self.env},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us: children are ended in order
            preexec_fn=die_with_parent(),
        )
        self.started = time.monotonic()
        self.restart_at = 0.0

    def keep_running(self) -> None:
        """Start it again if it has ended; later each time if it fails at once.

        Raises ChildRefusedError if it said that it never will.
        """
        now = time.monotonic()
        if self.process is not None and self.process.poll() is not None:
            status = self.process.returncode
            if status == CANNOT_START:
                raise ChildRefusedError(f"{self.name} cannot start; its last message above says why")
            self.pause_s = 0.2 if now - self.started > _STEADY_S else min(_MAX_RESTART_PAUSE_S, self.pause_s * 2 or 0.2)
            self.restart_at = now + self.pause_s
            self.process = None
            log.warning("child.ended", name=self.name, status=status, restart_in_s=self.pause_s)
        if self.process is None and now >= self.restart_at:
            self.start()

    def terminate(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def wait(self, until: float) -> None:
        if self.process is None:
            return
        try:
            self.process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("child.killed", name=self.name)
            self.process.kill()
            self.process.wait()


@dataclass(slots=True)
class Supervisor:
    """Owns the children; ends them in order: workers give their jobs back, then the gateway, then the server."""

    server: EmbeddedServer | None
    gateway: Child
    workers: list[Child]
    stopping: bool = field(default=False)
    restart_server_at: float = 0.0

    def children(self) -> list[Child]:
        return [self.gateway, *self.workers]

    def start(self) -> None:
        for child in self.children():
            child.start()

    def tend(self) -> None:
        """Start again what has ended. Raises ChildRefusedError."""
        if self.server is not None and not self.server.is_running and time.monotonic() >= self.restart_server_at:
            log.warning("server.ended")
            self.server.kill()
            try:
                self.server.start()
            except (EmbeddedServerError, OSError) as error:  # a full disk, for one: callers wait until there is room
                log.error("server.not_started", error=str(error), retry_in_s=_SERVER_PAUSE_S)
                self.restart_server_at = time.monotonic() + _SERVER_PAUSE_S
        for child in self.children():
            child.keep_running()

    def stop(self) -> None:
        until = time.monotonic() + _STOP_S
        for child in self.workers:
            child.terminate()
        self.gateway.terminate()
        for child in self.children():
            child.wait(until)
        if self.server is not None:
            self.server.stop()


def data_dir_of(path: Path | None) -> Path:
    """Return where queue and logs are kept."""
    if path is not None:
        return path
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "torchrelay"


async def prepare(settings: RedisSettings) -> tuple[str, str]:
    """Return a key that works and what the server's durability is; make a key if there is none. Raises ServingError."""
    redis = connect(settings)
    try:
        durability = await describe_durability(redis)
        key = await _development_key(ApiKeys(redis))
    finally:
        await redis.aclose()
    return key, durability.summary()


async def _development_key(api_keys: ApiKeys) -> str:
    path = credentials_file()
    if path.exists():
        key = path.read_text().strip()
        try:
            await api_keys.verify(key)
            return key
        except Unauthenticated:
            pass  # made for another data directory
    every_right = Grants(scopes=tuple(Scope), priorities=tuple(range(PRIORITY_CLASSES)))
    created = await api_keys.create(_DEV_TENANT, "development key of torchrelay serve", grants=every_right)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.fchmod(handle, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(created.secret + "\n")
    return created.secret


def check_address(address: str, *, insecure: bool) -> None:
    """Raise typer.BadParameter if an address is none, would be plaintext beyond loopback, or is taken already."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise typer.BadParameter(f"{address} is not host:port")
    if not insecure and not is_loopback(address):
        raise typer.BadParameter(
            f"{address} is beyond loopback and would be plaintext: API keys and prompts could be read on the way; "
            "bind to loopback, or allow it with --insecure"
        )
    host = host.strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise typer.BadParameter(
                f"{address} cannot be used ({error.strerror}): another server may be running; choose another port"
            ) from error


def wait_until_served(supervisor: Supervisor, address: str, key: str, stop: list[int]) -> model_pb2.Model | None:
    """Return the model once a worker serves it; None if asked to stop before."""
    with Client(address, api_key=key, insecure=True) as client:
        while not stop:
            supervisor.tend()
            try:
                for model in client.model.ListModels(
                    model_pb2.ListModelsRequest(), metadata=client.metadata, timeout=2
                ).models:
                    if model.state == model_pb2.MODEL_STATE_READY:
                        return model
            except (grpc.RpcError, RelayError):
                pass
            time.sleep(_POLL_S)
    return None


def serve(
    model: Annotated[str, typer.Option("--model", "-m", help="`demo`, a directory, or a Hub id.")] = "demo",
    model_name: Annotated[str, typer.Option("--model-name", help="Name that requests use.")] = "",
    workers: Annotated[int, typer.Option("--workers", "-w", min=0, help="Worker processes.")] = 1,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    address: Annotated[str, typer.Option("--address", "-a", help="Where clients call.")] = "127.0.0.1:50051",
    admin_address: Annotated[str, typer.Option("--admin-address", help="Where operators call.")] = "127.0.0.1:50052",
    openai_address: Annotated[
        str, typer.Option("--openai-address", help="Where OpenAI's clients call; empty: nowhere.")
    ] = "127.0.0.1:8000",
    metrics_address: Annotated[
        str,
        typer.Option(
            "--metrics-address",
            help="The gateway's metrics for Prometheus; workers take the next ports. Empty: nowhere.",
        ),
    ] = "127.0.0.1:9464",
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Where the queue is kept.")] = None,
    redis_url: Annotated[str, typer.Option("--redis-url", help="A server of your own instead.")] = "",
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow plaintext beyond loopback.")] = False,
) -> None:
    """Serve a model on this machine: gateway, workers and queue in one terminal. Not for production."""
    console = Console(stderr=True, highlight=False)
    # Children are started again while calls may be in progress here; grpc's handlers at a fork would crash the child.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    folder = data_dir_of(data_dir)
    settings = read_settings(RedisSettings)
    check_address(address, insecure=insecure)
    check_address(admin_address, insecure=insecure)
    if openai_address:  # empty: nowhere
        check_address(openai_address, insecure=insecure)
    monitored = _metrics_addresses(metrics_address, 1 + workers) if metrics_address else [""] * (1 + workers)
    for each in filter(None, monitored):
        check_address(each, insecure=insecure)
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, frame: stop.append(received))
    server: EmbeddedServer | None = None
    if not redis_url:
        server = EmbeddedServer(folder / "queue")
        try:
            server.start()
        except (EmbeddedServerError, OSError) as error:
            raise _failed(console, f"cannot keep the queue in {folder}: {error}") from error
        redis_url = server.url
    settings = settings.model_copy(update={"url": redis_url})
    try:
        key, durability = asyncio.run(prepare(settings))
    except (ServingError, OSError) as error:
        if server is not None:
            server.stop()
        reason = (
            f"{error.message}: {without_password(redis_url)}"
            if isinstance(error, ServingError)
            else f"cannot keep a key: {error}"
        )
        raise _failed(console, reason) from error
    log.info("queue.durability", url=without_password(redis_url), promise=durability)
    shared = {"TORCHRELAY_REDIS_URL": redis_url}
    supervisor = Supervisor(
        server,
        Child(
            "gateway",
            "gateway",
            shared | _gateway_env(address, admin_address, openai_address, monitored[0], insecure=insecure),
        ),
        [
            Child(f"worker-{index}", "worker", shared | _worker_env(model, model_name, dtype, device, where))
            for index, where in enumerate(monitored[1:])
        ],
    )
    supervisor.start()
    try:
        with console.status("loading the model ..."):
            found = wait_until_served(supervisor, address, key, stop) if workers else None
        if found is not None:
            program = os.path.relpath(Path(sys.argv[0])) if Path(sys.argv[0]).exists() else "torchrelay"
            sys.stdout.write(banner(found, address, admin_address, openai_address, monitored, key, program))
            sys.stdout.flush()
        while not stop:
            supervisor.tend()
            time.sleep(_POLL_S)
    except ChildRefusedError as error:
        raise _failed(console, str(error)) from error
    finally:
        supervisor.stop()


def without_password(url: str) -> str:
    """Return an address that may be shown."""
    return re.sub(r"//[^/]*@", "//", url)


def _failed(console: Console, reason: str) -> typer.Exit:
    console.print(f"[red]error:[/] {reason}", soft_wrap=True)
    return typer.Exit(1)


def _metrics_addresses(first: str, number: int) -> list[str]:
    """Return an address and those behind it, port by port. Raises typer.BadParameter."""
    host, _, port = first.rpartition(":")
    if not port.isdecimal():
        raise typer.BadParameter(f"{first} is not host:port")
    return [f"{host}:{int(port) + index}" for index in range(number)]


def _gateway_env(
    address: str, admin_address: str, openai_address: str, metrics_address: str, *, insecure: bool
) -> dict[str, str]:
    env = {
        "TORCHRELAY_GATEWAY_ADDRESS": address,
        "TORCHRELAY_GATEWAY_ADMIN_ADDRESS": admin_address,
        "TORCHRELAY_GATEWAY_OPENAI_ADDRESS": openai_address,
        "TORCHRELAY_GATEWAY_METRICS_ADDRESS": metrics_address,
        "TORCHRELAY_GATEWAY_REFLECTION": "true",
    }
    if insecure:
        env["TORCHRELAY_GATEWAY_INSECURE"] = "true"
    return env


def _worker_env(model: str, model_name: str, dtype: str, device: str, metrics_address: str) -> dict[str, str]:
    return {
        "TORCHRELAY_WORKER_MODEL": model,
        "TORCHRELAY_WORKER_MODEL_NAME": model_name,
        "TORCHRELAY_WORKER_DTYPE": dtype,
        "TORCHRELAY_WORKER_DEVICE": device,
        "TORCHRELAY_WORKER_METRICS_ADDRESS": metrics_address,
    }
