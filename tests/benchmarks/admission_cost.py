"""What it costs to know a caller, to hold it to its quota and to check its request: CPU of the gateway, and commands.

Run by `make bench-admission`. The parts are the gateway's own, against a real server; what a request is tokenized for
is not among them. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from common import keys
from common.api_keys import ApiKeys
from common.embedded import EmbeddedServer
from common.grants import Caps, Grants, Quotas, TenantPolicy
from common.quotas import QuotaMeter, Reservation
from common.redis import Redis, connect, execute
from common.settings import RedisSettings
from common.tenants import Tenants
from gateway import validation
from gateway.identity.api_key import ApiKeyMethod
from gateway.identity.authenticator import Authenticator
from gateway.identity.caller import CallInfo
from gateway.rights import check_method, check_model, priority_of
from torchrelay.v1 import generation_pb2 as pb

BUDGET_MS: Final = 0.3
METHOD: Final = "/torchrelay.v1.GenerationService/StreamGenerate"
_RATES: Final = Quotas(requests_per_minute=1_000_000, tokens_per_minute=1_000_000_000, tokens_per_day=1 << 40)
_PROMPT: Final = list(range(512))


async def measure(redis: Redis, num_calls: int) -> dict[str, float]:
    """Figures of each stage: CPU in ms (median, 99th percentile), and the commands of one whole call."""
    created = await ApiKeys(redis).create("acme", "bench", grants=Grants(quotas=_RATES, caps=Caps(max_tokens=4096)))
    tenants = Tenants(redis)
    await tenants.set("acme", TenantPolicy(weight=2.0, quotas=_RATES))
    authenticator = Authenticator([ApiKeyMethod(ApiKeys(redis))], tenants)
    meter = QuotaMeter(redis, 3_600_000)
    limits = validation.ConfigLimits(8192, 50_000, 16, 16)
    defaults = pb.GenerationConfig(temperature=1.0, num_outputs=1)
    call = CallInfo([("user-agent", "bench"), ("authorization", f"Bearer {created.secret}")], "ipv4:127.0.0.1:1")
    request = pb.StreamGenerateRequest(
        model="tiny",
        input=pb.GenerationInput(token_ids=pb.TokenIds(ids=_PROMPT)),
        config=pb.GenerationConfig(max_tokens=256, temperature=0.7, top_p=0.9, stop=["\n\n"]),
    )

    reservation_ids = iter([keys.random_id() for _ in range(num_calls + 10)])  # a call's id exists in any case

    async def authenticate() -> None:
        caller = await authenticator.authenticate(call)
        check_method(METHOD, caller)
        check_model(caller, request.model, reveal=True)
        priority_of(request.priority, caller.grants.priorities)

    async def validate() -> None:
        validation.check_token_ids(request.input.token_ids.ids[:], limits.vocab_size, "input.token_ids.ids")
        config = validation.resolve_config(request.config, defaults, len(_PROMPT), limits, seed=1)
        validation.sampling_params(config, (2,))

    async def reserve() -> None:
        await meter.reserve(Reservation("acme", "k1", next(reservation_ids), 768), _RATES, _RATES)

    stages: dict[str, Callable[[], Awaitable[None]]] = {
        "authenticate": authenticate,
        "validate": validate,
        "quota": reserve,
    }
    for stage in stages.values():
        await stage()  # keys and scripts are known to both sides
    before = await _num_commands(redis)
    for stage in stages.values():
        await stage()
    commands = await _num_commands(redis) - before - 1  # the count itself
    samples: dict[str, list[float]] = {name: [] for name in (*stages, "together")}
    for _ in range(num_calls):
        spent = {}
        for name, stage in stages.items():
            began = time.thread_time_ns()
            await stage()
            spent[name] = (time.thread_time_ns() - began) / 1e6
        for name, value in spent.items():
            samples[name].append(value)
        samples["together"].append(sum(spent.values()))
    figures: dict[str, float] = {"commands_before_enqueue": commands, "calls": num_calls}
    for name, values in samples.items():
        figures[f"{name}_ms_p50"] = round(statistics.median(values), 4)
        figures[f"{name}_ms_p99"] = round(sorted(values)[int(0.99 * len(values))], 4)
    return figures


async def _num_commands(redis: Redis) -> int:
    """Commands that clients have sent; those inside scripts are told apart."""
    stats = await execute(redis, "INFO", "commandstats")
    named = {name: entry["calls"] for name, entry in stats.items()}
    return sum(int(named.get(f"cmdstat_{name}", 0)) for name in ("evalsha", "eval", "info")) + int(
        named.get("cmdstat_hgetall", 0)
    )


async def _run(num_calls: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder)) as server:
        redis = connect(RedisSettings(url=server.url))
        try:
            return await measure(redis, num_calls)
        finally:
            await redis.aclose()


def main() -> int:
    """Print the table and the JSON line; the exit status says whether the budget holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=5000)
    figures = asyncio.run(_run(parser.parse_args().calls))
    sys.stdout.write("| stage | CPU p50 ms | CPU p99 ms |\n|---|---|---|\n")
    for name in ("authenticate", "validate", "quota", "together"):
        sys.stdout.write(f"| {name} | {figures[f'{name}_ms_p50']:.3f} | {figures[f'{name}_ms_p99']:.3f} |\n")
    holds = figures["together_ms_p50"] <= BUDGET_MS and figures["commands_before_enqueue"] <= 1
    sys.stdout.write(json.dumps({**figures, "budget_ms": BUDGET_MS, "ok": holds}) + "\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
