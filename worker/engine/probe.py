"""Measures at start-up what steps of this model cost on this machine: about a second, or four steps of a slow model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import torch

from common.generation import SamplingParams
from worker.engine.cost import CostModel
from worker.engine.runner import StepOutOfMemory
from worker.engine.sampler import Sampler
from worker.engine.scheduler import Chunk, Plan
from worker.engine.seq2seq.source import Source
from worker.engine.sequence import Sequence
from worker.engine.settings import EngineSettings

SIZES: Final = (1, 128, 32, 8, 512, 2, 4, 2048)  # rows; in order of what they tell
_DRAFTED_ROWS: Final = 8  # one of the sizes: so many rows are timed with drafts too
_NUM_CERTAIN: Final = 2  # without two sizes there is no slope
_MAX_ROUNDS: Final = 5
_LIMIT_S: Final = 1.2
_CONTEXT: Final = 256  # tokens of a decoding sequence
_FIRST_BLOCK: Final = 1  # behind the scratch block


class ProbedRunner(Protocol):
    """What the probe needs of a `ModelRunner`."""

    device: torch.device
    max_model_len: int
    max_source_tokens: int  # 0 without an encoder
    vocab_size: int

    def execute(self, plan: Plan) -> torch.Tensor: ...


def probe_cost(
    runner: ProbedRunner, settings: EngineSettings, clock: Callable[[], float] = time.perf_counter
) -> CostModel:
    """Time steps of several sizes, model and sampler together.

    Call it before anything is in the KV cache: what the steps write there is nonsense, and no block is taken for it.
    """
    sampler = Sampler(runner.device)

    def run(plan: Plan) -> None:
        sampler.sample(runner.execute(plan), plan.logit_rows)

    largest = min(settings.most_step_tokens, runner.max_model_len)
    sizes = tuple(num_rows for num_rows in SIZES if num_rows <= largest)
    measured = measure_ms(lambda num_rows: run(_plan(num_rows, runner, settings)), sizes, clock=clock)
    if not settings.speculation or settings.max_num_seqs < _DRAFTED_ROWS or _DRAFTED_ROWS not in measured:
        return CostModel.fit(measured)
    drafted = measure_ms(
        lambda _: run(_drafted_plan(runner, settings)), (_DRAFTED_ROWS,), clock=clock, limit_s=_LIMIT_S / 10
    )
    return CostModel.fit(measured, drafted[_DRAFTED_ROWS] - measured[_DRAFTED_ROWS])


def measure_ms(
    run: Callable[[int], None],
    sizes: tuple[int, ...],
    *,
    clock: Callable[[], float] = time.perf_counter,
    limit_s: float = _LIMIT_S,
) -> dict[int, float]:
    """Return the shortest time of each size in milliseconds.

    The sizes take turns, since whatever disturbs a measurement usually lasts: round after round, each as long as it
    fits into what is left of `limit_s`. The first two run once more beforehand, as first runs allocate and compile, and
    are always measured. A size that memory does not hold is left out, and so are larger ones.
    """
    for size in sizes[:_NUM_CERTAIN]:
        run(size)
    deadline = clock() + limit_s
    measured: dict[int, float] = {}
    too_large = float("inf")
    for _ in range(_MAX_ROUNDS):
        for size in sizes:
            is_certain = size in sizes[:_NUM_CERTAIN] and size not in measured
            if size >= too_large or (not is_certain and clock() + _expected_ms(size, measured) / 1000 > deadline):
                continue
            before = clock()
            try:
                run(size)
            except StepOutOfMemory:
                too_large = size
                continue
            measured[size] = min(measured.get(size, float("inf")), (clock() - before) * 1000)
    return measured


def _expected_ms(size: int, measured: Mapping[int, float]) -> float:
    """What a size took, or at most takes when no row costs more than in a smaller step."""
    smaller = max(other for other in measured if other <= size)
    return measured[smaller] * size / smaller


def _plan(num_rows: int, runner: ProbedRunner, settings: EngineSettings) -> Plan:
    """A step of decodes, and of one prefill for what goes beyond max_num_seqs.

    All sequences read and write the same blocks: in which order does not matter to the time.
    """
    num_decodes = num_rows if num_rows <= settings.max_num_seqs else settings.max_num_seqs - 1
    context = min(_CONTEXT, runner.max_model_len)
    chunks = [_chunk(context, 1, runner, settings) for _ in range(num_decodes)]
    if num_rows > num_decodes:
        num_tokens = num_rows - num_decodes
        chunks.append(_chunk(num_tokens, num_tokens, runner, settings))
    return Plan(tuple(chunks), num_rows)


def _drafted_plan(runner: ProbedRunner, settings: EngineSettings) -> Plan:
    """A step of as many rows as one of the sizes, all but two of them drafts."""
    chunks = []
    for _ in range(2):
        plain = _chunk(min(_CONTEXT, runner.max_model_len), _DRAFTED_ROWS // 2, runner, settings)
        sequence = plain.sequence
        drafts = sequence.token_ids[sequence.num_computed_tokens + 1 :]
        del sequence.token_ids[sequence.num_computed_tokens + 1 :]
        chunks.append(Chunk(sequence, plain.num_tokens, is_last=True, drafts=drafts))
    return Plan(tuple(chunks), _DRAFTED_ROWS)


def _chunk(context: int, num_tokens: int, runner: ProbedRunner, settings: EngineSettings) -> Chunk:
    """The last `num_tokens` of a sequence of `context` tokens; a decode is sampled greedily."""
    token_ids = [(7919 * i) % runner.vocab_size for i in range(context)]  # spread over the experts of a mixture
    source = Source.of(token_ids[: runner.max_source_tokens])
    sequence = Sequence("probe", token_ids, SamplingParams(max_tokens=1), source=source)
    if source is not None:  # it has been read
        num_blocks = -(-len(source.token_ids) // settings.block_size)
        sequence.source_block_ids.extend(range(_FIRST_BLOCK, _FIRST_BLOCK + num_blocks))
        sequence.is_source_computed = True
    num_blocks = -(-context // settings.block_size)
    sequence.block_ids.extend(range(_FIRST_BLOCK, _FIRST_BLOCK + num_blocks))
    sequence.num_computed_tokens = context - num_tokens
    return Chunk(sequence, num_tokens, is_last=num_tokens == 1)
