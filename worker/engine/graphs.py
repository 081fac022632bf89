"""Decode steps by replay: all launches of a step are recorded once per batch size and repeated with one call.

Python and dispatch cost a forward pass of transformers' classes about 0.25 ms a layer, more than a GPU computes at
small batches. A step of nothing but decodes is therefore padded to the next recorded batch size, copied into the
tensors that the recording reads, and replayed; prefills, mixed steps and steps with adapters run as usual. Rows of
padding decode token 0 at position 0 of the scratch block, which no sequence ever reads.

How a step is recorded is behind `Recorder`, so that everything else runs, and is tested, without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import structlog
import torch

from worker.engine.attention.interface import AttentionBatch
from worker.engine.batch import BatchBuffers, StepBatch, TokensInFlight
from worker.engine.runner import ModelRunner
from worker.engine.scheduler import BlockCopy, Chunk, Plan

_log = structlog.get_logger(__name__)

Step = Callable[[], torch.Tensor]
# Runs a step and returns what repeats it: the same launches on the same memory, with whatever that holds by then.
Recorder = Callable[[Step], Step]


def batch_sizes(most: int) -> tuple[int, ...]:
    """Return the batch sizes to record for at most `most` sequences, ascending; close where padding costs most.

    1, 2, 4, then steps of 8 up to 32, of 16 up to 64, of 32 behind that; `most` itself is among them.
    """
    sizes = [1, 2, 4, *range(8, 32, 8), *range(32, 64, 16), *range(64, most + 32, 32)]
    return (*(size for size in sizes if size < most), most)


def run_again(step: Step) -> Step:
    """A recorder that records nothing."""
    step()
    return step


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory, on a stream of its own.

    Record the largest step first, so that the smaller ones fit into what it left in the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, step: Step) -> Step:
        # Not recorded: compiles Triton's kernels and makes cuBLAS take its workspace, which a capture must not.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: another may use the device meanwhile, as a thread that pins memory does.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


class _Staged:
    """Device memory that recordings read, with host memory to fill it from: twice, since a copy from the one may be
    under way still when the next step comes.
    """

    def __init__(self, size: int, dtype: torch.dtype, padding: int, device: torch.device) -> None:
        self._hosts = [torch.zeros(size, dtype=dtype, pin_memory=device.type == "cuda") for _ in range(2)]
        self._padding = padding
        self.tensor = torch.full((size,), padding, dtype=dtype, device=device)

    def put(self, values: torch.Tensor, size: int) -> None:
        """Copy `values`, on the host, and padding behind them up to `size`."""
        self._hosts.reverse()
        host = self._hosts[0]
        host[: len(values)].copy_(values)
        host[len(values) : size].fill_(self._padding)
        self.tensor[:size].copy_(host[:size], non_blocking=True)


class _Static:
    """The batch that recordings read, at its largest; a smaller one is its beginning."""

    def __init__(self, max_num_seqs: int, max_num_blocks: int, device: torch.device) -> None:
        self.input_ids = _Staged(max_num_seqs, torch.int64, 0, device)
        self.position_ids = _Staged(max_num_seqs, torch.int64, 0, device)
        self.slots = _Staged(max_num_seqs, torch.int32, 0, device)
        self.context_lens = _Staged(max_num_seqs, torch.int32, 1, device)
        self.block_tables = torch.zeros((max_num_seqs, max_num_blocks), dtype=torch.int32, device=device)
        self._tables = _Staged(max_num_seqs * max_num_blocks, torch.int32, 0, device)  # of a step, as narrow as it is
        # One row a sequence, each with logits: this never changes.
        self.rows = torch.arange(max_num_seqs + 1, dtype=torch.int64, device=device)
        self.query_starts = self.rows.to(torch.int32)

    def batch(self, size: int, max_context_len: int) -> StepBatch:
        """What a recording for `size` sequences reads."""
        return StepBatch(
            input_ids=self.input_ids.tensor[:size].unsqueeze(0),
            position_ids=self.position_ids.tensor[:size].unsqueeze(0),
            logit_rows=self.rows[:size],
            attention=AttentionBatch(
                slots=self.slots.tensor[:size],
                block_tables=self.block_tables[:size],
                query_starts=self.query_starts[: size + 1],
                context_lens=self.context_lens.tensor[:size],
                max_query_len=1,
                max_context_len=max_context_len,
            ),
        )

    def put(self, step: StepBatch, size: int) -> None:
        """Copy a step of decodes, laid out on the host, and pad it to `size` sequences."""
        self.input_ids.put(step.input_ids[0], size)
        self.position_ids.put(step.position_ids[0], size)
        self.slots.put(step.attention.slots, size)
        self.context_lens.put(step.attention.context_lens, size)
        width = step.attention.block_tables.shape[1]
        self._tables.put(step.attention.block_tables.flatten(), size * width)
        self.block_tables[:size, :width].copy_(self._tables.tensor[: size * width].view(size, width))


class GraphRunner:
    """A model runner whose decode steps are replayed. Takes the place of the runner that it is made from."""

    def __init__(self, runner: ModelRunner, record: Recorder, max_num_seqs: int, block_size: int) -> None:
        """Record every batch size, the largest first. Where the model cannot be recorded, all steps run as usual.

        Logits of a replayed step are valid until the next step.
        """
        self._runner = runner
        self.device = runner.device
        self.num_blocks = runner.num_blocks
        self.max_model_len = runner.max_model_len
        self.vocab_size = runner.vocab_size
        max_num_blocks = -(-runner.max_model_len // block_size)
        self._static = _Static(max_num_seqs, max_num_blocks, runner.device)
        self._host = BatchBuffers(
            max_num_tokens=max_num_seqs,
            max_num_seqs=max_num_seqs,
            max_num_blocks=max_num_blocks,
            block_size=block_size,
            device=torch.device("cpu"),
        )
        self._replays: dict[int, Step] = {}  # by batch size, ascending
        self._record_all(record, batch_sizes(max_num_seqs))

    def _record_all(self, record: Recorder, sizes: tuple[int, ...]) -> None:
        started = time.monotonic()
        replays: dict[int, Step] = {}
        for size in reversed(sizes):
            try:
                with torch.inference_mode():
                    replays[size] = record(partial(self._step, size))
            except Exception as error:  # noqa: BLE001 - a model that waits for the device may fail in any way
                _log.warning(
                    "graphs.unavailable", batch_size=size, reason=str(error), effect="decodes run step by step"
                )
                break
        self._replays = dict(sorted(replays.items()))
        _log.info("graphs.recorded", batch_sizes=list(self._replays), seconds=round(time.monotonic() - started, 1))

    def _step(self, size: int) -> torch.Tensor:
        # A new batch each time: back-ends that prepare a batch do so once per object.
        return self._runner.forward(self._static.batch(size, self.max_model_len))

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """As the runner's: on the stream on which steps are replayed. Raises StepOutOfMemory."""
        self._runner.copy_blocks(copies)

    def execute(self, plan: Plan, in_flight: TokensInFlight | None = None) -> torch.Tensor:
        """Compute the plan and return the logits of its rows that give a token. Raises StepOutOfMemory."""
        num_seqs = len(plan.chunks)
        size = next((size for size in self._replays if size >= num_seqs), None)
        if size is None or not all(_is_recorded(chunk) for chunk in plan.chunks):
            return self._runner.execute(plan, in_flight)
        self._runner.on_part("batch")
        self._static.put(self._host.fill(plan), size)
        if in_flight is not None:
            in_flight.fill_in(self._static.input_ids.tensor, plan)
        self._runner.on_part("forward")
        return self._replays[size]()[:num_seqs]


def _is_recorded(chunk: Chunk) -> bool:
    """Whether a recording computes it: a decode, with the model's own weights."""
    return chunk.num_tokens == 1 and chunk.is_last and chunk.sequence.adapter is None
