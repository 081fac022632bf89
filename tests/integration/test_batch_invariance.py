"""In bfloat16 too an output does not depend on its company: alone, among others, and continued by another worker."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import pytest
from tokenizers import Tokenizer

from common.generation import SamplingParams
from worker.assembly import assemble
from worker.engine.loop import Engine
from worker.engine.settings import EngineSettings
from worker.engine.types import GenerationRequest
from worker.settings import WorkerSettings

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time in a village by the sea, there lived an old fisherman who",
    "In 1969",
    "List three reasons why people keep diaries, and explain each of them in one sentence.\n1.",
    "The " * 60 + "end. Then",
)
NUM_TOKENS = 32


def decode(engine: Engine, requests: Sequence[GenerationRequest]) -> dict[str, tuple[int, ...]]:
    """The new tokens of each request, by id."""
    for request in requests:
        engine.add(request)
    tokens: dict[str, tuple[int, ...]] = {request.request_id: () for request in requests}
    while engine.has_work:
        for output in engine.step(time.monotonic()).outputs:
            assert output.error is None
            for delta in output.deltas:
                tokens[output.request_id] += delta.token_ids
    return tokens


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_alone_among_others_and_after_a_takeover(quantization: str) -> None:
    settings = WorkerSettings(dtype="bfloat16", device="cpu", quantization=quantization)
    # A budget that cuts prompts to pieces, and too few blocks for all at once.
    limits = EngineSettings(token_budget=32, max_num_seqs=8, num_blocks=14)
    assembly = assemble(settings, limits)
    tokenizer = Tokenizer.from_buffer(assembly.files["tokenizer.json"])
    prompts = [tuple(tokenizer.encode(text).ids) for text in PROMPTS]

    def request(index: int, emitted: tuple[int, ...] = ()) -> GenerationRequest:
        temperature = 0.0 if index % 2 == 0 else 0.8
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=temperature, seed=index)
        # A salt of its own: what an earlier run left in the prefix cache is not used.
        salt = f"{index}:{len(emitted)}:{time.monotonic_ns()}".encode()
        return GenerationRequest(
            f"r{index}", prompts[index], sampling, emitted=(emitted,) if emitted else (), cache_salt=salt
        )

    alone: Mapping[str, tuple[int, ...]] = {}
    for index in range(len(PROMPTS)):
        alone = {**alone, **decode(assembly.engine, [request(index)])}
    together = decode(assembly.engine, [request(index) for index in range(len(PROMPTS))])
    assert together == alone
    assert assembly.engine.stats().num_preemptions > 0, "the blocks were enough, so less was tried than was meant"

    for cut in (17, NUM_TOKENS - 1):
        resumed = decode(assembly.engine, [request(index, alone[f"r{index}"][:cut]) for index in range(len(PROMPTS))])
        assert resumed == {name: tokens[cut:] for name, tokens in alone.items()}
    assert {len(tokens) for tokens in alone.values()} == {NUM_TOKENS}
