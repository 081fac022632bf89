"""Outputs of one request share its prompt's blocks until they write there, and give what each gives alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.generation import FinishReason, SamplingParams
from tests.builders_engine import Driver, PaperRunner, TokenNames, generate, make_engine, make_request, tiny_model
from tests.builders_models import tiny_module
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.attention.interface import AttentionBackend
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.blocks import BlockPool
from worker.engine.decoder.compile import compile_decoder
from worker.engine.graphs import CudaRecorder, GraphRunner, Recorder, run_again
from worker.engine.loop import Engine
from worker.engine.runner import ModelRunner
from worker.engine.scheduler import BlockCopy
from worker.engine.settings import EngineSettings
from worker.engine.types import GenerationRequest

SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 11}


def alone(request: GenerationRequest, output_index: int, runner: PaperRunner | None = None) -> list[int]:
    """The tokens of one output of a request whose others are over already."""
    num_outputs = request.sampling.num_outputs
    emitted = request.emitted or ((),) * num_outputs
    request = GenerationRequest(
        request.request_id,
        request.prompt_token_ids,
        request.sampling,
        emitted=emitted,
        finished_outputs=frozenset(range(num_outputs)) - {output_index},
    )
    engine = make_engine(runner or PaperRunner(num_blocks=400), enable_prefix_cache=False)
    return generate(engine, request)[request.request_id].tokens[output_index]


# -- what is shared ---------------------------------------------------------------------------


@pytest.mark.parametrize("enable_prefix_cache", [True, False])
@pytest.mark.parametrize("num_prompt_tokens", [1000, 1001])
def test_eight_outputs_take_hardly_more_blocks_and_no_more_prefill_than_one(
    num_prompt_tokens: int, enable_prefix_cache: bool
) -> None:
    used, rows, blocks_when_decoding = {}, {}, {}
    for num_outputs in (1, 8):
        runner = PaperRunner(num_blocks=600, block_size=16, max_model_len=1100)
        engine = make_engine(
            runner,
            block_size=16,
            token_budget=256,
            max_num_seqs=16,
            enable_prefix_cache=enable_prefix_cache,
            speculation=False,
        )
        driver = Driver(engine)
        prompt = [i % 40 for i in range(num_prompt_tokens)]
        driver.add(make_request("r", prompt, num_outputs=num_outputs, max_tokens=40, **SAMPLED))
        while not any(driver.results["r"].tokens):
            driver.step()
        stats = engine.stats()
        used[num_outputs], rows[num_outputs] = stats.num_blocks - stats.num_free_blocks, runner.num_rows
        assert stats.num_running == num_outputs
        assert all(len(tokens) == 1 for tokens in driver.results["r"].tokens)
        driver.step()
        blocks_when_decoding[num_outputs] = stats.num_blocks - engine.stats().num_free_blocks
        driver.run()
    assert used[8] == used[1] == -(-num_prompt_tokens // 16)
    assert rows[8] == rows[1] == num_prompt_tokens
    # As soon as they write: the full blocks, and one more for each.
    assert blocks_when_decoding[8] == num_prompt_tokens // 16 + 8 <= 1.15 * blocks_when_decoding[1]


def test_the_last_owner_of_a_block_writes_in_place() -> None:
    runner = PaperRunner(num_blocks=40)
    engine = make_engine(runner)
    generate(engine, make_request("r", range(6), num_outputs=4, max_tokens=6, **SAMPLED))
    assert runner.num_copies == 3  # of the block that holds two of the prompt's six tokens
    generate(engine, make_request("q", range(8), num_outputs=4, max_tokens=6, **SAMPLED))
    assert runner.num_copies == 3  # nobody writes into full blocks


def test_outputs_give_what_each_gives_alone() -> None:
    request = make_request("r", range(7), num_outputs=4, max_tokens=9, **SAMPLED)
    collected = generate(make_engine(PaperRunner(num_blocks=60)), request)["r"]
    assert collected.tokens == [alone(request, i) for i in range(4)]
    assert len(set(map(tuple, collected.tokens))) == 4
    assert collected.usage is not None
    assert collected.usage.completion_tokens == 36


def test_more_outputs_than_places_all_begin_with_the_prompt_and_take_turns() -> None:
    request = make_request("r", range(7), num_outputs=6, max_tokens=9, **SAMPLED)
    engine = make_engine(PaperRunner(num_blocks=60), max_num_seqs=4)
    driver = Driver(engine)
    driver.add(request)
    driver.step()
    assert [len(tokens) for tokens in driver.results["r"].tokens] == [1] * 6
    assert (engine.stats().num_running, engine.stats().num_waiting) == (4, 2)
    assert driver.run()["r"].tokens == [alone(request, i) for i in range(6)]


def test_places_are_kept_for_outputs_that_begin_soon() -> None:
    engine = make_engine(PaperRunner(num_blocks=100), token_budget=8, max_num_seqs=4)
    driver = Driver(engine)
    driver.add(make_request("many", range(20), num_outputs=4, max_tokens=5, **SAMPLED))
    driver.step()
    driver.add(make_request("late", range(30, 34), max_tokens=5))
    while not any(driver.results["many"].tokens):
        driver.step()
    assert engine.stats().num_running == 4
    assert not driver.results["late"].tokens[0]
    assert (engine.stats().num_waiting, all(driver.results["many"].tokens)) == (1, True)
    driver.run()


def test_a_request_begins_alone_even_where_its_outputs_cannot_all_run() -> None:
    request = make_request("r", range(12), num_outputs=4, max_tokens=4, **SAMPLED)
    engine = make_engine(PaperRunner(num_blocks=5, max_model_len=16))  # one output's blocks and no more
    assert generate(engine, request)["r"].tokens == [alone(request, i) for i in range(4)]
    assert engine.stats().num_preemptions > 0


# -- ends on the way --------------------------------------------------------------------------


def test_cancelling_before_the_prompt_is_computed_ends_every_output() -> None:
    engine = make_engine(PaperRunner(), token_budget=4)
    driver = Driver(engine)
    driver.add(make_request("r", range(20), num_outputs=3, **SAMPLED))
    driver.step()
    assert engine.stats().num_waiting == 2
    engine.abort("r")
    assert driver.run()["r"].reasons == [FinishReason.CANCELLED] * 3
    assert engine.stats().num_waiting == 0


def test_a_deadline_before_the_prompt_is_computed_ends_every_output() -> None:
    driver = Driver(make_engine(PaperRunner(), token_budget=4))
    driver.add(make_request("r", range(20), num_outputs=3, deadline=5.0, **SAMPLED))
    driver.step()
    driver.now = 5.0
    assert driver.run()["r"].reasons == [FinishReason.TIME_LIMIT] * 3


def test_an_output_that_ends_with_its_first_token_leaves_the_others_their_blocks() -> None:
    request = make_request("r", range(7), num_outputs=4, max_tokens=6, **SAMPLED)
    first = alone(request, 0)[0]
    request = make_request("r", range(7), num_outputs=4, max_tokens=6, stop_token_ids=(first,), **SAMPLED)
    collected = generate(make_engine(PaperRunner(num_blocks=60)), request)["r"]
    assert collected.tokens[0] == [first]
    assert collected.tokens == [alone(request, i) for i in range(4)]


def test_logits_that_are_no_numbers_end_the_request_with_all_its_outputs() -> None:
    runner = PaperRunner()
    runner.poisoned_token = 19
    engine = make_engine(runner, token_budget=8)
    collected = generate(engine, make_request("r", range(20), num_outputs=3, **SAMPLED))["r"]
    assert collected.error == "NAN_LOGITS"
    assert not any(collected.tokens)


def test_without_memory_for_copies_their_outputs_are_computed_again() -> None:
    request = make_request("r", range(7), num_outputs=4, max_tokens=9, **SAMPLED)
    runner = PaperRunner(num_blocks=60)
    runner.fail_copies = True
    engine = make_engine(runner)
    assert generate(engine, request)["r"].tokens == [alone(request, i) for i in range(4)]
    assert (runner.num_copies, engine.stats().num_preemptions) == (0, 3)


def test_a_takeover_goes_on_with_begun_outputs_and_forks_the_others() -> None:
    request = make_request("r", range(7), num_outputs=5, max_tokens=6, **SAMPLED)
    whole = [alone(request, i) for i in range(5)]
    emitted = (tuple(whole[0]), tuple(whole[1][:3]), (), (), tuple(whole[4][:1]))
    taken = make_request(
        "r", range(7), num_outputs=5, max_tokens=6, emitted=emitted, finished_outputs=frozenset({0}), **SAMPLED
    )
    runner = PaperRunner(num_blocks=60)
    collected = generate(make_engine(runner, token_budget=64, max_num_seqs=8), taken)["r"]
    assert collected.tokens == whole
    assert runner.num_rows == 10 + 7 + 8 + (2 + 5 + 5 + 4)  # prefills of 1, of 2 with 3, of 4; then what was left


# -- real caches ------------------------------------------------------------------------------


def compiled_runner(limits: EngineSettings, dtype: torch.dtype) -> ModelRunner:
    module, backend = tiny_module("llama", dtype=dtype), CpuAttention()
    return ModelRunner(module, backend, limits, compile_decoder(module, backend, 256))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_decoder_reads_what_was_copied(dtype: torch.dtype) -> None:
    limits = EngineSettings(block_size=16, num_blocks=64, token_budget=32, max_num_seqs=8, enable_prefix_cache=False)
    request = make_request("r", range(3, 44), num_outputs=5, max_tokens=24, **SAMPLED)
    collected = generate(Engine(compiled_runner(limits, dtype), limits, TokenNames), request)["r"]
    for index in range(5):
        single = make_request("r", range(3, 44), num_outputs=5, max_tokens=24, **SAMPLED, emitted=((),) * 5)
        single = GenerationRequest(
            "r",
            single.prompt_token_ids,
            single.sampling,
            emitted=single.emitted,
            finished_outputs=frozenset(range(5)) - {index},
        )
        one = generate(Engine(compiled_runner(limits, dtype), limits, TokenNames), single)["r"]
        assert collected.tokens[index] == one.tokens[index]


def test_every_layer_is_copied_and_sources_are_read_first() -> None:
    limits = EngineSettings(block_size=16, num_blocks=5, token_budget=32, max_num_seqs=4)
    runner = compiled_runner(limits, torch.bfloat16)
    for cache in runner._caches:
        for tensor in (cache.keys, cache.values):
            tensor.copy_(torch.randn(tensor.shape))
    before = [(cache.keys.clone(), cache.values.clone()) for cache in runner._caches]
    runner.copy_blocks([BlockCopy(1, 2), BlockCopy(2, 3)])
    for cache, old in zip(runner._caches, before, strict=True):
        for tensor, was in zip((cache.keys, cache.values), old, strict=True):
            assert torch.equal(tensor, was[[0, 1, 1, 2, 4, 5]])


def replaying_engine(device: str, backend: AttentionBackend, record: Recorder) -> Engine:
    limits = EngineSettings(block_size=16, num_blocks=64, token_budget=32, max_num_seqs=8, enable_prefix_cache=False)
    runner = ModelRunner(tiny_module("llama").to(device), backend, limits)
    return Engine(GraphRunner(runner, record, limits.max_num_seqs, 16), limits, TokenNames)


def test_replayed_decodes_read_what_was_copied() -> None:
    request = make_request("r", range(3, 44), num_outputs=5, max_tokens=12, prompt_logprobs=2, **SAMPLED)
    plain = EngineSettings(block_size=16, num_blocks=64, token_budget=32, max_num_seqs=8)
    expected = generate(Engine(compiled_runner(plain, torch.float32), plain, TokenNames), request)["r"]
    replayed = generate(replaying_engine("cpu", TorchAttention(16), run_again), request)["r"]
    assert replayed.tokens == expected.tokens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_graphs_on_a_gpu_read_what_was_copied() -> None:
    triton_paged = pytest.importorskip("worker.engine.attention.triton_paged")
    request = make_request(
        "r", range(3, 44), num_outputs=5, max_tokens=12, logprobs=True, top_logprobs=3, prompt_logprobs=2, **SAMPLED
    )
    expected = generate(replaying_engine("cpu", TorchAttention(16), run_again), request)["r"]
    recorder = CudaRecorder(torch.device("cuda"))
    replayed = generate(replaying_engine("cuda", triton_paged.TritonAttention(), recorder), request)["r"]
    assert replayed.tokens == expected.tokens
    for found, wanted in zip(replayed.logprobs, expected.logprobs, strict=True):
        assert found == pytest.approx(wanted, abs=1e-3)


# -- any workload -----------------------------------------------------------------------------


def any_request(rng: random.Random, name: str) -> GenerationRequest:
    start, length = rng.randrange(3), rng.randrange(1, 30)
    num_outputs = rng.randrange(1, 7)
    sampling = SamplingParams(
        max_tokens=rng.randrange(1, 14),
        temperature=rng.choice((0.0, 0.9)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.3)),
        seed=rng.getrandbits(64),
        num_outputs=num_outputs,
        stop_token_ids=rng.choice(((), (7, 8, 9))),
    )
    request = GenerationRequest(name, tuple((i * 7) % 40 for i in range(start, start + length)), sampling)
    if rng.random() < 0.3:
        whole = [alone(request, i) for i in range(num_outputs)]
        emitted = tuple(tuple(tokens[: rng.randrange(len(tokens))]) for tokens in whole)
        finished = frozenset(i for i in range(num_outputs) if rng.random() < 0.2)
        emitted = tuple(tuple(whole[i]) if i in finished else emitted[i] for i in range(num_outputs))
        request = GenerationRequest(name, request.prompt_token_ids, sampling, emitted, finished)
    return GenerationRequest(
        name,
        request.prompt_token_ids,
        sampling,
        request.emitted,
        request.finished_outputs,
        priority=rng.randrange(2),
        tenant=rng.choice(("a", "b")),
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32), enable_prefix_cache=st.booleans(), num_blocks=st.integers(13, 40))
def test_any_workload_gives_each_output_what_it_gets_alone(
    seed: int, enable_prefix_cache: bool, num_blocks: int
) -> None:
    """Blocks are checked after every step: by `check_integrity`, and by the runner for what is in them."""
    rng = random.Random(seed)
    runner = PaperRunner(num_blocks=num_blocks, max_model_len=44, memory=rng.choice((None, 2)))
    runner.fail_steps = {rng.randrange(2, 60)}
    engine = make_engine(
        runner,
        token_budget=rng.randrange(6, 24),
        max_num_seqs=rng.randrange(2, 7),
        enable_prefix_cache=enable_prefix_cache,
    )
    driver = Driver(engine)
    requests = [any_request(rng, f"r{i}") for i in range(rng.randrange(1, 6))]
    waiting = list(requests)
    aborted = set()
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.4:
            driver.add(waiting.pop())
        if driver.results and rng.random() < 0.02:
            aborted.add(rng.choice(sorted(driver.results)))
            engine.abort(sorted(aborted)[-1])
        runner.fail_copies = rng.random() < 0.1
        driver.step()
    for request in requests:
        collected = driver.results[request.request_id]
        if collected.error is not None:
            assert collected.error == "OUT_OF_MEMORY"
            continue
        for index, tokens in enumerate(collected.tokens):
            expected = alone(request, index, PaperRunner(num_blocks=400, memory=runner.memory))
            if collected.reasons[index] is FinishReason.CANCELLED:
                assert tokens == expected[: len(tokens)]
            else:
                assert tokens == expected
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_a_block_that_is_written_while_it_is_shared_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockPool, "is_shared", lambda self, block_id: False)
    with pytest.raises(AssertionError, match="two sequences write one slot"):
        generate(make_engine(PaperRunner()), make_request("r", range(6), num_outputs=2, **SAMPLED))


def test_a_block_that_is_not_copied_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PaperRunner, "copy_blocks", lambda self, copies: None)
    with pytest.raises(AssertionError, match="reads a slot that is not its own"):
        generate(make_engine(PaperRunner()), make_request("r", range(6), num_outputs=2, **SAMPLED))


def test_a_model_gives_every_output_what_it_gave_without_sharing() -> None:
    model = tiny_model("llama")
    request = make_request("r", range(3, 53), num_outputs=3, max_tokens=10, **SAMPLED)
    collected = generate(make_engine(model, block_size=8, num_blocks=40, token_budget=32), request)["r"]
    for index in range(3):
        single = GenerationRequest(
            "r",
            request.prompt_token_ids,
            request.sampling,
            emitted=((),) * 3,
            finished_outputs=frozenset(range(3)) - {index},
        )
        engine = make_engine(model, block_size=8, num_blocks=40, token_budget=32)
        assert generate(engine, single)["r"].tokens[index] == collected.tokens[index]
