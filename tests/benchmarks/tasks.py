"""`Embed` and `Classify` over gRPC against the same model batched by hand, in turns on one machine.

MiniLM (real weights) embeds, a random classifier of its shape classifies. By hand: transformers' own tokenizer and
class over batches of texts of one length, in this process, the best of several batch sizes. Served: gateway, Redis,
worker and 64 callers on the same cores. Run it on a quiet machine, from the repository's root:
python -m tests.benchmarks.tasks --help
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # between its turns this process leaves the cores to those that serve

import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from tests.benchmarks.processes import cpu_s
from tests.builders_system import System, running_system
from tests.builders_tasks import real_sentence_model
from torchrelay.client import AsyncClient
from torchrelay.v1 import classification_pb2 as cpb
from torchrelay.v1 import embedding_pb2 as epb
from worker.engine.device import num_compute_threads

CALLERS: Final = 64
BATCH_SIZES: Final = (8, 16, 32, 64)
NEEDED: Final = {16: 0.9, 1: 0.7}  # of the rate by hand, by texts per call, for long texts
LONG, SHORT = 128, 16


@dataclass(slots=True)
class Figures:
    """Of one task and length: texts per second by hand and served, and where the CPU went."""

    by_hand: list[float] = field(default_factory=list)
    served: dict[int, list[float]] = field(default_factory=lambda: {16: [], 1: []})  # by texts per call
    cpu_us: dict[int, dict[str, list[float]]] = field(default_factory=lambda: {16: {}, 1: {}})  # per text, by part

    def ratio(self, texts_per_call: int) -> float:
        return statistics.median(self.served[texts_per_call]) / statistics.median(self.by_hand)


def make_texts(tokenizer: Any, count: int, num_tokens: int) -> list[str]:
    """Texts of exactly so many tokens with the two around them, of words that are one token each."""
    words = [word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2]
    words = sorted(word for word in words if len(tokenizer(word)["input_ids"]) == 3)
    generator = random.Random(num_tokens)
    return [" ".join(generator.choices(words, k=num_tokens - 2)) for _ in range(count)]


def write_classifier(folder: Path, source: Path) -> Path:
    """A classifier of the sentence model's shape, with random weights."""
    config = AutoConfig.from_pretrained(source, id2label={0: "negative", 1: "neutral", 2: "positive"})
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


class ByHand:
    """What one writes with transformers alone."""

    def __init__(self, folder: Path, task: str) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        kind: Any = AutoModel if task == "embed" else AutoModelForSequenceClassification
        self._model = kind.from_pretrained(folder).eval()
        self._task = task

    @torch.inference_mode()
    def run(self, texts: list[str]) -> None:
        batch = self._tokenizer(texts, return_tensors="pt", padding=True)
        output = self._model(**batch)
        if self._task == "classify":
            output.logits.softmax(-1).tolist()
            return
        mask = batch["attention_mask"][:, :, None]
        pooled = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
        torch.nn.functional.normalize(pooled).tolist()

    def rate(self, texts: list[str], batch_size: int, seconds: float) -> float:
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            first = done % len(texts)
            self.run(texts[first : first + batch_size])
            done += batch_size
        return done / (time.perf_counter() - started)


def make_call(client: AsyncClient, task: str) -> Callable[[list[str]], Awaitable[Any]]:
    """Return what sends one call with these texts."""

    async def embed(texts: list[str]) -> Any:
        request = epb.EmbedRequest(model="embed", texts=texts)
        return await client.embedding.Embed(request, metadata=client.metadata)

    async def classify(texts: list[str]) -> Any:
        inputs = [cpb.ClassificationInput(text=text) for text in texts]
        request = cpb.ClassifyRequest(model="classify", inputs=inputs)
        return await client.classification.Classify(request, metadata=client.metadata)

    return embed if task == "embed" else classify


async def served_rate(
    system: System, task: str, texts: list[str], texts_per_call: int, seconds: float
) -> tuple[float, Mapping[str, float]]:
    """Return texts per second of 64 callers that call without a pause, and CPU microseconds per text by part."""
    parts = parts_of(system, task)
    done, end = 0, 0.0
    async with system.client() as client:
        call = make_call(client, task)

        async def caller(number: int) -> None:
            nonlocal done
            at = number * texts_per_call
            while time.perf_counter() < end:
                first = at % (len(texts) - texts_per_call + 1)
                await call(texts[first : first + texts_per_call])
                done += texts_per_call
                at += CALLERS * texts_per_call

        await call(texts[:texts_per_call])
        before = {name: cpu_s(pid) for name, pid in parts.items()}
        client_before = time.process_time()
        started = time.perf_counter()
        end = started + seconds
        await asyncio.gather(*(caller(number) for number in range(CALLERS)))
        elapsed = time.perf_counter() - started
        used = {name: cpu_s(pid) - before[name] for name, pid in parts.items()}
        used["client"] = time.process_time() - client_before
    return done / elapsed, {name: 1e6 * seconds_used / done for name, seconds_used in used.items()}


def parts_of(system: System, task: str) -> dict[str, int]:
    worker = next(one for one in system.workers if one.env["TORCHRELAY_WORKER_MODEL_NAME"] == task)
    assert worker.process is not None
    assert system.gateways[0].process is not None
    return {
        "gateway": system.gateways[0].process.pid,
        "worker": worker.process.pid,
        "redis": system.server.pid,
    }


async def measure(rounds: int, seconds: float, lengths: list[int]) -> dict[tuple[str, int], Figures]:
    found: dict[tuple[str, int], Figures] = {}
    torch.set_num_threads(num_compute_threads())
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        folders = {"embed": real_sentence_model()}
        folders["classify"] = write_classifier(base / "classifier", folders["embed"])
        tokenizer: Any = AutoTokenizer.from_pretrained(folders["embed"])
        texts = {length: make_texts(tokenizer, 1024, length) for length in lengths}
        by_hand = {task: ByHand(folder, task) for task, folder in folders.items()}
        with running_system(base, TORCHRELAY_QUEUE_WORKER_LEASE_MS="10000") as system:
            system.add_gateway()
            for task, folder in folders.items():
                system.add_worker(folder, task, TORCHRELAY_WORKER_NUM_THREADS="0")
            await system.ready(*folders)
            for task, reference in by_hand.items():
                for length in lengths:
                    sizes = {size: reference.rate(texts[length], size, seconds / 2) for size in BATCH_SIZES}
                    best = max(sizes, key=lambda size: sizes[size])
                    figures = found[task, length] = Figures()
                    for _ in range(rounds):
                        figures.by_hand.append(reference.rate(texts[length], best, seconds))
                        for texts_per_call in figures.served:
                            rate, cpu = await served_rate(system, task, texts[length], texts_per_call, seconds)
                            figures.served[texts_per_call].append(rate)
                            for part, microseconds in cpu.items():
                                figures.cpu_us[texts_per_call].setdefault(part, []).append(microseconds)
                        say(f"{task} {length}: by hand {figures.by_hand[-1]:.0f}/s in batches of {best}, served "
                            f"{figures.served[16][-1]:.0f}/s by 16, {figures.served[1][-1]:.0f}/s by 1")  # fmt: skip
    return found


def say(line: str) -> None:
    sys.stderr.write(line + "\n")


def report(found: Mapping[tuple[str, int], Figures]) -> dict[str, Any]:
    """Print a table; return the JSON."""
    rows = [
        "| task, tokens | by hand texts/s | 16 a call | 1 a call | CPU us: client, gateway, Redis, worker (16; 1) |"
    ]
    rows.append("|---|---|---|---|---|")
    result: dict[str, Any] = {}
    for (task, length), figures in found.items():
        cpu = {
            per_call: {part: round(statistics.median(values)) for part, values in parts.items()}
            for per_call, parts in figures.cpu_us.items()
        }
        hand = statistics.median(figures.by_hand)
        cells = [f"{figures.ratio(n):.2f} ({statistics.median(figures.served[n]):.0f})" for n in (16, 1)]
        spent = "; ".join(
            ", ".join(str(cpu[n][part]) for part in ("client", "gateway", "redis", "worker")) for n in (16, 1)
        )
        rows.append(f"| {task}, {length} | {hand:.0f} | {cells[0]} | {cells[1]} | {spent} |")
        result[f"{task}_{length}"] = {
            "by_hand": round(hand, 1),
            "ratio_16": round(figures.ratio(16), 3),
            "ratio_1": round(figures.ratio(1), 3),
            "cpu_us": cpu,
        }
    print("\n".join(rows))  # noqa: T201
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--lengths", type=int, nargs="+", default=[LONG, SHORT], help="tokens of a text")
    args = parser.parse_args()
    found = asyncio.run(measure(args.rounds, args.seconds, args.lengths))
    result = report(found)
    missed = [
        f"{task}_{length} at {n} a call: {figures.ratio(n):.2f}, {needed} is needed"
        for (task, length), figures in found.items()
        for n, needed in NEEDED.items()
        if length == LONG and figures.ratio(n) < needed
    ]
    print(json.dumps({"target": "bench-tasks", "callers": CALLERS, "missed": missed, **result}))  # noqa: T201
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
