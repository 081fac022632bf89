"""Batches of an encoder in lanes against one product after the other on all threads, in turns.

MiniLM (real weights), fp32, as a worker runs it. Run it on a quiet machine, from the repository's root:
python -m tests.benchmarks.lanes --help
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any, Final

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as in a worker

import numpy as np
import torch

from tests.builders_tasks import real_sentence_model
from worker.engine.device import num_compute_threads
from worker.tasks.facts import Head
from worker.tasks.loading import load_encoder
from worker.tasks.runner import EncoderModule, Text

BATCHES: Final = ((16, 128), (32, 64), (128, 16), (8, 128), (4, 128), (32, 16))  # texts, tokens of each


def seconds(module: EncoderModule, texts: list[Text]) -> float:
    started = time.perf_counter()
    module.run(texts)
    return time.perf_counter() - started


def measure(rounds: int) -> dict[str, Any]:
    torch.set_num_threads(num_compute_threads())
    loaded = load_encoder(str(real_sentence_model()), Head.VECTOR, torch.float32, torch.device("cpu"))
    in_lanes, whole = loaded.module, EncoderModule(loaded.module.body, Head.VECTOR)
    generator = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for num_texts, num_tokens in BATCHES:
        ids = generator.integers(1000, 20000, size=(num_texts, num_tokens), dtype=np.int32)
        texts = [Text(row) for row in ids]
        times: dict[EncoderModule, list[float]] = {whole: [], in_lanes: []}
        for number in range(rounds + 1):
            for module, taken in times.items():
                torch.set_num_threads(num_compute_threads())
                taken.append(seconds(module, texts))
                if number == 0:  # warms up
                    taken.clear()
        whole_ms, lanes_ms = (1000 * statistics.median(taken) for taken in times.values())
        found[f"{num_texts}x{num_tokens}"] = {
            "whole_ms": round(whole_ms, 1),
            "lanes_ms": round(lanes_ms, 1),
            "ratio": round(whole_ms / lanes_ms, 3),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    found = measure(parser.parse_args().rounds)
    print("| texts x tokens | all threads a product, ms | lanes, ms | ratio |\n|---|---|---|---|")  # noqa: T201
    for name, figures in found.items():
        print("| {} | {whole_ms} | {lanes_ms} | {ratio:.2f} x |".format(name, **figures))  # noqa: T201
    print(json.dumps({"target": "bench-lanes", "threads": num_compute_threads(), **found}))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
