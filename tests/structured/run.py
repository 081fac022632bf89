"""`make structured`: 200 JSON schemas through gateway and worker, and what constraining a whole batch costs.

Every schema is asked for twice, greedy and at temperature 1, beside requests without one. What ends with `stop` must
be valid, and what is bounded must end with it. Then the engine alone decodes 32 requests at a time, constrained and
not, in turns: the second kind for as many tokens as the first has taken. Last line: JSON. Exit status 1 if an output is
wrong, or if constraining a full batch leaves it less than 0.9 of its rate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.generation import GrammarKind, SamplingParams, StructuredOutput
from tests.builders_calls import Outcome
from tests.builders_system import System, running_system
from tests.structured.judge import why_not_valid
from tests.structured.schemas import NamedSchema, drawn_schemas, known_schemas
from torchrelay.client import AsyncClient, RelayError
from torchrelay.v1 import generation_pb2 as pb

MODEL: Final = "smollm2"
BATCH: Final = 32
_BOUNDED_TOKENS: Final = 6000
_OPEN_TOKENS: Final = 200
_LEAST_RATIO: Final = 0.9
_PROMPT: Final = "Make up an example of: {}. Answer in JSON."


@dataclass(frozen=True, slots=True)
class Case:
    """A request for a schema."""

    wanted: NamedSchema
    temperature: float
    seed: int

    @property
    def max_tokens(self) -> int:
        return _BOUNDED_TOKENS if self.wanted.is_bounded else _OPEN_TOKENS


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a request ended: "valid", "length", or what is wrong."""

    case: Case
    ending: str
    num_tokens: int

    @property
    def is_right(self) -> bool:
        return self.ending == "valid" or (self.ending == "length" and not self.case.wanted.is_bounded)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def all_schemas(seed: int, count: int) -> list[NamedSchema]:
    known = known_schemas()[:count]
    return known + drawn_schemas(seed, count - len(known))


async def ask(client: AsyncClient, case: Case, places: asyncio.Semaphore) -> Verdict:
    async with places:
        stream = client.stream(
            [{"role": "user", "content": _PROMPT.format(case.wanted.name)}],
            model=MODEL,
            max_tokens=case.max_tokens,
            temperature=case.temperature,
            seed=case.seed,
            structured_output=pb.StructuredOutput(json_schema=case.wanted.text),
        )
        try:
            output = (await Outcome(stream).read()).output
        except RelayError as error:
            return Verdict(case, f"refused: {error}", 0)
    if output.finish_reason == pb.FINISH_REASON_LENGTH:
        return Verdict(case, "length", len(output.token_ids))
    wrong = why_not_valid(output.text, case.wanted.schema)
    if output.finish_reason != pb.FINISH_REASON_STOP:
        wrong = f"ended with {output.finish_reason}"
    return Verdict(case, wrong or "valid", len(output.token_ids))


async def chatter(client: AsyncClient, number: int, places: asyncio.Semaphore) -> None:
    """One of the requests without a schema."""
    async with places:
        prompt = [{"role": "user", "content": f"Tell me something about the number {number}."}]
        await Outcome(client.stream(prompt, model=MODEL, max_tokens=60, temperature=number % 2, seed=number)).read()


async def judge_all(system: System, cases: Sequence[Case]) -> list[Verdict]:
    await system.ready(MODEL)
    places = asyncio.Semaphore(BATCH)
    async with system.client() as client, asyncio.TaskGroup() as group:
        others = [group.create_task(chatter(client, i, places)) for i in range(len(cases) // 8)]
        asked = [group.create_task(ask(client, case, places)) for case in cases]
    del others
    return [task.result() for task in asked]


def print_table(verdicts: Sequence[Verdict]) -> None:
    say(f"{'schemas':<22}{'temperature':>12}{'requests':>10}{'valid':>8}{'length':>8}{'wrong':>8}{'tokens':>10}")
    for is_bounded in (True, False):
        for temperature in (0.0, 1.0):
            part = [v for v in verdicts if v.case.wanted.is_bounded is is_bounded and v.case.temperature == temperature]
            endings = Counter(v.ending if v.ending in ("valid", "length") else "wrong" for v in part)
            say(
                f"{'bounded' if is_bounded else 'open':<22}{temperature:>12}{len(part):>10}{endings['valid']:>8}"
                f"{endings['length']:>8}{endings['wrong']:>8}{sum(v.num_tokens for v in part):>10}"
            )
    for verdict in verdicts:
        if not verdict.is_right:
            say(f"WRONG {verdict.case.wanted.name} at {verdict.case.temperature}: {verdict.ending}")
            say(f"      {verdict.case.wanted.text}")


def measure(schemas: Sequence[NamedSchema], rounds: int) -> dict[str, Any]:
    """Tokens per second of the engine alone, in turns."""
    from worker.assembly import assemble
    from worker.engine.settings import EngineSettings
    from worker.settings import WorkerSettings

    assembly = assemble(WorkerSettings(model="demo"), EngineSettings(max_num_seqs=BATCH, speculation=False))
    cases = [Case(wanted, float(i % 2), i) for i, wanted in enumerate(schemas)]
    rates: dict[str, list[float]] = {"constrained": [], "unconstrained": []}
    lengths: list[int] = [0] * len(cases)
    for number in range(-1, rounds):  # one to warm up: grammars are compiled then
        for kind in rates:
            requests = list(_engine_requests(cases, lengths, kind, number))
            counts, seconds = _decode(assembly.engine, requests)
            if kind == "constrained":
                lengths = [counts[f"{kind}-{number}-{i}"] for i in range(len(cases))]
            if number >= 0:
                rates[kind].append(sum(counts.values()) / seconds)
                say(f"round {number} {kind:<14} {sum(counts.values()):>6} tokens {rates[kind][-1]:8.1f} tokens/s")
    medians = {kind: statistics.median(found) for kind, found in rates.items()}
    ratios = [a / b for a, b in zip(rates["constrained"], rates["unconstrained"], strict=True)]
    return {
        "tokens_per_s": {kind: round(median, 1) for kind, median in medians.items()},
        "ratio": round(statistics.median(ratios), 3),
        "rounds": rounds,
    }


def _engine_requests(cases: Sequence[Case], lengths: Sequence[int], kind: str, number: int) -> Iterator[Any]:
    from worker.engine.types import GenerationRequest

    for i, case in enumerate(cases):
        spec = StructuredOutput(GrammarKind.JSON_SCHEMA, case.wanted.text) if kind == "constrained" else None
        sampling = SamplingParams(
            max_tokens=_OPEN_TOKENS if spec is not None else max(1, lengths[i]),
            temperature=case.temperature,
            seed=case.seed,
            stop_token_ids=(2,) if spec is not None else (),
            structured_output=spec,
        )
        yield GenerationRequest(f"{kind}-{number}-{i}", tuple(range(1000 + i, 1016 + i)), sampling)


def _decode(engine: Any, requests: list[Any]) -> tuple[dict[str, int], float]:
    """Keep a full batch until the requests run out, and time it while it is full."""
    counts = {request.request_id: 0 for request in requests}
    waiting = [engine.prepare(request) for request in requests][::-1]
    num_running = num_tokens = 0
    seconds = 0.0
    while num_running or waiting:
        while waiting and num_running < BATCH:
            engine.add(waiting.pop())
            num_running += 1
        is_full = num_running == BATCH
        started = time.perf_counter()
        result = engine.step(time.monotonic())
        took = time.perf_counter() - started
        made = 0
        for output in result.outputs:
            assert output.error is None, output.error
            made_here = sum(len(delta.token_ids) for delta in output.deltas)
            counts[output.request_id] += made_here
            made += made_here
            num_running -= output.finished
        if is_full:
            seconds += took
            num_tokens += made
    return counts, seconds * sum(counts.values()) / max(1, num_tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="0 leaves the measurement away")
    parser.add_argument("--no-served", action="store_true", help="leaves the served part away")
    options = parser.parse_args()
    schemas = all_schemas(options.seed, options.schemas)
    verdicts: list[Verdict] = []
    if not options.no_served:
        cases = [Case(wanted, temperature, i) for i, wanted in enumerate(schemas) for temperature in (0.0, 1.0)]
        with tempfile.TemporaryDirectory() as folder, running_system(Path(folder)) as system:
            system.add_gateway(TORCHRELAY_GATEWAY_MAX_CALLS="1000")
            settings = {
                "TORCHRELAY_WORKER_NUM_THREADS": "0",
                "TORCHRELAY_ENGINE_KV_CACHE_BYTES": str(1 << 30),
                "TORCHRELAY_WORKER_DTYPE": "auto",
            }
            system.add_worker("demo", MODEL, **settings)
            verdicts = asyncio.run(judge_all(system, cases))
        print_table(verdicts)
    report: dict[str, Any] = {
        "seed": options.seed,
        "schemas": len(schemas),
        "requests": len(verdicts),
        "valid": sum(v.ending == "valid" for v in verdicts),
        "open_by_length": sum(v.ending == "length" and v.is_right for v in verdicts),
        "wrong": sum(not v.is_right for v in verdicts),
    }
    if options.rounds:
        report |= measure(schemas, options.rounds)
    is_slow = report.get("ratio", 1.0) < _LEAST_RATIO
    say(json.dumps(report))
    return 1 if report["wrong"] or is_slow else 0


if __name__ == "__main__":
    sys.exit(main())
