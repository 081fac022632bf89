"""`make mesh`: keyed calls through a real Envoy while gateways are killed and started again. Last line: JSON.

Callers show a client certificate to Envoy, which forwards its SPIFFE id to gateways that trust Envoy's address. Every
tenth call brings a forged x-forwarded-client-cert along. Envoy repeats what a mesh repeats by default; the client
library does the rest. Exit status 1 if a law is broken; --mutant breaks one on purpose:

    no-keys           the library's requests lose their idempotency keys
    untrusted-proxy   gateways trust another address than Envoy's
    forward-only      Envoy passes on the header that callers bring along
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from common.redis import connect, execute
from common.settings import RedisSettings
from tests import reference
from tests.builders_identity import Authority
from tests.builders_models import write_tiny_model
from tests.builders_system import Gateway, System, start_zygotes, until
from tests.mesh.callers import Result, Task, make_call, without_key
from tests.mesh.envoy import Tls, config, install, running_envoy
from tests.mesh.judge import Stored, judge
from tests.ports import free_port
from torchrelay.client import AsyncClient, RetryPolicy
from torchrelay.client import Tls as ClientTls

MODEL: Final = "tiny"
TENANT: Final = "acme"
CALLER_ID: Final = f"spiffe://mesh/ns/{TENANT}/sa/caller"
FORGED: Final = (("x-forwarded-client-cert", "By=x;Hash=ab;URI=spiffe://mesh/ns/root/sa/caller"),)
MUTANTS: Final = ("no-keys", "untrusted-proxy", "forward-only")
_LENGTHS: Final = (60, 120, 240)
_NUM_PROMPTS: Final = 12
_MAX_KILLS_S: Final = 2.0


@dataclass
class Mesh:
    """Everything that runs."""

    system: System
    gateways: list[Gateway]
    address: str
    tls: ClientTls
    num_kills: Counter[str] = field(default_factory=Counter)

    def client(self) -> AsyncClient:
        return AsyncClient(self.address, tls=self.tls, retry=RetryPolicy(give_up_after_s=60, first_contact_s=60))

    async def kill_gateways(self, rng: random.Random) -> None:
        """Kill one gateway after the other with -9, for ever; the next only once the last is back."""
        while True:
            for gateway in self.gateways:
                await asyncio.sleep(rng.uniform(0.3, _MAX_KILLS_S))
                gateway.kill()
                self.num_kills[gateway.address] += 1
                await asyncio.sleep(rng.uniform(0, 0.5))
                gateway.start()
                await until(lambda gateway=gateway: _is_ready(self.system, gateway), 60, "the gateway is back")


async def _is_ready(system: System, gateway: Gateway) -> bool:
    async with AsyncClient(gateway.address, api_key=system.key, retry=RetryPolicy(first_contact_s=5)) as client:
        try:
            return bool(await client.models())
        except Exception:  # noqa: BLE001 - asked again until it answers
            return False


def make_tasks(model: Path, count: int) -> list[Task]:
    """Calls with what transformers says to them."""
    torch.set_num_threads(1)  # at this model's sizes threads wait for each other longer than they compute
    module = reference.load_reference(model)
    prompts = [tuple(3 + (17 * i + 29 * j * (i + 1)) % 250 for j in range(4 + 5 * i)) for i in range(_NUM_PROMPTS)]
    outputs = [tuple(reference.generate(module, prompt, max(_LENGTHS), [])) for prompt in prompts]
    return [
        Task(number, prompts[number % _NUM_PROMPTS], outputs[number % _NUM_PROMPTS][: _LENGTHS[number // 5 % 3]])
        for number in range(count)
    ]


async def call_all(mesh: Mesh, tasks: Sequence[Task], num_callers: int, mutant: str) -> list[Result]:
    """Make all calls, so many at a time, and kill gateways meanwhile."""
    waiting = list(reversed(tasks))
    results: list[Result] = []
    change = without_key if mutant == "no-keys" else lambda request: request

    async def caller(client: AsyncClient) -> None:
        while waiting:
            task = waiting.pop()
            metadata = FORGED if task.number % 10 == 0 else ()
            results.append(await make_call(client, MODEL, task, change=change, metadata=metadata))

    async with mesh.client() as client:
        killing = asyncio.create_task(mesh.kill_gateways(random.Random(1)))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(num_callers):
                    group.create_task(caller(client))
        finally:
            killing.cancel()
            await asyncio.wait({killing})
    if not killing.cancelled() and (error := killing.exception()):
        raise error
    return results


async def read_stored(system: System) -> Stored:
    """Wait until nothing runs any more; return what is stored."""
    redis = connect(RedisSettings(url=system.server.url))

    async def names(pattern: str) -> list[str]:
        return [name.decode() for name in await execute(redis, "KEYS", pattern)]

    async def nothing_lives() -> bool:
        return not await names("{*}:live")

    try:
        await until(nothing_lives, 90, "every generation has ended")
        usage: Counter[str] = Counter()
        for key in await names("{*}:usage:*"):
            for name, count in (await execute(redis, "HGETALL", key)).items():
                usage[name.decode()] += int(count)
        jobs = [name for name in await names("{*}:j:*") if not name.endswith(":log")]
        return Stored(usage, len(jobs))
    finally:
        await redis.aclose()


async def run(folder: Path, program: Path, *, num_calls: int, num_callers: int, mutant: str = "") -> dict[str, Any]:
    """One run in a folder of its own; return its report."""
    authority = Authority("the mesh's authority")
    cert, key = authority.issue(hosts=("127.0.0.1",)).write(folder, "ingress")
    caller_cert, caller_key = authority.issue(uris=(CALLER_ID,)).write(folder, "caller")
    ca = authority.write(folder)
    model = write_tiny_model(folder / "model", "llama", max_position_embeddings=512, eos_token_id=None)
    tasks = make_tasks(model, num_calls)
    start_zygotes(folder)
    leases = {"TORCHRELAY_QUEUE_WORKER_LEASE_MS": "2500", "TORCHRELAY_QUEUE_GATEWAY_LEASE_MS": "2500"}
    identity = {
        "TORCHRELAY_AUTH_CERTIFICATE_TENANTS": "spiffe://mesh/ns/{tenant}/sa/*",
        "TORCHRELAY_TRUSTED_PROXIES": "192.0.2.1" if mutant == "untrusted-proxy" else "127.0.0.1",
    }
    port = free_port()
    with System(folder, leases | identity) as system:
        gateways = [system.add_gateway() for _ in range(2)]
        for _ in range(2):
            system.add_worker(model, MODEL)
        await system.ready(MODEL, num_workers=2)
        forward = "ALWAYS_FORWARD_ONLY" if mutant == "forward-only" else "SANITIZE_SET"
        proxy = config(port, [gateway.address for gateway in gateways], Tls(cert, key, ca), forward=forward)
        with running_envoy(program, folder, port, proxy):
            tls = ClientTls(ca_file=str(ca), cert_file=str(caller_cert), key_file=str(caller_key))
            mesh = Mesh(system, gateways, f"127.0.0.1:{port}", tls)
            began = time.monotonic()
            results = await call_all(mesh, tasks, num_callers, mutant)
            elapsed_s = time.monotonic() - began
        stored = await read_stored(system)
    verdict = judge(results, stored, TENANT, least_elsewhere=max(1, num_calls // 50))
    return {
        "num_calls": len(results),
        "num_right": verdict.num_right,
        "by_kind": dict(verdict.by_kind),
        "generations_stored": stored.num_jobs,
        "generations_metered": stored.total("generations"),
        "completion_tokens_metered": stored.total("completion_tokens"),
        "gateway_kills": sum(mesh.num_kills.values()),
        "resumes": verdict.num_resumes,
        "resumes_on_the_other_gateway": verdict.num_resumes_elsewhere,
        "calls_answered_more_than_once": sum(len(result.served_by) > 1 for result in results),
        "elapsed_s": round(elapsed_s, 1),
        "mutant": mutant,
        "violations": verdict.violations,
    }


def main() -> int:
    """Run; return the exit status: 1 if a law was broken."""
    parser = argparse.ArgumentParser(prog="make mesh", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--envoy", type=Path, default=Path("build/envoy"), help="where Envoy is, or is installed")
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--callers", type=int, default=32, help="calls at a time")
    parser.add_argument("--mutant", choices=MUTANTS, default="", help="break one thing on purpose")
    parser.add_argument("--keep", action="store_true", help="keep logs and configuration")
    args = parser.parse_args()
    program = install(args.envoy.absolute())
    folder = Path(tempfile.mkdtemp(prefix="torchrelay-mesh-"))
    try:
        report = asyncio.run(run(folder, program, num_calls=args.calls, num_callers=args.callers, mutant=args.mutant))
    finally:
        if args.keep:
            sys.stderr.write(f"kept {folder}\n")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    for law, how in report["violations"].items():
        sys.stdout.write(f"broken: {law}: {how}\n")
    sys.stdout.write(json.dumps(report) + "\n")
    return 1 if report["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
