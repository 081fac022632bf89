"""A whole deployment for faults: a server, gateways and workers, and a proxy on every line between them.

    client ── link ──▶ gateway ── link ──▶ server ◀── link ── worker

Whatever ends is started again by `tend`, as Kubernetes or `torchrelay serve` would, unless a fault holds it down.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import redis as redis_sync
import redis.asyncio as redis_asyncio

from common import keys
from common.api_keys import ApiKeys
from common.embedded import EmbeddedServer, EmbeddedServerError, find_server
from common.redis import connect
from common.settings import RedisSettings
from tests.chaos.processes import Party
from tests.chaos.proxy import Link
from tests.chaos.shim import Shim, build, wrap_program
from tests.ports import free_port
from tests.zygote import Zygote
from torchrelay.client import AsyncClient

MODEL: Final = "tiny"
TENANTS: Final = ("red", "blue")
LEASE_S: Final = 3.0
_TEND_S: Final = 0.05
_HOUR_MS: Final = 3_600_000

QUEUE_ENV: Final = {
    "TORCHRELAY_QUEUE_WORKER_LEASE_MS": str(int(LEASE_S * 1000)),
    "TORCHRELAY_QUEUE_GATEWAY_LEASE_MS": str(int(LEASE_S * 1000)),
    # Far beyond an hour, which clocks are moved by: what is to be seen is that nothing else depends on them.
    "TORCHRELAY_QUEUE_DEFAULT_LIFETIME_MS": str(20 * _HOUR_MS),
    "TORCHRELAY_QUEUE_RETENTION_MS": str(20 * _HOUR_MS),
    "TORCHRELAY_QUEUE_MAX_DISCONNECT_GRACE_MS": str(20 * _HOUR_MS),
    "TORCHRELAY_QUEUE_REPLY_TTL_MS": str(20 * _HOUR_MS),
    # A job may be hit again and again here without ever having been at fault.
    "TORCHRELAY_QUEUE_MAX_FRUITLESS_ATTEMPTS": "12",
    "TORCHRELAY_QUEUE_MAX_CLAIMS": "500",
}


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything there is."""

    gateways: int = 2
    workers: int = 3
    pace_s: float = 0.03  # of a step, besides what it takes


class ChaosSystem:
    """The deployment; an async context manager. `patches` go into every gateway and worker (see `patches.py`)."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        size: Size,
        rng: random.Random,
        *,
        patches: Iterable[str] = (),
        env: dict[str, str] | None = None,
        worker_env: dict[str, str] | None = None,
        is_durable: bool = True,
    ) -> None:
        self.folder = folder
        self.size = size
        self._model = model
        self._rng = rng
        self._patches = tuple(patches)
        self._env = {**QUEUE_ENV, **(env or {})}
        self._worker_env = worker_env or {}
        self._sockets = Path(tempfile.mkdtemp(prefix="chaos-"))  # a socket's path must be short
        library = build(folder)
        self.server_shim = Shim(library, folder / "server.shim")
        self.party_shim = Shim(library, folder / "parties.shim")
        self._is_durable = is_durable
        self.server = EmbeddedServer(
            folder / "queue", program=wrap_program(find_server(), self.server_shim, folder / "server-program")
        )
        self._num_holds = 0  # faults that want the server to stay away for a while
        self._server_changes = asyncio.Lock()  # starts and kills take turns
        self.gateways: list[Party] = []
        self.workers: list[Party] = []
        self.to_server: dict[str, Link] = {}  # by party
        self.to_gateway: dict[str, Link] = {}  # by gateway
        self.keys: dict[str, str] = {}  # API key of each tenant
        self.shard = ""
        self._zygotes: dict[str, Zygote] = {}
        self._tending: asyncio.Task[None] | None = None
        self._superuser: redis_asyncio.Redis | None = None

    # -- start and end --------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        try:
            for role in ("worker", "gateway"):
                self._zygotes[role] = Zygote(role, self.party_shim.env, self.folder / f"zygote-{role}.log")
            self._start_server()
            await self._create_keys()
            for zygote in self._zygotes.values():
                await asyncio.to_thread(zygote.wait_ready)
            for index in range(self.size.gateways):
                await self._add_gateway(f"gateway-{index}")
            for index in range(self.size.workers):
                await self._add_worker(f"worker-{index}")
            for party in self.parties:
                party.start()
            self._tending = asyncio.create_task(self._tend())
            await self._wait_until_served()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.gather(self._tending, return_exceptions=True)
        for party in self.parties:
            party.signal(signal.SIGCONT)
            await asyncio.to_thread(party.kill)
        for zygote in self._zygotes.values():
            zygote.close()
        for link in self.links:
            await link.close()
        if self._superuser is not None:
            await self._superuser.aclose()
        self.continue_server()
        self.server.stop()
        self.server_shim.close()
        self.party_shim.close()
        shutil.rmtree(self._sockets, ignore_errors=True)

    async def _create_keys(self) -> None:
        redis = connect(RedisSettings(url=self.server.url))
        try:
            for tenant in TENANTS:
                self.keys[tenant] = (await ApiKeys(redis).create(tenant, "chaos")).secret
        finally:
            await redis.aclose()

    async def _link_to_server(self, name: str) -> dict[str, str]:
        """Open a party's line to the server; return the variables that lead it there."""
        link = Link(f"{name} to server", self._sockets / f"{name}.sock", self.server.socket_path, self._rng)
        await link.open()
        self.to_server[name] = link
        return {
            "TORCHRELAY_REDIS_URL": f"unix://{link.source}",
            "TORCHRELAY_REDIS_SOCKET_TIMEOUT_MS": "2000",  # below the lease
            "TORCHRELAY_LOG_FORMAT": "json",
            **self._env,
        }

    async def _add_gateway(self, name: str) -> None:
        env = await self._link_to_server(name)
        address, admin_address = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        env |= {
            "TORCHRELAY_GATEWAY_ADDRESS": address,
            "TORCHRELAY_GATEWAY_ADMIN_ADDRESS": admin_address,
            "TORCHRELAY_GATEWAY_DRAIN_S": "0.5",
        }
        link = Link(f"clients to {name}", f"127.0.0.1:{free_port()}", address, self._rng)
        await link.open()
        self.to_gateway[name] = link
        party = Party(name, "gateway", self._zygotes["gateway"], env, self.folder / f"{name}.log", self._patches)
        party.address, party.admin_address = address, admin_address
        self.gateways.append(party)

    async def _add_worker(self, name: str) -> None:
        env = await self._link_to_server(name)
        env |= {
            "TORCHRELAY_WORKER_MODEL": str(self._model),
            "TORCHRELAY_WORKER_MODEL_NAME": MODEL,
            "TORCHRELAY_WORKER_DTYPE": "float32",
            "TORCHRELAY_WORKER_NUM_THREADS": "1",
            "TORCHRELAY_WORKER_DRAIN_S": "1",
            "TORCHRELAY_WORKER_MAX_JOBS": "32",
            "TORCHRELAY_ENGINE_KV_CACHE_BYTES": str(32 << 20),
            **self._worker_env,
        }
        patches = (f"pace:{self.size.pace_s}", *self._patches) if self.size.pace_s else self._patches
        self.workers.append(Party(name, "worker", self._zygotes["worker"], env, self.folder / f"{name}.log", patches))

    async def _wait_until_served(self, timeout_s: float = 60.0) -> None:
        """Wait until each gateway knows of each worker."""
        end = time.monotonic() + timeout_s
        for gateway in self.gateways:
            async with AsyncClient(gateway.address, api_key=self.keys[TENANTS[0]], insecure=True) as client:
                while [model.num_workers for model in await client.models()] != [self.size.workers]:
                    if time.monotonic() > end:
                        logs = "\n".join(party.log() for party in self.parties)
                        raise AssertionError(f"not served after {timeout_s} s:\n{logs}")
                    await asyncio.sleep(0.1)
        (name,) = await self.superuser.keys("*:wl")
        self.shard = name.decode()[1:].partition("}")[0]

    # -- parts ----------------------------------------------------------------------------------------------------

    @property
    def parties(self) -> list[Party]:
        return [*self.gateways, *self.workers]

    @property
    def links(self) -> list[Link]:
        return [*self.to_server.values(), *self.to_gateway.values()]

    @property
    def superuser(self) -> redis_asyncio.Redis:
        """A connection past all proxies, to look inside and to harm."""
        if self._superuser is None:
            self._superuser = connect(RedisSettings(url=self.server.url))
        return self._superuser

    # -- the server -----------------------------------------------------------------------------------------------

    def stop_server(self) -> None:
        """Freeze the server's process."""
        if self.server.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.server.pid, signal.SIGSTOP)

    def continue_server(self) -> None:
        """Let it run again."""
        if self.server.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.server.pid, signal.SIGCONT)

    async def kill_server(self) -> None:
        """As kill -9 does; it is started again."""
        async with self._server_changes:
            self.continue_server()
            await asyncio.to_thread(self.server.kill)

    @contextlib.asynccontextmanager
    async def server_killed(self) -> AsyncIterator[None]:
        """Kill it, and keep it away meanwhile."""
        self._num_holds += 1
        try:
            await self.kill_server()
            yield
        finally:
            self._num_holds -= 1

    # -- what keeps it running ------------------------------------------------------------------------------------

    async def _tend(self) -> None:
        """Start again what has ended and is wanted."""
        while True:
            if not self.server.is_running:
                async with self._server_changes:
                    if not self._num_holds:
                        with contextlib.suppress(EmbeddedServerError, OSError):  # a full disk: tried again
                            await asyncio.to_thread(self._start_server)
            for party in self.parties:
                if party.wanted and not party.is_running:
                    await asyncio.to_thread(party.start)
            await asyncio.sleep(_TEND_S)

    def _start_server(self) -> None:
        self.server.kill()
        self.server.start()
        if not self._is_durable:
            with redis_sync.Redis(unix_socket_path=str(self.server.socket_path)) as client:
                client.config_set("appendonly", "no")

    async def wait_until_whole(self, timeout_s: float = 60.0) -> None:
        """Wait until all parties run and all workers have a lease. Raises AssertionError."""
        end = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(Exception):
                now_s = time.time()
                leases = await self.superuser.zcount(keys.worker_leases(self.shard), int(now_s * 1000), "+inf")
                if leases >= self.size.workers and all(party.is_running for party in self.parties):
                    return
            assert time.monotonic() < end, "the system does not become whole again"
            await asyncio.sleep(0.1)
