"""Replayed steps: padding, choice of the size, and that a replay reads nothing but its static tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from transformers import PreTrainedModel

from tests.builders_engine import TokenNames, generate, make_request, make_settings, tiny_model
from tests.builders_models import tiny_module
from tests.waits import Waits
from worker.engine.attention import hf
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.graphs import (
    CudaRecorder,
    GraphRunner,
    Size,
    Step,
    batch_sizes,
    mixed_sizes,
    run_again,
    token_numbers,
)
from worker.engine.loop import Engine
from worker.engine.runner import ModelRunner
from worker.engine.scheduler import Chunk, Plan
from worker.engine.sequence import Sequence

BLOCK = 4


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=2)


class Counting:
    """A recorder that counts what is replayed, by the batch size that was recorded."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.replayed: list[int] = []

    def __call__(self, step: Step) -> Step:
        size = step().shape[0]
        self.sizes.append(size)

        def replay() -> torch.Tensor:
            self.replayed.append(size)
            return step()

        return replay


def make_runner(model: PreTrainedModel, **settings: Any) -> ModelRunner:
    return ModelRunner(model, TorchAttention(BLOCK), make_settings(num_blocks=60, **settings))


def decodes(*lengths: int) -> Plan:
    """A step that decodes the last token of each sequence."""
    chunks = []
    next_block = 1
    for index, length in enumerate(lengths):
        sequence = Sequence(f"r{index}", [(5 * i + index) % 190 + 3 for i in range(length)], make_request().sampling)
        num_blocks = -(-length // BLOCK)
        sequence.block_ids.extend(range(next_block, next_block + num_blocks))
        next_block += num_blocks
        sequence.num_computed_tokens = length - 1
        chunks.append(Chunk(sequence, 1, is_last=True))
    return Plan(tuple(chunks), len(chunks))


def mixed(*lengths: tuple[int, int], drafts: int = 0) -> Plan:
    """A step of (context, new tokens) that gives each sequence its next token, the first one with `drafts`."""
    plan = decodes(*(length for length, _ in lengths))
    chunks = []
    for chunk, (length, num_new) in zip(plan.chunks, lengths, strict=True):
        chunk.sequence.num_computed_tokens = length - num_new
        chunks.append(Chunk(chunk.sequence, num_new, is_last=True))
    if drafts:
        sequence = chunks[0].sequence
        guesses = sequence.token_ids[len(sequence.token_ids) - drafts :]
        del sequence.token_ids[len(sequence.token_ids) - drafts :]
        sequence.num_computed_tokens = len(sequence.token_ids) - 1
        chunks[0] = Chunk(sequence, 1 + drafts, is_last=True, drafts=guesses)
    return Plan(tuple(chunks), sum(chunk.num_tokens for chunk in chunks))


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1, (1,)),
        (5, (1, 2, 4, 5)),
        (64, (1, 2, 4, 8, 16, 24, 32, 48, 64)),
        (100, (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)),
        (256, (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)),
    ],
)
def test_batch_sizes_end_with_the_most(most: int, expected: tuple[int, ...]) -> None:
    assert batch_sizes(most) == expected


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (7, (7,)),
        (100, (16, 32, 48, 64, 80, 96, 100)),
        (256, (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)),
    ],
)
def test_numbers_of_tokens_end_with_the_most(most: int, expected: tuple[int, ...]) -> None:
    assert token_numbers(most) == expected


def test_padding_of_large_steps_is_a_fifth_at_most() -> None:
    numbers = token_numbers(2048)
    for num_tokens in range(49, 2049):
        size = next(number for number in numbers if number >= num_tokens)
        assert size - num_tokens <= (15 if size <= 64 else size / 5)


def test_sizes_that_cannot_be_are_not_recorded() -> None:
    sizes = mixed_sizes(80, 64)
    assert sizes == sorted(sizes)
    assert [(size.num_tokens, size.num_seqs) for size in sizes] == [
        *((16, 32), (32, 32), (48, 32), (48, 64), (64, 32), (64, 64), (80, 32), (80, 64))
    ]
    assert mixed_sizes(20, 4) == [Size(16, 4, 16), Size(20, 4, 20)]


def test_the_largest_batch_is_recorded_first(model: PreTrainedModel) -> None:
    counting = Counting()
    GraphRunner(make_runner(model), counting, 10, BLOCK)
    assert counting.sizes == [10, 8, 4, 2, 1]


@pytest.mark.parametrize(("num_seqs", "size"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_a_step_of_decodes_replays_the_next_larger_batch(model: PreTrainedModel, num_seqs: int, size: int) -> None:
    counting = Counting()
    runner = GraphRunner(make_runner(model), counting, 8, BLOCK)
    logits = runner.execute(decodes(*range(1, num_seqs + 1)))
    assert logits.shape == (num_seqs, 200)
    assert counting.replayed == [size]


def test_a_replay_gives_what_the_step_itself_gives(model: PreTrainedModel) -> None:
    """Also after steps that were larger, and had longer contexts: nothing of them may be left."""
    plain = make_runner(model, max_num_seqs=8)
    replaying = GraphRunner(make_runner(model, max_num_seqs=8), run_again, 8, BLOCK)
    for lengths in [(5, 9, 1, 30, 2), (3,), (7, 2, 40), (40, 7), (1, 1, 1, 1, 1, 1, 1, 1)]:
        expected = plain.execute(decodes(*lengths))
        torch.testing.assert_close(replaying.execute(decodes(*lengths)), expected, rtol=1e-5, atol=1e-5)


def test_padding_writes_to_the_scratch_block_alone(model: PreTrainedModel) -> None:
    inner = make_runner(model)
    runner = GraphRunner(inner, run_again, 8, BLOCK)
    runner.execute(decodes(6, 6, 6, 6, 6, 6, 6, 6))  # leaves slots and lengths that padding must not use again
    caches = inner._attention._caches.values()
    for cache in caches:
        cache.keys.zero_()
        cache.values.zero_()
    runner.execute(decodes(6, 3, 9))
    for cache in caches:
        written = cache.keys.abs().sum((2, 3)).nonzero().tolist()
        assert written == [[0, 0], [2, 1], [3, 2], [6, 0]]  # scratch, then each sequence's last token


@pytest.mark.parametrize(
    ("plan", "size"),
    [
        (mixed((3, 1), (6, 6)), 16),
        (mixed((16, 16)), 16),
        (mixed((20, 1), (12, 12), (9, 4)), 32),
        (mixed((30, 30), (30, 2), (3, 2)), 48),
        (mixed((20, 4), (6, 1), drafts=2), 16),
    ],
)
def test_a_mixed_step_is_replayed_as_the_next_larger_one(model: PreTrainedModel, plan: Plan, size: int) -> None:
    """Also of a chunk behind cached tokens, and with drafts, which have logits each."""
    counting = Counting()
    runner = GraphRunner(make_runner(model, token_budget=48), counting, 4, BLOCK, 48)
    logits = runner.execute(plan)
    assert counting.replayed == [4]  # rows of logits
    assert next(iter(runner._mixed)) == Size(16, 4, 16)
    assert logits.shape == (sum(chunk.num_logit_rows for chunk in plan.chunks), 200)
    assert next(used for used in runner._mixed if used.num_tokens >= plan.num_tokens).num_tokens == size
    torch.testing.assert_close(logits, make_runner(model, token_budget=48).execute(plan), rtol=1e-4, atol=1e-4)


def test_mixed_steps_and_decodes_take_turns(model: PreTrainedModel) -> None:
    """On the same tensors: nothing of a step may be left in the next one."""
    limits = {"max_num_seqs": 8, "token_budget": 64}
    plain = make_runner(model, **limits)
    replaying = GraphRunner(make_runner(model, **limits), run_again, 8, BLOCK, 64)
    for make in (
        lambda: mixed((40, 40), (20, 3)),
        lambda: decodes(3, 40),
        lambda: mixed((5, 1), (9, 9), (2, 2), (30, 1)),
        lambda: decodes(7, 2, 9, 1, 1),
        lambda: mixed((64, 64)),
    ):
        torch.testing.assert_close(replaying.execute(make()), plain.execute(make()), rtol=1e-4, atol=1e-4)


def test_padding_of_a_mixed_step_writes_to_the_scratch_block_alone(model: PreTrainedModel) -> None:
    inner = make_runner(model)
    runner = GraphRunner(inner, run_again, 8, BLOCK, 32)
    runner.execute(mixed((20, 20), (8, 8)))  # leaves slots and lengths that padding must not use again
    caches = inner._attention._caches.values()
    for cache in caches:
        cache.keys.zero_()
        cache.values.zero_()
    runner.execute(mixed((6, 1), (9, 3)))
    for cache in caches:
        written = cache.keys.abs().sum((2, 3)).nonzero().tolist()
        assert written == [[0, 0], [2, 1], [4, 2], [4, 3], [5, 0]]


def test_more_rows_of_logits_than_recorded_run_as_usual(model: PreTrainedModel) -> None:
    counting = Counting()
    runner = GraphRunner(make_runner(model), counting, 2, BLOCK, 32)
    assert runner.execute(mixed((9, 3), (6, 6), drafts=2)).shape[0] == 4
    assert counting.replayed == []


def test_a_step_of_more_tokens_than_recorded_runs_as_usual(model: PreTrainedModel) -> None:
    counting = Counting()
    runner = GraphRunner(make_runner(model, token_budget=32), counting, 4, BLOCK, 16)
    assert runner.execute(mixed((10, 10), (7, 7))).shape[0] == 2
    assert counting.replayed == []


def test_only_decodes_are_recorded_unless_told_otherwise(model: PreTrainedModel) -> None:
    counting = Counting()
    runner = GraphRunner(make_runner(model), counting, 4, BLOCK)
    plan = decodes(3, 6)
    prefill = Chunk(plan.chunks[1].sequence, 6, is_last=True)
    prefill.sequence.num_computed_tokens = 0
    assert runner.execute(Plan((plan.chunks[0], prefill), 7)).shape[0] == 2
    unfinished = Chunk(plan.chunks[0].sequence, 1, is_last=False)
    assert runner.execute(Plan((unfinished,), 1)).shape[0] == 0
    assert counting.replayed == []


def test_a_token_that_gives_none_is_no_decode(model: PreTrainedModel) -> None:
    """The last chunk but one of a prompt may have a single token."""
    counting = Counting()
    runner = GraphRunner(make_runner(model), counting, 4, BLOCK, 16)
    plan = decodes(3, 6)
    unfinished = Chunk(plan.chunks[0].sequence, 1, is_last=False)
    assert runner.execute(Plan((unfinished, plan.chunks[1]), 2)).shape[0] == 1
    assert counting.replayed == [4]


def test_more_sequences_than_recorded_run_as_usual(model: PreTrainedModel) -> None:
    counting = Counting()
    runner = GraphRunner(make_runner(model, max_num_seqs=4), counting, 2, BLOCK)
    assert runner.execute(decodes(3, 6, 2)).shape[0] == 3
    assert counting.replayed == []


def test_a_model_that_cannot_be_recorded_runs_as_usual(model: PreTrainedModel) -> None:
    def refuse(step: Step) -> Step:
        if step().shape[0] == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return step

    with capture_logs() as logs:
        runner = GraphRunner(make_runner(model), refuse, 4, BLOCK)
    assert [entry["event"] for entry in logs] == ["graphs.unavailable", "graphs.recorded"]
    expected = make_runner(model).execute(decodes(3, 6))
    torch.testing.assert_close(runner.execute(decodes(3, 6)), expected, rtol=1e-5, atol=1e-5)


def test_an_engine_decodes_alike_with_replays(model: PreTrainedModel) -> None:
    """Requests join and leave, prompts are cut into chunks, greedy and sampled ones side by side."""
    requests = [
        make_request(f"r{i}", range(3, 6 + 9 * i), max_tokens=10 + i, seed=i, temperature=float(i % 2))
        for i in range(5)
    ]
    settings = make_settings(num_blocks=40, max_num_seqs=4)
    results = []
    counting = Counting()
    for is_replaying in (False, True):
        runner = ModelRunner(model, TorchAttention(BLOCK), settings)
        engine = Engine(GraphRunner(runner, counting, 4, BLOCK, 16) if is_replaying else runner, settings, TokenNames)
        results.append({name: collected.tokens for name, collected in generate(engine, *requests).items()})
    assert results[0] == results[1]
    assert len(counting.replayed) > 10


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_no_forward_waits_for_the_device(family: str) -> None:
    """It could not be captured then."""
    module = tiny_module(family, num_hidden_layers=2)
    hf.install(module)
    rows = torch.arange(3)
    with torch.inference_mode(), hf.attention(lambda layer, q, k, v, options: q.new_zeros(3, q.shape[1], v.shape[2])):
        with Waits() as waits:
            module(input_ids=rows[None] + 5, position_ids=rows[None] * 4, use_cache=False, logits_to_keep=rows)
        assert waits.seen == []
        with Waits() as waits:
            bool(module.lm_head.weight.sum() > 0)
        assert waits.seen  # and the watch is awake


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_cuda_graph_gives_what_the_step_itself_gives() -> None:
    triton_paged = pytest.importorskip("worker.engine.attention.triton_paged")
    model = tiny_model("llama").to("cuda")
    settings = make_settings(block_size=16, num_blocks=60, max_num_seqs=8)
    plain = ModelRunner(model, triton_paged.TritonAttention(), settings)
    inner = ModelRunner(model, triton_paged.TritonAttention(), settings)
    replaying = GraphRunner(inner, CudaRecorder(torch.device("cuda")), 8, 16, 64)
    assert [size.num_seqs for size in replaying._decodes] == [1, 2, 4, 8]
    assert [size.num_tokens for size in replaying._mixed] == [16, 32, 48, 64]
    for lengths in [(5, 9, 1, 30, 2), (3,), (7, 2, 40)]:
        expected = plain.execute(decodes(*lengths))
        torch.testing.assert_close(replaying.execute(decodes(*lengths)), expected, rtol=1e-4, atol=1e-4)
    for steps in [((40, 40), (7, 1), (30, 5)), ((9, 2),)]:
        expected = plain.execute(mixed(*steps))
        torch.testing.assert_close(replaying.execute(mixed(*steps)), expected, rtol=1e-4, atol=1e-4)
