"""Blocks of sources: taken with the request, shared by what belongs together and by nothing else, and given back."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders_engine import Driver, PaperRunner, generate, make_engine, make_request, paper_tokens
from worker.engine.batch import TokensInFlight
from worker.engine.loop import Engine
from worker.engine.plan import Plan
from worker.engine.types import GenerationRequest

START = 1


class SourceRunner(PaperRunner):
    """A paper runner with an encoder: each source must lie in its own blocks where it is read.

    It fails at once where a source was not read before it is needed, or is read into blocks that others hold.
    """

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**{"max_model_len": 40, **sizes})
        self.max_source_tokens = 24
        self.num_sources_read = 0
        self._sources: dict[int, tuple[int, ...]] = {}  # by block: the source, and which block of it

    def execute(self, plan: Plan, in_flight: TokensInFlight | None = None) -> torch.Tensor:
        read: dict[int, tuple[int, ...]] = {}
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert sequence.source is not None
            blocks = {b: (i, *sequence.source.token_ids) for i, b in enumerate(sequence.source_block_ids)}
            assert len(blocks) == -(-len(sequence.source.token_ids) // self.block_size)
            if chunk.num_source_tokens:
                assert not read.keys() & blocks.keys(), "two sequences read into one block"
                read |= blocks
        known = {**self._sources, **read}
        for chunk in plan.chunks:
            for index, block in enumerate(chunk.sequence.source_block_ids):
                assert known.get(block) == (index, *chunk.sequence.source.token_ids), "a block holds another source"
            for block in chunk.sequence.block_ids:
                assert block not in read, "a block is a source's and a sequence's"
        logits = super().execute(plan, in_flight)
        self._sources = known
        self.num_sources_read += sum(chunk.num_source_tokens > 0 for chunk in plan.chunks)
        return logits


def sourced(name: str = "r", source: Iterable[int] = range(10), **fields: Any) -> GenerationRequest:
    return make_request(name, (START,), source_token_ids=tuple(source), **fields)


def held(engine: Engine) -> int:
    stats = engine.stats()
    return stats.num_blocks - stats.num_free_blocks


def test_a_source_takes_its_blocks_with_the_first_step_and_gives_them_back_with_the_end() -> None:
    engine = make_engine(SourceRunner())
    driver = Driver(engine)
    driver.add(sourced(max_tokens=5))
    driver.step()
    assert held(engine) == 3 + 1  # ten tokens of a source, one of the decoder, in blocks of 4
    usage = driver.run()["r"].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.cached_prompt_tokens, usage.completion_tokens) == (10, 0, 5)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_cancel_gives_all_blocks_back(num_steps: int) -> None:
    engine = make_engine(SourceRunner())
    driver = Driver(engine)
    driver.add(sourced(num_outputs=3), sourced("beams", range(5, 20), num_beams=3))
    for _ in range(num_steps):
        driver.step()
    for name in ("r", "beams"):
        engine.abort(name)
    engine.check_integrity()
    assert held(engine) == 0
    driver.run()


def test_outputs_and_beams_share_one_source() -> None:
    for fields in ({"num_outputs": 4, "temperature": 1.0, "seed": 3}, {"num_beams": 4}):
        runner = SourceRunner(num_blocks=60)
        engine = make_engine(runner, max_num_seqs=8, enable_prefix_cache=False)
        driver = Driver(engine)
        driver.add(sourced(**fields))
        for _ in range(3):
            driver.step()
        assert held(engine) == 3 + 4
        driver.run()
        assert runner.num_sources_read == 1


def test_an_equal_source_is_read_once_but_not_for_another_tenant() -> None:
    runner = SourceRunner(num_blocks=60)
    driver = Driver(make_engine(runner))
    driver.add(sourced("first"), sourced("beside"), sourced("stranger", cache_salt=b"other"))
    results = driver.run()
    driver.add(sourced("later"), sourced("longer", range(11)))
    driver.run()
    assert runner.num_sources_read == 3  # of the first, the stranger, and the longer one, of which no part is known
    cached = {name: one.usage.cached_prompt_tokens for name, one in results.items() if one.usage}
    assert cached == {"first": 0, "beside": 10, "stranger": 0, "later": 10, "longer": 0}


def test_equal_outputs_behind_different_sources_share_no_blocks() -> None:
    emitted = (tuple(range(2, 12)),)
    driver = Driver(make_engine(SourceRunner(num_blocks=60)))
    driver.add(sourced("a", emitted=emitted, max_tokens=12))
    driver.run()
    driver.add(sourced("b", range(20, 30), emitted=emitted, max_tokens=12))
    driver.step()
    sequence = next(iter(driver.engine._scheduler.sequences()))
    assert sequence.num_hit_tokens == 0
    assert sequence.num_computed_tokens == 11  # all of it in this step
    driver.run()


def test_a_source_longer_than_the_budget_is_read_in_one_step_and_others_wait_for_the_next() -> None:
    engine = make_engine(SourceRunner(num_blocks=60), token_budget=8, max_num_seqs=4)
    driver = Driver(engine)
    driver.add(sourced("long", range(24)), sourced("other", range(5, 9)))
    driver.step()
    assert engine.stats().num_running == 1
    driver.step()
    assert engine.stats().num_running == 2
    driver.run()


def test_memory_that_fails_a_source_sets_it_aside_and_it_is_read_again() -> None:
    runner = SourceRunner(num_blocks=60)
    runner.fail_steps = {3}
    driver = Driver(make_engine(runner))
    driver.add(sourced("runs"))
    driver.step()
    driver.step()
    driver.add(sourced("comes", range(30, 39)))
    driver.run()
    assert [driver.results[name].error for name in ("runs", "comes")] == [None, None]
    assert driver.engine.stats().num_preemptions == 1
    assert runner.num_sources_read == 2


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"source_token_ids": ()}, "EMPTY_SOURCE"),
        ({"source_token_ids": tuple(range(25))}, "SOURCE_TOO_LONG"),
        ({"source_token_ids": (5, 40)}, "INVALID_TOKEN_ID"),
        ({"prompt_logprobs": 0}, "PROMPT_SCORES_UNSUPPORTED"),
        ({"echo_text": "x"}, "PROMPT_SCORES_UNSUPPORTED"),
        ({"max_tokens": 39, "source_token_ids": tuple(range(21))}, "SOURCE_TOO_LONG"),  # 6 and 10 blocks, of 15
        ({"max_tokens": 15, "num_beams": 4}, "BEAMS_TOO_LONG"),  # 3 and 4 times 4
    ],
)
def test_what_can_never_run_is_refused(fields: dict[str, Any], error: str) -> None:
    driver = Driver(make_engine(SourceRunner(num_blocks=16)))
    request = make_request("r", (START,), **{"source_token_ids": tuple(range(10)), **fields})
    driver.add(request, sourced("sound"))
    results = driver.run()
    assert results["r"].error == error
    assert results["sound"].error is None


def test_a_model_without_an_encoder_refuses_a_source() -> None:
    assert generate(make_engine(PaperRunner()), sourced())["r"].error == "SOURCE_UNSUPPORTED"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_any_workload_ends_with_the_right_tokens_and_all_blocks_free(seed: int) -> None:
    """Small pools, so that sequences give way; cancellations, failures of memory, several outputs, takeovers."""
    rng = random.Random(seed)
    runner = SourceRunner(num_blocks=rng.randint(14, 40))
    runner.fail_steps = set(rng.sample(range(1, 60), rng.randint(0, 3)))
    engine = make_engine(
        runner,
        token_budget=rng.randint(4, 24),
        max_num_seqs=4,
        enable_prefix_cache=rng.random() < 0.7,
        speculation=rng.random() < 0.5,
    )
    driver = Driver(engine)
    requests: dict[str, GenerationRequest] = {}
    cancelled: set[str] = set()
    for i in range(rng.randint(1, 9)):
        start = rng.randint(0, 4)
        length = rng.randint(1, 24)
        emitted = ((START + 1,) * rng.randint(1, 6),) if rng.random() < 0.3 else ()
        num_outputs = 1 if emitted else rng.choice([1, 1, 3])
        requests[f"r{i}"] = sourced(
            f"r{i}",
            (token % 40 for token in range(start, start + length)),
            max_tokens=rng.randint(7, 14),
            num_outputs=num_outputs,
            emitted=emitted,
        )
        driver.add(requests[f"r{i}"])
        for _ in range(rng.randint(0, 4)):
            if driver.engine.has_work:
                driver.step()
        if rng.random() < 0.2:
            name = rng.choice(list(requests))
            engine.abort(name)
            cancelled.add(name)
    results = driver.run()
    for name, request in requests.items():
        if name in cancelled or results[name].error in ("OUT_OF_MEMORY", "SOURCE_TOO_LONG"):
            continue
        for index, tokens in enumerate(results[name].tokens):
            begun = list(request.emitted[index]) if request.emitted else []
            rest = paper_tokens([START, *begun], request.sampling.max_tokens - len(begun))
            assert tokens == begun + rest
