"""What is asked: prompts of random words, or a file's; and when requests arrive. Pure but for reading the file."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

from torchrelay.client import Prompt

_WORDS = (
    "river", "stone", "morning", "letter", "garden", "winter", "engine", "bridge", "music", "paper", "silver", "window",
    "market", "ocean", "forest", "teacher", "signal", "harbor", "copper", "summer", "planet", "kitchen", "journey",
    "mountain", "record", "island",
)  # fmt: skip
_FIELDS = frozenset({"prompt", "messages", "max_tokens"})


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a workload."""

    prompt: Prompt
    max_tokens: int


class Lengths(Protocol):
    """A distribution of the number of words."""

    def draw(self, rng: random.Random) -> int: ...


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every length from `least` to `most` alike."""

    least: int
    most: int

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.least, self.most)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Mostly short with a long tail, as real prompts are: half are below `median`, and at least one word is drawn."""

    median: float
    sigma: float

    def draw(self, rng: random.Random) -> int:
        return max(1, round(self.median * rng.lognormvariate(0, self.sigma)))


def parse_lengths(text: str) -> Lengths:
    """Read `64`, `16-512` or `lognormal:128,0.8` (median and sigma). Raises ValueError with what is wrong."""
    if found := re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip()):
        least, most = int(found[1]), int(found[2] or found[1])
        if 1 <= least <= most:
            return Uniform(least, most)
    if found := re.fullmatch(r"lognormal:(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", text.strip()):
        median, sigma = float(found[1]), float(found[2])
        if median >= 1 and sigma <= 5:
            return LogNormal(median, sigma)
    raise ValueError("takes a number of words such as 64, a range such as 16-512, or lognormal:MEDIAN,SIGMA")


class Workload(Protocol):
    """Where requests come from, without end."""

    def requests(self, seed: str) -> Iterator[Request]:
        """Yield requests, the same for the same seed."""


@dataclass(frozen=True, slots=True)
class RandomWords:
    """Random words behind words that all share, which a prefix cache then finds; without those none share a prefix."""

    lengths: Lengths
    max_tokens: int
    num_shared_words: int = 0

    def requests(self, seed: str) -> Iterator[Request]:
        rng = random.Random(seed)
        shared = make_prompt(self.num_shared_words, rng)
        while True:
            words = make_prompt(self.lengths.draw(rng), rng)
            yield Request(f"{shared} {words}".lstrip(), self.max_tokens)


@dataclass(frozen=True, slots=True)
class FilePrompts:
    """A file's requests in their order, over and over."""

    given: Sequence[Request]

    def requests(self, seed: str) -> Iterator[Request]:
        return cycle(self.given)


def make_prompt(num_words: int, rng: random.Random) -> str:
    """Return random words."""
    return " ".join(rng.choice(_WORDS) for _ in range(num_words))


def read_prompts(path: Path, max_tokens: int) -> FilePrompts:
    """Read a JSON object a line: `prompt` or `messages`, and `max_tokens` where the command's does not hold.

    Raises ValueError that names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    given = [_request(line, f"{path}:{number}", max_tokens) for number, line in enumerate(lines, 1) if line.strip()]
    if not given:
        raise ValueError(f"{path} holds no request")
    return FilePrompts(given)


def _request(line: str, where: str, max_tokens: int) -> Request:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: is no JSON object")
    if unknown := sorted(value.keys() - _FIELDS):
        raise ValueError(f"{where}: {unknown[0]} is not known; a line has prompt or messages, and max_tokens")
    if ("prompt" in value) == ("messages" in value):
        raise ValueError(f"{where}: wants either prompt or messages")
    tokens = value.get("max_tokens", max_tokens)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"{where}: max_tokens is a whole number above 0")
    return Request(_prompt(value, where), tokens)


def _prompt(value: Mapping[str, Any], where: str) -> Prompt:
    if "prompt" in value:
        prompt = value["prompt"]
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"{where}: prompt is a text that is not empty")
        return prompt
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages is a list that is not empty")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where}: each message has role and content")
    return messages


def poisson_arrivals(rate: float, seed: str) -> Iterator[float]:
    """Yield the seconds at which requests arrive, `rate` a second and independently of each other, without end.

    The gaps of such a process are exponentially distributed; the first arrival comes behind one of them.
    """
    rng = random.Random(seed)
    at = 0.0
    while True:
        at += rng.expovariate(rate)
        yield at
