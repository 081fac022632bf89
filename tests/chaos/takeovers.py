"""`make takeovers`: kill -9 of the worker behind every single token of a generation, greedy and sampled.

Each killed run must give what the undisturbed one gave, token by token and in its text; and the pause that its caller
saw is compared with what a takeover must cost: what is left of the lease, and the prefill of prompt and emitted tokens.
The last line is one JSON object; exits with 1 where an fp32 run differs, or a token is lost or repeated.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.chaos.system import MODEL, TENANTS, ChaosSystem, Size
from tests.chaos.truth import make_model
from torchrelay.client import AsyncClient, RetryPolicy

LEASE_S: Final = 2.0
NUM_TOKENS: Final = 40
_PROMPT: Final = tuple(3 + 7 * i % 200 for i in range(24))
_VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "seed": 20261125, "repetition_penalty": 1.1},
}


@dataclass(slots=True)
class Reading:
    """What one stream gave, and when."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    times: list[float] = field(default_factory=list)  # of each token
    num_takeovers: int = 0

    @property
    def longest_pause_s(self) -> float:
        """Return the longest time between two tokens, or before the first one."""
        return max(later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False))


@dataclass(slots=True)
class Outcome:
    """All kills of one variant."""

    variant: str
    dtype: str
    num_kills: int = 0
    num_different: int = 0
    num_broken: int = 0  # a token lost or repeated
    pauses_s: list[float] = field(default_factory=list)
    first_token_s: float = 0.0  # of the undisturbed run: what its prefill takes


async def read(client: AsyncClient, options: dict[str, Any]) -> Reading:
    """Read one generation to its end. Raises AssertionError if a token is lost or repeated."""
    reading = Reading(times=[time.monotonic()])
    stream = client.stream(_PROMPT, model=MODEL, max_tokens=NUM_TOKENS, **options)
    async for event in stream:
        for delta in event.deltas.deltas:
            assert delta.first_token_index == len(reading.token_ids), "a token was lost or repeated"
            reading.token_ids += delta.token_ids
            reading.text += delta.text
            reading.times += [time.monotonic()] * len(delta.token_ids)
        if event.HasField("finished"):
            reading.num_takeovers = event.finished.timings.num_takeovers
    return reading


async def measure(
    folder: Path, model: str | None, dtype: str, positions: Sequence[int], variants: Sequence[str]
) -> list[Outcome]:
    """Kill at each of the positions in each variant. `model` None is the tiny one."""
    fuse = folder / "die-at"
    fuse.write_text("0")
    system = ChaosSystem(
        folder,
        Path(model) if model else make_model(folder / "model"),
        Size(gateways=1, workers=2, pace_s=0.0),
        random.Random(1),
        patches=(f"die_at:{fuse}",),
        env={"TORCHRELAY_QUEUE_WORKER_LEASE_MS": str(int(LEASE_S * 1000))},
        worker_env={"TORCHRELAY_WORKER_DTYPE": dtype, "TORCHRELAY_ENGINE_SPECULATION": "false"},
    )
    outcomes = []
    async with (
        system,
        AsyncClient(
            system.gateways[0].address,
            api_key=system.keys[TENANTS[0]],
            insecure=True,
            retry=RetryPolicy(give_up_after_s=60),
        ) as client,
    ):
        for name in variants:
            options = _VARIANTS[name]
            await read(client, options)  # the prefix cache has the prompt from now on, in every run alike
            undisturbed = await read(client, options)
            outcome = Outcome(name, dtype, first_token_s=undisturbed.times[1] - undisturbed.times[0])
            for position in positions:
                fuse.write_text(str(position))
                try:
                    reading = await read(client, options)
                except AssertionError:
                    outcome.num_broken += 1
                    continue
                finally:
                    fuse.write_text("0")
                outcome.num_kills += reading.num_takeovers == 1
                outcome.num_different += (reading.token_ids, reading.text) != (undisturbed.token_ids, undisturbed.text)
                outcome.pauses_s.append(reading.longest_pause_s)
                await system.wait_until_whole()
            outcomes.append(outcome)
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a row per variant, in Markdown; pauses are those that callers saw."""
    rows = [
        "| dtype | variant | kills | different | lost or repeated | pause p50 / p95 / most s | first token s |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in outcomes:
        pauses = sorted(one.pauses_s)
        p95 = pauses[min(len(pauses) - 1, int(0.95 * len(pauses)))]
        rows.append(
            f"| {one.dtype} | {one.variant} | {one.num_kills} | {one.num_different} | {one.num_broken} | "
            f"{statistics.median(pauses):.2f} / {p95:.2f} / {pauses[-1]:.2f} | {one.first_token_s:.3f} |"
        )
    return "\n".join(rows)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="a directory or `demo`; default: a tiny random one")
    parser.add_argument("--dtypes", default="float32", help="comma-separated: float32, bfloat16")
    parser.add_argument("--every", type=int, default=1, help="only each n-th position")
    given = parser.parse_args(arguments)
    positions = range(1, NUM_TOKENS, given.every)  # behind the last token nothing is left to do
    outcomes = []
    for dtype in given.dtypes.split(","):
        folder = Path(tempfile.mkdtemp(prefix="torchrelay-takeovers-"))
        try:
            outcomes += asyncio.run(measure(folder, given.model or None, dtype, positions, tuple(_VARIANTS)))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    pauses = sorted(pause for one in outcomes for pause in one.pauses_s)
    is_broken = any(one.num_broken or (one.num_different and one.dtype == "float32") for one in outcomes)
    is_short = any(one.num_kills < len(positions) for one in outcomes)
    figures = {
        "target": "takeovers",
        "model": given.model or "tiny",
        "kills": sum(one.num_kills for one in outcomes),
        "different": {f"{one.dtype} {one.variant}": one.num_different for one in outcomes},
        "lost_or_repeated": sum(one.num_broken for one in outcomes),
        "lease_s": LEASE_S,
        "pause_s": {
            "least": round(pauses[0], 2),
            "p50": round(statistics.median(pauses), 2),
            "most": round(pauses[-1], 2),
        },
    }
    sys.stdout.write(f"{table(outcomes)}\n{json.dumps(figures)}\n")
    return 1 if is_broken or is_short else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
