"""A whole system for tests: a real server, gateways and workers as processes on loopback, and ways to kill them."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from common.api_keys import ApiKeys
from common.embedded import EmbeddedServer
from common.grants import Grants
from common.redis import connect
from common.settings import RedisSettings
from tests.ports import free_port
from tests.zygote import ROLES, ForkedProcess, Zygote
from torchrelay.admin.v1beta1 import fleet_pb2, fleet_pb2_grpc
from torchrelay.client import AsyncClient, RetryPolicy
from torchrelay.v1 import model_pb2

START_S = 90.0
zygotes: dict[str, Zygote] = {}  # by role; where there is none, a process starts by itself, imports and all


def start_zygotes(folder: Path) -> None:
    """Have gateways and workers started in a second instead of seven from now on, until this process ends."""
    for role in ("worker", "gateway"):
        zygotes[role] = Zygote(role, {}, folder / f"zygote-{role}.log")
        atexit.register(zygotes[role].close)


@dataclass
class Process:
    """A gateway or worker; its log goes to a file that a failing test can show."""

    name: str
    module: str
    env: dict[str, str]
    log_path: Path
    is_special: bool = False  # has settings of its own
    process: subprocess.Popen[bytes] | ForkedProcess | None = None

    def start(self) -> None:
        assert self.process is None
        zygote = zygotes.get(ROLES.get(self.module, self.module))
        if zygote is not None:
            self.process = ForkedProcess(zygote, self.module, self.env, self.log_path)
            return
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module],
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """As kill -9 does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self, timeout_s: float = 30) -> int:
        """SIGTERM, and wait; return the exit status."""
        assert self.process is not None
        self.process.terminate()
        status = self.process.wait(timeout_s)
        self.process = None
        return status

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""


@dataclass
class Gateway(Process):
    """A gateway process with its addresses."""

    address: str = ""
    admin_address: str = ""
    openai_address: str = ""


@dataclass
class System:
    """Everything of one deployment, in one directory. Use as a context manager."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)
    gateways: list[Gateway] = field(default_factory=list)
    workers: list[Process] = field(default_factory=list)
    key: str = ""

    def __post_init__(self) -> None:
        self.server = EmbeddedServer(self.folder / "queue")

    def __enter__(self) -> System:
        self.server.start()
        self.key = self.create_key("tests")
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self.workers, *self.gateways):
            if process.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    process.signal(signal.SIGCONT)
                process.kill()
        self.server.stop()

    def create_key(self, tenant: str, **grants: Any) -> str:
        """Make an API key and return it; its rights as in Grants."""

        async def create() -> str:
            redis = connect(RedisSettings(url=self.server.url))
            try:
                return (await ApiKeys(redis).create(tenant, "test", grants=Grants(**grants))).secret
            finally:
                await redis.aclose()

        with ThreadPoolExecutor(1) as thread:  # callers may be inside an event loop
            return thread.submit(lambda: asyncio.run(create())).result()

    def _shared_env(self) -> dict[str, str]:
        return {"TORCHRELAY_REDIS_URL": self.server.url, "TORCHRELAY_LOG_FORMAT": "json", **self.env}

    def add_gateway(self, *, start: bool = True, **env: str) -> Gateway:
        """Start a gateway; `ready` waits for it."""
        address, admin_address, openai_address = (f"127.0.0.1:{free_port()}" for _ in range(3))
        name = f"gateway-{free_port()}"
        gateway = Gateway(
            name,
            "gateway",
            {
                **self._shared_env(),
                "TORCHRELAY_GATEWAY_ADDRESS": address,
                "TORCHRELAY_GATEWAY_ADMIN_ADDRESS": admin_address,
                "TORCHRELAY_GATEWAY_OPENAI_ADDRESS": openai_address,
                **env,
            },
            self.folder / f"{name}.log",
            is_special=bool(env),
            address=address,
            admin_address=admin_address,
            openai_address=openai_address,
        )
        self.gateways.append(gateway)
        if start:
            gateway.start()
        return gateway

    def add_worker(self, model: str | Path, name: str = "tiny", *, start: bool = True, **env: str) -> Process:
        """Start a worker that serves a model directory (or "demo") under a name."""
        label = f"worker-{free_port()}"
        worker = Process(
            label,
            "worker",
            {
                **self._shared_env(),
                "TORCHRELAY_WORKER_MODEL": str(model),
                "TORCHRELAY_WORKER_MODEL_NAME": name,
                "TORCHRELAY_WORKER_DTYPE": "float32",
                "TORCHRELAY_WORKER_NUM_THREADS": "1",
                "TORCHRELAY_ENGINE_KV_CACHE_BYTES": str(64 << 20),
                **env,
            },
            self.folder / f"{label}.log",
            is_special=bool(env),
        )
        self.workers.append(worker)
        if start:
            worker.start()
        return worker

    async def scale(self, model: str | Path, *, gateways: int = 1, workers: int = 1, name: str = "tiny") -> None:
        """Have so many plain gateways and workers and no others, whatever a test before has killed; wait for them."""
        for group, count in ((self.gateways, gateways), (self.workers, workers)):
            plain = [process for process in group if not process.is_special][:count]
            for process in group:
                if process not in plain:
                    process.kill()
            group[:] = plain  # type: ignore[assignment]
            for process in plain:
                if not process.is_running:
                    process.process = None
                    process.start()
        while len(self.gateways) < gateways:
            self.add_gateway()
        while len(self.workers) < workers:
            self.add_worker(model, name)
        if gateways:
            await self.ready(name, num_workers=workers)

    def client(self, gateway: Gateway | None = None, *, key: str | None = None, **options: Any) -> AsyncClient:
        """Return a client of one gateway, or of all of them (the first that answers)."""
        if gateway is not None:
            address = gateway.address
        else:
            address = "ipv4:" + ",".join(gateway.address for gateway in self.gateways)
        options.setdefault("retry", RetryPolicy(give_up_after_s=60))
        return AsyncClient(address, api_key=key or self.key, insecure=True, **options)

    async def ready(self, *models: str, num_workers: int = 1) -> None:
        """Wait until each running gateway knows the models with their workers. Raises AssertionError with the logs."""
        end = time.monotonic() + START_S
        for gateway in self.gateways:
            if gateway.process is not None:
                await self._ready(gateway, models, num_workers, end)

    async def _ready(self, gateway: Gateway, models: tuple[str, ...], num_workers: int, end: float) -> None:
        async with self.client(gateway) as client:
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    request = model_pb2.ListModelsRequest()
                    response = await client.model.ListModels(request, metadata=client.metadata, timeout=5)
                    workers = {model.name: model.num_workers for model in response.models}
                    if all(workers.get(model, 0) == num_workers for model in models):
                        return
                for process in (*self.gateways, *self.workers):
                    if process.process is not None and not process.is_running:
                        raise AssertionError(f"{process.name} has ended:\n{process.log()}")
                if time.monotonic() > end:
                    logs = "\n".join(process.log() for process in (*self.gateways, *self.workers))
                    raise AssertionError(f"not ready after {START_S} s:\n{logs}")
                await asyncio.sleep(0.1)

    async def fleet(self, gateway: Gateway | None = None) -> list[fleet_pb2.Worker]:
        """Return the workers as operators see them."""
        address = (gateway or self.gateways[0]).admin_address
        async with grpc.aio.insecure_channel(address) as channel:
            stub: fleet_pb2_grpc.FleetServiceAsyncStub = fleet_pb2_grpc.FleetServiceStub(channel)
            return list((await stub.ListWorkers(fleet_pb2.ListWorkersRequest())).workers)

    async def worker_of(self, generation_id: str) -> Process:
        """Return the process that runs a generation now."""
        async with grpc.aio.insecure_channel(self.gateways[0].admin_address) as channel:
            stub: fleet_pb2_grpc.FleetServiceAsyncStub = fleet_pb2_grpc.FleetServiceStub(channel)
            response = await stub.ListGenerations(fleet_pb2.ListGenerationsRequest(page_size=1000))
        owner = next(info.worker_id for info in response.generations if info.generation_id == generation_id)
        host = next(worker.host for worker in await self.fleet() if worker.worker_id == owner)
        pid = int(host.rpartition(":")[2])
        return next(worker for worker in self.workers if worker.process is not None and worker.process.pid == pid)


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 30, what: str = "the condition") -> None:
    """Wait until a condition holds. Raises AssertionError."""
    end = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < end, f"{what} does not hold after {timeout_s} s"
        await asyncio.sleep(0.05)


@contextlib.contextmanager
def running_system(folder: Path, **env: str) -> Iterator[System]:
    """A system whose workers' leases are short, so that takeovers take seconds instead of ten, and so are their beats.

    Gateways keep theirs: one that waits for a core beside other tests would lose its callers.
    """
    with System(folder, {"TORCHRELAY_QUEUE_WORKER_LEASE_MS": "2500", **env}) as system:
        yield system


@contextlib.contextmanager
def gateway_and_worker(folder: Path, model: Path, name: str) -> Iterator[System]:
    """One of each, ready to serve the model of this directory under this name."""
    with running_system(folder) as system:
        system.add_gateway()
        system.add_worker(model, name)
        asyncio.run(system.ready(name))
        yield system
