"""What a generation costs in the server's memory: waiting, running, and kept after its end.

Run as `python -m tests.benchmarks.queue_memory [server program]`. Real scripts, on a server of our own: 100 generations
with a prompt of 500 tokens go through the queue together, and the growth of `used_memory` between the stages is divided
by their number, medians of three rounds. What an event and a token add is the slope between 100 and 1,000 tokens: a log
begins with 4 KB that fill up first. The last line is one JSON object with all figures.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from common import keys
from common.embedded import EmbeddedServer
from common.generation import EventBody, OutputDelta
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import JobState, NewEvent
from common.redis import Redis, connect
from common.settings import QueueSettings, RedisSettings
from tests.builders_common import make_job

SHARD: Final = keys.shard_name("bench", "r1")
NUM_JOBS: Final = 100
NUM_ROUNDS: Final = 3
NUM_PROMPT_TOKENS: Final = 500
FIRST_TOKEN_ID: Final = 20_000  # three bytes in an event, as most ids of a large vocabulary
TEXT: Final = " word"  # of one token


@dataclass(frozen=True, slots=True)
class Workload:
    """What is generated, and how it reaches the log."""

    num_tokens: int
    tokens_per_event: int
    with_text: bool
    with_logprobs: bool


@dataclass(frozen=True, slots=True)
class Row:
    """Bytes of the server's memory, of one generation unless said otherwise."""

    num_tokens: int
    tokens_per_event: int
    text: bool
    logprobs: bool
    queued: float  # whole, prompt included
    running: float  # whole, before its first token
    ending: float  # whole, with all its tokens, just before its end
    retained: float  # whole, after its end
    retained_per_token: float  # all of that, spread over its output


@dataclass(frozen=True, slots=True)
class Slope:
    """Bytes that each event, and each token, adds to a log."""

    tokens_per_event: int
    text: bool
    logprobs: bool
    per_event: float
    per_token: float


def median_of(rows: list[Row]) -> Row:
    """The middle of each figure: buffers of the server itself come and go by some hundred KB."""
    figures = ("queued", "running", "ending", "retained", "retained_per_token")
    return replace(rows[0], **{name: statistics.median(getattr(row, name) for row in rows) for name in figures})


def slopes_of(rows: list[Row]) -> list[Slope]:
    """One for each kind of event, from its shortest and its longest generation."""
    kinds: dict[tuple[int, bool, bool], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.tokens_per_event, row.text, row.logprobs), []).append(row)
    slopes = []
    for (tokens_per_event, text, logprobs), found in kinds.items():
        short, long = (pick(found, key=lambda row: row.num_tokens) for pick in (min, max))
        per_token = (long.retained - short.retained) / (long.num_tokens - short.num_tokens)
        slopes.append(
            Slope(tokens_per_event, text, logprobs, round(per_token * tokens_per_event, 1), round(per_token, 1))
        )
    return slopes


def make_delta(workload: Workload, first: int) -> OutputDelta:
    number = workload.tokens_per_event
    return OutputDelta(
        output_index=0,
        first_token_index=first,
        token_ids=tuple(range(FIRST_TOKEN_ID + first, FIRST_TOKEN_ID + first + number)),
        text=TEXT * number if workload.with_text else "",
        logprobs=tuple(-0.1 * (first + index + 1) for index in range(number)) if workload.with_logprobs else (),
    )


async def used_bytes(client: Redis) -> int:
    info = await client.info("memory")
    return int(info["used_memory"]) - int(info["mem_clients_normal"]) - int(info.get("mem_aof_buffer", 0))


async def measure(server: EmbeddedServer, workload: Workload) -> Row:
    """Take NUM_JOBS generations through their life. Nobody listens, so that no reply stream is counted."""
    client = connect(RedisSettings(url=server.url))
    try:
        await client.config_set("appendfsync", "no")  # memory is measured, not time
        await client.flushall(asynchronous=False)
        settings = QueueSettings()
        queue = JobQueue(client, keys.random_id(), settings)
        claims = JobClaims(client, SHARD, keys.random_id(), settings)

        # The first of all pays for what there is once: scripts, counters, the gateway's stream.
        for number in (1, NUM_JOBS):
            stages = [await used_bytes(client)]
            ids = []
            for _ in range(number):
                prompt = tuple(range(FIRST_TOKEN_ID, FIRST_TOKEN_ID + NUM_PROMPT_TOKENS))
                job = make_job(prompt=prompt, max_tokens=workload.num_tokens, disconnect_grace_ms=600_000)
                ids.append((await queue.enqueue(SHARD, job)).generation_id)
                await queue.detach(ids[-1])
            stages.append(await used_bytes(client))
            while len(claims.held) < number:
                assert await claims.claim(number, 10**9, 10**9)
            stages.append(await used_bytes(client))
            for first in range(0, workload.num_tokens, workload.tokens_per_event):
                body = EventBody((make_delta(workload, first),))
                done = first + workload.tokens_per_event
                result = await claims.commit(
                    [NewEvent(generation_id=name, body=body, completion_tokens=done) for name in ids]
                )
                assert not result.lost
            stages.append(await used_bytes(client))
            await claims.commit(
                [
                    NewEvent(
                        generation_id=name,
                        body=EventBody(),
                        completion_tokens=workload.num_tokens,
                        terminal=JobState.DONE,
                    )
                    for name in ids
                ]
            )
            stages.append(await used_bytes(client))
    finally:
        await client.aclose()
    before, queued, running, emitted, ended = (stage / NUM_JOBS for stage in stages)
    return Row(
        num_tokens=workload.num_tokens,
        tokens_per_event=workload.tokens_per_event,
        text=workload.with_text,
        logprobs=workload.with_logprobs,
        queued=round(queued - before),
        running=round(running - before),
        ending=round(emitted - before),
        retained=round(ended - before),
        retained_per_token=round((ended - before) / workload.num_tokens, 1),
    )


WORKLOADS: Final = [
    Workload(num_tokens, tokens_per_event, with_text, with_logprobs)
    for tokens_per_event in (1, 4)
    for num_tokens in (100, 1000)
    for with_text, with_logprobs in ((False, False), (True, False), (True, True))
]


def table(rows: list[Row], slopes: list[Slope]) -> str:
    """The figures for a reader, in bytes."""
    by_kind = {(slope.tokens_per_event, slope.text, slope.logprobs): slope for slope in slopes}
    heads = (
        "tokens", "per event", "text", "logprobs",
        "queued", "running", "ending", "kept", "kept/token", "+event", "+token",
    )  # fmt: skip
    lines = ["  ".join(f"{head:>10}" for head in heads)]
    for row in rows:
        slope = by_kind[row.tokens_per_event, row.text, row.logprobs]
        cells = (
            row.num_tokens, row.tokens_per_event, "yes" if row.text else "no", "yes" if row.logprobs else "no",
            row.queued, row.running, row.ending, row.retained, row.retained_per_token, slope.per_event, slope.per_token,
        )  # fmt: skip
        lines.append("  ".join(f"{cell!s:>10}" for cell in cells))
    return "\n".join(lines) + "\n"


async def server_name(server: EmbeddedServer) -> str:
    client = connect(RedisSettings(url=server.url))
    try:
        info = await client.info("server")
        allocator = (await client.info("memory"))["mem_allocator"]
    finally:
        await client.aclose()
    name, version = ("valkey", info["valkey_version"]) if "valkey_version" in info else ("redis", info["redis_version"])
    return f"{name} {version}, {allocator}"


def main() -> None:
    program = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder), program=program) as server:
        asyncio.run(measure(server, WORKLOADS[0]))  # tables of the server's own grow once
        rows = [
            median_of([asyncio.run(measure(server, workload)) for _ in range(NUM_ROUNDS)]) for workload in WORKLOADS
        ]
        name = asyncio.run(server_name(server))
    slopes = slopes_of(rows)
    sys.stdout.write(table(rows, slopes))
    report = {
        "target": "queue_memory",
        "server": name,
        "num_jobs": NUM_JOBS,
        "num_prompt_tokens": NUM_PROMPT_TOKENS,
        "rows": [asdict(row) for row in rows],
        "slopes": [asdict(slope) for slope in slopes],
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
