"""The picture of `torchrelay top` in the README, of a real system under load.

Run as `python -m tests.screenshots.top FILE.svg`. Two workers with SmolLM2-135M-Instruct, tenants that ask for more
than they can serve, and the picture that the command draws from the gateway's snapshots.
"""

from __future__ import annotations

import asyncio
import io
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import grpc
from rich.console import Console

from tests.builders_system import System, until
from torchrelay.cli.fleet_rates import Rates
from torchrelay.cli.fleet_stream import follow, request_of
from torchrelay.cli.fleet_view import Frame
from torchrelay.client import AsyncClient
from torchrelay.v1 import generation_pb2 as pb

MODEL: Final = "smollm2-135m-instruct"
WIDTH, HEIGHT = 122, 34
# Tenant, priority, generations.
LOAD: Final = (
    ("acme", pb.PRIORITY_NORMAL, 60),
    ("globex", pb.PRIORITY_NORMAL, 30),
    ("reports", pb.PRIORITY_LOW, 40),
    ("support", pb.PRIORITY_HIGH, 6),
)
NUM_READERS: Final = 6
_RUNNING_S: Final = 12.0


def request_for(index: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "input": pb.GenerationInput(text=f"The story number {index} of a lighthouse keeper and the sea."),
        "config": pb.GenerationConfig(max_tokens=700, temperature=0.8, ignore_eos=True),
    }


async def put_under_load(system: System, client: AsyncClient) -> None:
    """Queue more than the workers can hold, of several tenants, and wait until both compute."""
    for tenant, priority, count in LOAD:
        metadata = [("authorization", f"Bearer {system.create_key(tenant, priorities=(0, 1, 2))}")]
        for index in range(count):
            request = pb.SubmitGenerationRequest(**request_for(index), priority=priority)
            await client.generation.SubmitGeneration(request, metadata=metadata)

    async def is_computing() -> bool:
        return all(worker.generated_tokens > 0 for worker in await system.fleet())

    await until(is_computing, timeout_s=120, what="work of both workers")


async def read(client: AsyncClient, index: int) -> None:
    """A caller that reads its stream."""
    call = client.generation.StreamGenerate(pb.StreamGenerateRequest(**request_for(index)), metadata=client.metadata)
    async for _ in call:
        pass


def picture(address: str, seconds: float) -> Frame:
    """The last of the snapshots of so many seconds, with the rates of all of them."""
    rates = Rates()
    with grpc.insecure_channel(address) as channel:
        began_ms = 0
        for update in follow(channel, request_of("", 0.5, max_generations=100)):
            if update.snapshot is None:
                continue
            rates.add(update.snapshot)
            now_ms = update.snapshot.time.ToMilliseconds()
            began_ms = began_ms or now_ms
            if now_ms - began_ms >= seconds * 1000:
                return Frame(update.snapshot, rates)
    raise AssertionError("the stream never ends")


def write_svg(frame: Frame, path: Path) -> None:
    """As a terminal would show it; the file asks for no font from elsewhere."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(frame.render(WIDTH, HEIGHT))
    svg = console.export_svg(title="torchrelay top")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"\s*@font-face \{.*?\}\n", "\n", svg, flags=re.DOTALL))


def main() -> None:
    """Run the system and write the picture."""
    (target,) = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder, System(Path(folder)) as system:
        gateway = system.add_gateway()
        for _ in range(2):
            system.add_worker("demo", MODEL, TORCHRELAY_ENGINE_MAX_NUM_SEQS="12")
        asyncio.run(system.ready(MODEL, num_workers=2))

        async def draw() -> Frame:
            async with system.client() as client:
                readers = [asyncio.create_task(read(client, index)) for index in range(NUM_READERS)]
                try:
                    await put_under_load(system, client)
                    return await asyncio.to_thread(picture, gateway.admin_address, _RUNNING_S)
                finally:
                    for reader in readers:
                        reader.cancel()
                    await asyncio.gather(*readers, return_exceptions=True)

        write_svg(asyncio.run(draw()), target)


if __name__ == "__main__":
    main()
