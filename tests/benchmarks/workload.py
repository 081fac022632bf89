"""The work that engines are compared by: the same token ids for every engine, on every machine, in every run.

Prompts are cut out of licence texts, so that they are real language; as token ids, so that no engine's tokenizer or
chat template matters. Everything is greedy and runs to its full length (the end token is ignored).

    W1  throughput      64 requests at once, at most 32 running; 16 to 512 tokens in, 16 to 256 out, log-uniform
    W2  latency         one request alone, 128 tokens in, 128 out
    W3  prefill         one prompt of 2048 tokens, 1 out
    W4  shared prefix   32 requests at once: one new prefix of 1024 tokens, tails of 32; 32 out each

Each workload has several variants: the same lengths on other text, so that what one run leaves in a prefix cache does
not help the next. Imports only the standard library: interpreters of other engines read the file that `main` writes.

    python -m tests.benchmarks.workload --model DIR --out FILE
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

SEED: Final = 20261122
NUM_VARIANTS: Final = 6  # of W1 and W4 three are measured; the others stand in for runs that something disturbed
MAX_RUNNING: Final = 32
NAMES: Final = ("W1", "W2", "W3", "W4")

# What Debian's base-files package ships. Other releases of it carry the same texts of these licences.
TEXT_FOLDER: Final = Path("/usr/share/common-licenses")
_TEXTS: Final = (
    *("GPL-3", "Apache-2.0", "GFDL-1.3", "LGPL-2.1", "MPL-2.0"),
    *("Artistic", "GPL-2", "CC0-1.0", "BSD", "MPL-1.1"),
)

_NUM_W1, _W1_PROMPT, _W1_OUTPUT = 64, (16, 512), (16, 256)
_W2_PROMPT, _W2_OUTPUT = 128, 128
_W3_PROMPT = 2048
_NUM_W4, W4_PREFIX, _W4_TAIL, _W4_OUTPUT = 32, 1024, 32, 32
_WARM_UP_PROMPTS, _WARM_UP_OUTPUT = (16, 64, 128, 512), 8
_UNIQUE_START = 16  # tokens, one KV block of the common engines

Encode = Callable[[str], Sequence[int]]


class TextsMissing(Exception):
    """The licence texts are not where they were looked for; the message says where they may be had."""


@dataclass(frozen=True, slots=True)
class Request:
    """Decode exactly `max_tokens` greedy tokens after the prompt."""

    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """All requests of a comparison."""

    runs: dict[str, list[list[Request]]]  # by workload and variant
    warm_up: list[Request]  # of text that no workload has
    windows: list[list[int]]  # text to judge predictions by: successive pieces of the same length
    sha256: str  # of the requests, hex

    @property
    def longest(self) -> int:
        """Most tokens of one sequence, prompt and output together."""
        requests = [request for variants in self.runs.values() for variant in variants for request in variant]
        return max(len(request.prompt) + request.max_tokens for request in requests)

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Workload:
        data = json.loads(text)
        return cls(
            {
                name: [[Request(**request) for request in variant] for variant in variants]
                for name, variants in data["runs"].items()
            },
            [Request(**request) for request in data["warm_up"]],
            data["windows"],
            data["sha256"],
        )


def log_spread(count: int, low: int, high: int, rng: random.Random) -> list[int]:
    """Return `count` whole numbers at the mid-quantiles of a log-uniform law, both ends among them, shuffled."""
    start, width = math.log(low), math.log(high) - math.log(low)
    numbers = [round(math.exp(start + width * (i + 0.5) / count)) for i in range(count)]
    numbers[0], numbers[-1] = low, high
    rng.shuffle(numbers)
    return numbers


class Cutter:
    """Cuts prompts out of a text, no two with the same first tokens."""

    def __init__(self, token_ids: list[int], rng: random.Random) -> None:
        self._token_ids = token_ids
        self._rng = rng
        self._starts: set[tuple[int, ...]] = set()

    def cut(self, num_tokens: int) -> list[int]:
        while True:
            at = self._rng.randrange(0, len(self._token_ids) - num_tokens)
            start = tuple(self._token_ids[at : at + _UNIQUE_START])
            if start not in self._starts:
                self._starts.add(start)
                return self._token_ids[at : at + num_tokens]


def read_texts(folder: Path = TEXT_FOLDER) -> list[str]:
    """Return the licence texts with every run of white space made one space. Raises TextsMissing."""
    missing = [name for name in _TEXTS if not (folder / name).is_file()]
    if missing:
        raise TextsMissing(
            f"{folder} lacks the licence texts {', '.join(missing)}: they come with Debian's package base-files "
            "(/usr/share/common-licenses); copy that folder and name it with --texts"
        )
    return [" ".join((folder / name).read_text(encoding="utf-8", errors="replace").split()) for name in _TEXTS]


def build(
    texts: Sequence[str], encode: Encode, *, seed: int = SEED, num_windows: int = 16, window_length: int = 512
) -> Workload:
    """Cut the requests. The same texts, tokenizer and seed give the same ids; `windows` do not count in the digest."""
    token_ids = [token_id for text in texts for token_id in encode(text)]
    rng = random.Random(seed)
    prompt_lengths = log_spread(_NUM_W1, *_W1_PROMPT, rng)
    output_lengths = log_spread(_NUM_W1, *_W1_OUTPUT, rng)
    cut = Cutter(token_ids, rng).cut
    runs: dict[str, list[list[Request]]] = {name: [] for name in NAMES}
    for _ in range(NUM_VARIANTS):
        runs["W1"].append([Request(cut(n), out) for n, out in zip(prompt_lengths, output_lengths, strict=True)])
        runs["W2"].append([Request(cut(_W2_PROMPT), _W2_OUTPUT)])
        runs["W3"].append([Request(cut(_W3_PROMPT), 1)])
        prefix = cut(W4_PREFIX)
        runs["W4"].append([Request(prefix + cut(_W4_TAIL), _W4_OUTPUT) for _ in range(_NUM_W4)])
    warm_up = [Request(cut(n), _WARM_UP_OUTPUT) for n in _WARM_UP_PROMPTS]
    whole = encode(" ".join(texts))
    windows = [list(whole[i * window_length : (i + 1) * window_length]) for i in range(num_windows)]
    return Workload(runs, warm_up, windows, _digest(runs, warm_up))


def _digest(runs: dict[str, list[list[Request]]], warm_up: list[Request]) -> str:
    """The form in which the requests were first published; a single request stands without a list around it."""
    alone = {"W2", "W3"}
    body = [
        [asdict(variant[0]) if name in alone else [asdict(request) for request in variant] for variant in runs[name]]
        for name in NAMES
    ]
    return hashlib.sha256(json.dumps([*body, [asdict(request) for request in warm_up]]).encode()).hexdigest()


def build_for(model: Path, texts: Path = TEXT_FOLDER) -> Workload:
    """Return the workload in the token ids of a model folder. Raises TextsMissing."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return build(read_texts(texts), lambda text: tokenizer.encode(text).ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with the model's tokenizer.json")
    parser.add_argument("--texts", type=Path, default=TEXT_FOLDER, help="folder with the licence texts")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    workload = build_for(args.model, args.texts)
    args.out.write_text(workload.dump())
    sys.stdout.write(json.dumps({"sha256": workload.sha256}) + "\n")


if __name__ == "__main__":
    main()
