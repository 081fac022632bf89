"""What a token costs in the queue: server CPU, library CPU, commands.

Run as `python -m tests.benchmarks.script_cost [server program]`. One worker commits one token for each of n running
jobs per step, n = 32 and 256, while a gateway reads the reply stream in the same process; the server writes its log as
in production (append-only, synced before each answer). The last line is one JSON object with all figures.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import keys
from common.embedded import EmbeddedServer
from common.job_claims import JobClaims
from common.job_queue import START_CURSOR, JobQueue
from common.redis import connect
from common.settings import QueueSettings, RedisSettings
from tests.builders_common import make_event, make_job

SHARD = keys.shard_name("bench", "r1")
NUM_STEPS = 300


async def measure(server: EmbeddedServer, num_jobs: int) -> dict[str, Any]:
    client = connect(RedisSettings(url=server.url))
    await client.flushall()
    settings = QueueSettings()
    queue, claims = JobQueue(client, keys.random_id(), settings), JobClaims(client, SHARD, keys.random_id(), settings)
    for _ in range(num_jobs):
        await queue.enqueue(SHARD, make_job(prompt=tuple(range(500)), max_tokens=NUM_STEPS + 1))
    jobs = await claims.claim(num_jobs, 10**9, 10**9)
    assert len(jobs) == num_jobs
    ids = [job.generation_id for job in jobs]
    cursors, moved = {SHARD: START_CURSOR}, {SHARD: START_CURSOR}
    while moved:  # an entry for each job that was claimed
        cursors = {**cursors, **moved}
        _, moved = await queue.replies(cursors, 10)
    steps = [[make_event(name, (1000 + step,), first=step, text=" word") for name in ids] for step in range(NUM_STEPS)]

    async def server_cpu_s() -> float:
        info = await client.info("cpu")
        return float(info["used_cpu_user"] + info["used_cpu_sys"])

    await client.config_resetstat()
    cpu, commit_s, reply_s = await server_cpu_s(), 0.0, 0.0
    num_replies = 0
    latencies = []
    for events in steps:
        start, began = time.process_time(), time.perf_counter()
        result = await claims.commit(events)
        latencies.append(time.perf_counter() - began)
        commit_s += time.process_time() - start
        assert not result.lost
        start = time.process_time()
        items, moved = await queue.replies(cursors, 100)
        cursors = {**cursors, **moved}
        num_replies += len(items)
        reply_s += time.process_time() - start
    cpu = await server_cpu_s() - cpu
    calls = {name: stats["calls"] for name, stats in (await client.info("commandstats")).items()}
    await client.aclose()
    tokens = NUM_STEPS * num_jobs
    assert num_replies == tokens
    latencies.sort()
    sent = sum(calls.get(f"cmdstat_{name}", 0) for name in ("evalsha", "eval", "xread"))
    return {
        "num_jobs": num_jobs,
        "num_tokens": tokens,
        "server_us_per_token": round(cpu / tokens * 1e6, 2),
        "worker_us_per_token": round(commit_s / tokens * 1e6, 2),
        "gateway_us_per_token": round(reply_s / tokens * 1e6, 2),
        "client_commands_per_token": round(sent / tokens, 4),
        "commands_inside_per_token": round((sum(calls.values()) - sent) / tokens, 3),
        "commit_ms_p50": round(latencies[len(latencies) // 2] * 1e3, 2),
        "commit_ms_p99": round(latencies[int(len(latencies) * 0.99)] * 1e3, 2),
    }


def main() -> None:
    program = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder), program=program) as server:
        rows = [asyncio.run(measure(server, num_jobs)) for num_jobs in (32, 256)]
    sys.stdout.write(json.dumps({"target": "script_cost", "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
