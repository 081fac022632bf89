"""One attack on a gateway while a good client keeps calling: what the attack cost, and what the client felt."""

from __future__ import annotations

import asyncio
import resource
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.builders_system import System
from tests.security.attacks import ATTACKS
from torchrelay.v1 import model_pb2

_PROBE_S = 0.05
_TICKS_PER_S = 100


@dataclass(frozen=True, slots=True)
class Damage:
    """Figures of one attack. Memory is what the gateway keeps afterwards."""

    attack: str
    sent_kb: int  # that the gateway took, headers of frames included
    seconds: float
    gateway_cpu_s: float
    rss_growth_mb: float
    probes: int
    failed_probes: int
    probe_p50_ms: float
    probe_max_ms: float
    serves_afterwards: bool

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


async def suffer(system: System, name: str, num_frames: int) -> Damage:
    """Attack the first gateway and measure."""
    gateway = system.gateways[0]
    assert gateway.process is not None
    pid = gateway.process.pid
    latencies: list[float] = []
    failed = 0
    async with system.client(gateway) as client:

        async def probe() -> None:
            nonlocal failed
            began = time.perf_counter()
            try:
                await client.model.ListModels(model_pb2.ListModelsRequest(), metadata=client.metadata, timeout=10)
            except Exception:  # noqa: BLE001 - whatever it is, a good call failed
                failed += 1
            latencies.append((time.perf_counter() - began) * 1000)

        await probe()
        latencies.clear()
        cpu, memory, began = _cpu_s(pid), _resident_mb(pid), time.perf_counter()
        attack = asyncio.create_task(asyncio.to_thread(ATTACKS[name], gateway.address, num_frames))
        while not attack.done():
            await probe()
            await asyncio.wait({attack}, timeout=_PROBE_S)
        num_sent = await attack
        seconds = time.perf_counter() - began
        during = failed
        await probe()
        return Damage(
            attack=name,
            sent_kb=round(num_sent / 1000),
            seconds=round(seconds, 2),
            gateway_cpu_s=round(_cpu_s(pid) - cpu, 2),
            rss_growth_mb=round(_resident_mb(pid) - memory, 1),
            probes=len(latencies),
            failed_probes=during,
            probe_p50_ms=round(statistics.median(latencies), 1),
            probe_max_ms=round(max(latencies), 1),
            serves_afterwards=failed == during,
        )


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
