"""What can be done to a running system, each kind by its name. Every fault heals itself before it returns.

The number behind a kind is its row in PROTOCOL's fault table; `README.md` beside this file lists all rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeAlias

import redis.exceptions

from common import keys
from tests.chaos.processes import Party
from tests.chaos.proxy import Link
from tests.chaos.system import LEASE_S, ChaosSystem

HOUR_S: Final = 3600
_TORN: Final = b"*4\r\n$4\r\nHSET\r\n$9\r\n{tiny}:le"  # the beginning of a command


class Strike:
    """One fault in the making: what it may use, and whom it says to have hit."""

    def __init__(
        self, system: ChaosSystem, rng: random.Random, hit: Callable[[str, Party | None], Awaitable[None]]
    ) -> None:
        """`hit(name, party)` is to be awaited just before the harm is done; None is everybody."""
        self.system = system
        self.rng = rng
        self.hit = hit

    def worker(self) -> Party:
        """Choose a worker that runs."""
        return self.rng.choice([party for party in self.system.workers if party.is_running] or self.system.workers)

    def gateway(self) -> Party:
        """Choose a gateway that runs."""
        return self.rng.choice([party for party in self.system.gateways if party.is_running] or self.system.gateways)

    async def admin(self, *command: str | int | bytes) -> object:
        """Send the server a command past all proxies; nothing happens where it does not answer."""
        with contextlib.suppress(redis.exceptions.RedisError, OSError):
            return await self.system.superuser.execute_command(*command)
        return None


Fault: TypeAlias = Callable[[Strike], Awaitable[None]]
FAULTS: Final[dict[str, Fault]] = {}


def fault(function: Fault) -> Fault:
    """Register a fault under its function's name."""
    FAULTS[function.__name__.replace("_", "-")] = function  # type: ignore[attr-defined]
    return function


# -- processes ------------------------------------------------------------------------------------------------------


@fault
async def kill_worker(strike: Strike) -> None:
    """Rows 1, 2, 3."""
    party = strike.worker()
    await strike.hit(party.name, party)
    await asyncio.to_thread(party.kill)


@fault
async def kill_gateway(strike: Strike) -> None:
    """Rows 12, 13."""
    party = strike.gateway()
    await strike.hit(party.name, party)
    await asyncio.to_thread(party.kill)


@fault
async def kill_server(strike: Strike) -> None:
    """Row 17."""
    await strike.hit("server", None)
    await strike.system.kill_server()


@fault
async def kill_all_workers(strike: Strike) -> None:
    """Row 5."""
    await strike.hit("all workers", None)
    await _kill(strike.system.workers)


@fault
async def kill_everything(strike: Strike) -> None:
    """Row 19."""
    await strike.hit("everything", None)
    async with strike.system.server_killed():
        await _kill(strike.system.parties)


async def _kill(parties: list[Party]) -> None:
    await asyncio.gather(*(asyncio.to_thread(party.kill) for party in parties))


@fault
async def terminate_worker(strike: Strike) -> None:
    """A rolling upgrade: SIGTERM, drain, and a new incarnation."""
    party = strike.worker()
    await strike.hit(party.name, party)
    party.signal(signal.SIGTERM)


@fault
async def terminate_gateway(strike: Strike) -> None:
    """Row 14."""
    party = strike.gateway()
    await strike.hit(party.name, party)
    party.signal(signal.SIGTERM)


@fault
async def pause_worker_beyond_its_lease(strike: Strike) -> None:
    """Row 6."""
    party = strike.worker()
    await strike.hit(party.name, party)
    await _pause(party, strike.rng.uniform(1.3, 2) * LEASE_S)


@fault
async def pause_worker_within_its_lease(strike: Strike) -> None:
    """Row 7."""
    party = strike.worker()
    await strike.hit(party.name, party)
    await _pause(party, strike.rng.uniform(0.2, 0.5) * LEASE_S)


@fault
async def pause_gateway(strike: Strike) -> None:
    """Row 15; long pauses cost it its lease too."""
    party = strike.gateway()
    await strike.hit(party.name, party)
    await _pause(party, strike.rng.uniform(0.5, 1.6) * LEASE_S)


@fault
async def pause_server(strike: Strike) -> None:
    """Row 22."""
    await strike.hit("server", None)
    strike.system.stop_server()
    try:
        await asyncio.sleep(strike.rng.uniform(1, 5))
    finally:
        strike.system.continue_server()


@fault
async def pause_everything(strike: Strike) -> None:
    """A machine that was suspended: nobody has seen time pass, but the clocks."""
    system = strike.system
    await strike.hit("everything", None)
    pauses = [_pause(party, strike.rng.uniform(1, 5)) for party in system.parties]
    system.stop_server()
    try:
        await asyncio.gather(*pauses)
    finally:
        system.continue_server()


async def _pause(party: Party, seconds: float) -> None:
    pid = party.pid
    party.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        if party.pid == pid:
            party.signal(signal.SIGCONT)


# -- the wire -------------------------------------------------------------------------------------------------------


async def _bad_weather(strike: Strike, party: Party, seconds: float, **weather: object) -> None:
    await _on_link(strike, strike.system.to_server[party.name], party, seconds, **weather)


async def _on_link(strike: Strike, link: Link, party: Party, seconds: float, **weather: object) -> None:
    await strike.hit(link.name, party)
    link.change(**weather)
    try:
        await asyncio.sleep(seconds)
    finally:
        link.heal()


@fault
async def partition_worker(strike: Strike) -> None:
    """Row 27: nothing passes for longer than a lease; then what was held back arrives."""
    await _bad_weather(strike, strike.worker(), strike.rng.uniform(1.2, 2) * LEASE_S, frozen_up=True, frozen_down=True)


@fault
async def partition_gateway(strike: Strike) -> None:
    """Row 25: the connection stays open, and nobody answers."""
    await _bad_weather(strike, strike.gateway(), strike.rng.uniform(0.5, 2) * LEASE_S, frozen_up=True, frozen_down=True)


@fault
async def hold_back_requests_of_worker(strike: Strike) -> None:
    """A commit that arrives when its sender has long sent it again."""
    await _bad_weather(strike, strike.worker(), strike.rng.uniform(1, 3), frozen_up=True)


@fault
async def lose_replies_to_worker(strike: Strike) -> None:
    """Rows 4 and 24: the script ran, and its caller does not know."""
    party = strike.worker()
    await _bad_weather(strike, party, 1.5, replies_to_lose=strike.rng.randrange(1, 4))


@fault
async def lose_replies_to_gateway(strike: Strike) -> None:
    """Row 24."""
    party = strike.gateway()
    await _bad_weather(strike, party, 1.5, replies_to_lose=strike.rng.randrange(1, 6))


@fault
async def reset_connections_to_server(strike: Strike) -> None:
    """Every party's at once."""
    await strike.hit("all lines to the server", None)
    for link in strike.system.to_server.values():
        link.cut()


@fault
async def slow_lines(strike: Strike) -> None:
    """Row 26."""
    await strike.hit("all lines to the server", None)
    links = strike.system.to_server.values()
    for link in links:
        link.change(delay_s=0.05, jitter_s=0.02)
    try:
        await asyncio.sleep(strike.rng.uniform(2, 4))
    finally:
        for link in links:
            link.heal()


@fault
async def server_unreachable(strike: Strike) -> None:
    """Row 23, for one gateway."""
    party = strike.gateway()
    strike.system.to_server[party.name].cut()
    await _bad_weather(strike, party, strike.rng.uniform(1, 5), refuses=True)


@fault
async def reset_connections_of_callers(strike: Strike) -> None:
    """All calls at a gateway break."""
    party = strike.gateway()
    await strike.hit(f"callers of {party.name}", party)
    strike.system.to_gateway[party.name].cut()


@fault
async def freeze_connections_of_callers(strike: Strike) -> None:
    """Rows 25 and 38: callers stop reading, or seem to."""
    party = strike.gateway()
    link = strike.system.to_gateway[party.name]
    await _on_link(strike, link, party, strike.rng.uniform(1, 5), frozen_up=True, frozen_down=True)


# -- the server's memory and disk -----------------------------------------------------------------------------------


@fault
async def torn_log(strike: Strike) -> None:
    """Row 20: the server is killed in the middle of a write that nobody has been answered."""
    system = strike.system
    await strike.hit("server", None)
    async with system.server_killed():
        folder = system.folder / "queue" / "appendonlydir"
        torn = _TORN[: strike.rng.randrange(5, len(_TORN))]
        await asyncio.to_thread(_append, max(folder.glob("*.incr.aof"), key=_number), torn)


def _number(path: Path) -> int:
    return int(path.name.split(".")[-3])


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


@fault
async def slow_fsync(strike: Strike) -> None:
    """Each write waits for a slow disk; in the end the server is killed while it waits (row 18)."""
    await strike.hit("server", None)
    strike.system.server_shim.set_fsync_delay(strike.rng.choice([0.05, 0.3, 1.0]))
    try:
        await asyncio.sleep(strike.rng.uniform(2, 4))
        if strike.rng.random() < 0.5:
            await strike.system.kill_server()
    finally:
        strike.system.server_shim.set_fsync_delay(0)


@fault
async def disk_full(strike: Strike) -> None:
    """Row 31: the server ends at its first write, and cannot start while there is no space."""
    await strike.hit("server", None)
    strike.system.server_shim.set_disk_full(True)
    try:
        await asyncio.sleep(strike.rng.uniform(0.5, 2))
    finally:
        strike.system.server_shim.set_disk_full(False)


@fault
async def memory_full(strike: Strike) -> None:
    """Row 30."""
    await strike.hit("server", None)
    await strike.admin("CONFIG", "SET", "maxmemory", 1)
    try:
        await asyncio.sleep(strike.rng.uniform(1, 3))
    finally:
        for _ in range(100):  # the server may be restarting after another fault; it forgets the setting then
            if await strike.admin("CONFIG", "SET", "maxmemory", 0) is not None:
                break
            await asyncio.sleep(0.1)


@fault
async def forget_scripts(strike: Strike) -> None:
    """Row 32."""
    await strike.hit("server", None)
    await strike.admin("SCRIPT", "FLUSH")


@fault
async def block_server(strike: Strike) -> None:
    """Row 33: somebody's slow script."""
    await strike.hit("server", None)
    slow = "local t = redis.call('TIME') while redis.call('TIME')[1] - t[1] < tonumber(ARGV[1]) do end"
    await strike.admin("EVAL", slow, 0, strike.rng.randrange(1, 4))


@fault
async def trim_replies(strike: Strike) -> None:
    """Row 34."""
    party = strike.gateway()
    await strike.hit(party.name, party)
    for _ in range(10):
        for name in await _names(strike, keys.reply_stream(strike.system.shard, "*")):
            await strike.admin("XTRIM", name, "MAXLEN", 0)
        await asyncio.sleep(0.05)


@fault
async def lose_bell(strike: Strike) -> None:
    """Row 35."""
    await strike.hit("server", None)
    for _ in range(10):
        await strike.admin("DEL", keys.bell(strike.system.shard))
        await asyncio.sleep(0.05)


async def _names(strike: Strike, pattern: str) -> list[bytes]:
    found = await strike.admin("KEYS", pattern)
    return found if isinstance(found, list) else []


# -- clocks ---------------------------------------------------------------------------------------------------------


@fault
async def step_clocks_of_parties(strike: Strike) -> None:
    """Row 36: an hour forward or back for all gateways and workers; nothing may depend on it."""
    await strike.hit("all gateways and workers", None)
    strike.system.party_shim.set_clock_offset(strike.rng.choice([-HOUR_S, HOUR_S]))
    try:
        await asyncio.sleep(strike.rng.uniform(1, 4))
    finally:
        strike.system.party_shim.set_clock_offset(0)


@fault
async def step_clock_of_server(strike: Strike) -> None:
    """Row 37: at worst leases end early, or a lease later."""
    await strike.hit("server", None)
    strike.system.server_shim.set_clock_offset(strike.rng.choice([-HOUR_S, HOUR_S]))
    try:
        await asyncio.sleep(strike.rng.uniform(1, 4))
    finally:
        strike.system.server_shim.set_clock_offset(0)
