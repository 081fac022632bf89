"""What the model says to each prompt: transformers alone, greedy, in fp32."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.builders_models import write_tiny_model

LENGTHS: Final = (24, 48, 72)  # max_tokens that callers ask for


@dataclass(frozen=True, slots=True)
class Truth:
    """Prompts and what follows them, `max(LENGTHS)` tokens each."""

    prompts: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]

    def output(self, prompt: int, max_tokens: int) -> list[int]:
        """Return the tokens of a generation that nobody ended before its length."""
        return list(self.outputs[prompt][:max_tokens])


def make_model(folder: Path) -> Path:
    """Write the tiny model; no output of it ends before its length."""
    return write_tiny_model(folder, "llama", max_position_embeddings=512, eos_token_id=None)


def compute(model: Path, num_prompts: int, cache: Path | None = None) -> Truth:
    """Ask transformers. Prompts of 4 to 90 tokens; half of them begin alike, so that the prefix cache takes part."""
    prompts = tuple(_prompt(index) for index in range(num_prompts))
    if cache is not None and cache.exists():
        found = json.loads(cache.read_text())
        if len(found) >= num_prompts:
            return Truth(prompts, tuple(tuple(output) for output in found[:num_prompts]))
    from tests import reference

    module = reference.load_reference(model)
    outputs = tuple(tuple(reference.generate(module, prompt, max(LENGTHS), [])) for prompt in prompts)
    if cache is not None:
        cache.write_text(json.dumps(outputs))
    return Truth(prompts, outputs)


def _prompt(index: int) -> tuple[int, ...]:
    shared = [3 + 5 * i % 200 for i in range(40)] if index % 2 else []
    own = [3 + (17 * index + 29 * i * (index + 1)) % 250 for i in range(4 + index * 7 % 47)]
    return (*shared, *own)
