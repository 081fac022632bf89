"""`make monitoring`: a real Prometheus scrapes a running system; every query of the dashboard must return data.

Load of every kind runs meanwhile: streams, single calls, OpenAI's door, refusals, a worker that is killed. The rules
are held to their unit tests, which must see broken rules, and `promtool check metrics` to what each process exports.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from tests.builders_http import HttpDoor
from tests.builders_metrics import fetch
from tests.builders_models import write_tiny_model
from tests.builders_system import Process, System, running_system
from tests.monitoring import rules
from tests.ports import free_port
from torchrelay.client import RelayError

MODEL: Final = "tiny"
LOAD_S: Final = 25.0
_RATE: Final = "10s"
_SCRAPE: Final = "1s"
_PROGRAMS: Final = ("prometheus", "promtool")


def _address(process: Process) -> str:
    return next(value for name, value in process.env.items() if name.endswith("_METRICS_ADDRESS"))


def _start(folder: Path, address: str) -> subprocess.Popen[bytes]:
    with (folder / "prometheus.log").open("wb") as log:
        return subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )


def _lint(exported: str) -> str:
    """Return what promtool says of metrics: nothing where all is well."""
    done = subprocess.run(["promtool", "check", "metrics"], input=exported, capture_output=True, text=True)
    return f"{done.stdout}{done.stderr}" or ("" if done.returncode == 0 else f"status {done.returncode}")


@asynccontextmanager
async def prometheus(folder: Path, gateways: list[str], workers: list[str]) -> AsyncIterator[str]:
    """Run Prometheus on these targets; yield its address once it answers."""
    address = f"127.0.0.1:{free_port()}"
    jobs = [
        {"job_name": f"torchrelay-{role}", "static_configs": [{"targets": targets}]}
        for role, targets in (("gateway", gateways), ("worker", workers))
    ]
    config = {
        "global": {"scrape_interval": _SCRAPE, "evaluation_interval": _SCRAPE},
        "rule_files": [str(rules.ALERTS)],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    process = _start(folder, address)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError):
                if (await fetch(address, "/-/ready"))[0] == 200:
                    break
            await asyncio.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


async def ask(address: str, query: str) -> list[float]:
    """Return the values of a query now. Raises AssertionError for one that Prometheus does not take."""
    concrete = query.replace("$__rate_interval", _RATE).replace("$model", ".*")
    status, text = await fetch(address, "/api/v1/query?" + urllib.parse.urlencode({"query": concrete}))
    answer = json.loads(text)
    assert status == 200, f"{query}: {answer.get('error')}"
    return [float(series["value"][1]) for series in answer["data"]["result"]]


async def load(system: System) -> None:
    """Calls of every kind, until cancelled."""
    refused_key = system.create_key("refused", models=("another",))
    door = HttpDoor(system.gateways[0].openai_address, system.key)
    async with system.client() as client, system.client(key=refused_key) as refused:

        async def streams(index: int) -> None:
            while True:
                async for _ in client.stream([3 + index, *range(4, 40)], model=MODEL, max_tokens=120):
                    pass

        async def others() -> None:
            while True:
                with contextlib.suppress(RelayError):
                    async for _ in refused.stream([3, 4], model=MODEL):
                        pass
                await client.models()
                await door.post("/v1/completions", {"model": MODEL, "prompt": "a", "max_tokens": 4})
                await asyncio.sleep(0.3)

        async with asyncio.TaskGroup() as group:
            for index in range(6):
                group.create_task(streams(index))
            group.create_task(others())


async def run(folder: Path) -> dict[str, Any]:
    """Return what was seen. Faults are in it."""
    faults: list[str] = rules.check(folder)
    unseen = [name for name, rule in rules.mutants().items() if not rules.check(folder, rule)]
    faults += [f"the tests do not see {name}" for name in unseen]
    faults += [f"no test sees {name} fire" for name in sorted(rules.untested())]
    model = write_tiny_model(folder / "model", "llama", max_position_embeddings=2048, eos_token_id=None)
    (folder / "system").mkdir()
    with running_system(folder / "system") as system:
        for _ in range(2):
            system.add_gateway(TORCHRELAY_GATEWAY_METRICS_ADDRESS=f"127.0.0.1:{free_port()}")
            system.add_worker(model, MODEL, TORCHRELAY_WORKER_METRICS_ADDRESS=f"127.0.0.1:{free_port()}")
        await system.ready(MODEL, num_workers=2)
        gateways, workers = [list(map(_address, group)) for group in (system.gateways, system.workers)]
        async with prometheus(folder, gateways, workers) as address:
            loading = asyncio.create_task(load(system))
            await asyncio.sleep(LOAD_S * 0.5)
            system.workers[0].kill()
            await asyncio.sleep(LOAD_S * 0.5)
            if loading.done():
                loading.result()
            num_queries, empty = 0, []
            for panel, queries in rules.queries().items():
                for query in queries:
                    num_queries += 1
                    values = await ask(address, query)
                    if not any(map(math.isfinite, values)):
                        empty.append(f"no data: {panel}: {query}")
            faults += empty
            _, text = await fetch(address, "/api/v1/rules")
            loaded = [rule for group in json.loads(text)["data"]["groups"] for rule in group["rules"]]
            faults += [f"{rule['name']}: {rule.get('lastError')}" for rule in loaded if rule["health"] != "ok"]
            takeovers = sum(await ask(address, 'sum(torchrelay_claims_total{kind="takeover"})'))
            if not takeovers:
                faults.append("no takeover was counted, though a worker was killed")
            alive = [*gateways, workers[1]]
            for target in alive:
                if said := await asyncio.to_thread(_lint, (await fetch(target))[1]):
                    faults.append(f"promtool check metrics, {target}: {said}")
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
    return {
        "panels": len(rules.queries()),
        "queries": num_queries,
        "without_data": len(empty),
        "alerts": len(rules.alerts()),
        "alerts_loaded": len(loaded),
        "mutants": len(rules.mutants()),
        "metrics_checked": len(alive),
        "takeovers": takeovers,
        "faults": faults,
    }


def main() -> int:
    """Run everything; return the exit status."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        sys.stderr.write(f"{' and '.join(missing)} not found; on Debian: apt-get install prometheus\n")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(run(Path(folder)))
    for fault in report["faults"]:
        sys.stderr.write(f"{fault}\n")
    sys.stdout.write(json.dumps(report) + "\n")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
