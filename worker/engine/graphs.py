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
from typing import Final

import structlog
import torch

from worker.engine.attention.interface import AttentionBatch
from worker.engine.batch import BatchBuffers, StepBatch, TokensInFlight
from worker.engine.runner import ModelRunner
from worker.engine.scheduler import BlockCopy, Chunk, Plan

_log = structlog.get_logger(__name__)

_ROW_BYTES: Final = 24  # of a sequence: input id, position, slot, length of its context
_PADDING: Final = (0, 0, 0, 1)  # of each

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

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        is_copied = device.type == "cuda"
        self._hosts = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_copied) for _ in range(2)]
        self.tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    def next(self) -> torch.Tensor:
        """Return the host memory to fill now."""
        self._hosts.reverse()
        return self._hosts[0]

    def send(self, num_bytes: int) -> None:
        """Copy the beginning of what was filled to the device."""
        self.tensor[:num_bytes].copy_(self._hosts[0][:num_bytes], non_blocking=True)


class _Static:
    """The batch that recordings read, at its largest; a smaller one is its beginning."""

    def __init__(self, max_num_seqs: int, max_num_blocks: int, device: torch.device) -> None:
        self._max_num_seqs = max_num_seqs
        self._rows = _Staged(max_num_seqs * _ROW_BYTES, device)  # all in one copy: each costs more than its bytes
        self._tables = _Staged(max_num_seqs * max_num_blocks * 4, device)  # of a step, as narrow as it is
        self.input_ids, self._position_ids, self._slots, self._context_lens = self._columns(self._rows.tensor)
        self._context_lens.fill_(1)
        self.block_tables = torch.zeros((max_num_seqs, max_num_blocks), dtype=torch.int32, device=device)
        # One row a sequence, each with logits: this never changes.
        self.rows = torch.arange(max_num_seqs + 1, dtype=torch.int64, device=device)
        self.query_starts = self.rows.to(torch.int32)

    def _columns(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input ids and position ids, int64, slots and lengths of contexts, int32: each [max_num_seqs]."""
        num = self._max_num_seqs
        wide, narrow = memory[: 16 * num].view(torch.int64), memory[16 * num :].view(torch.int32)
        return wide[:num], wide[num:], narrow[:num], narrow[num:]

    def batch(self, size: int, max_context_len: int) -> StepBatch:
        """What a recording for `size` sequences reads."""
        return StepBatch(
            input_ids=self.input_ids[:size].unsqueeze(0),
            position_ids=self._position_ids[:size].unsqueeze(0),
            logit_rows=self.rows[:size],
            attention=AttentionBatch(
                slots=self._slots[:size],
                block_tables=self.block_tables[:size],
                query_starts=self.query_starts[: size + 1],
                context_lens=self._context_lens[:size],
                max_query_len=1,
                max_context_len=max_context_len,
            ),
        )

    def put(self, step: StepBatch, size: int) -> None:
        """Copy a step of decodes, laid out on the host, and pad it to `size` sequences."""
        attention = step.attention
        num_seqs, width = attention.block_tables.shape
        values = (step.input_ids[0], step.position_ids[0], attention.slots, attention.context_lens)
        for column, value, padding in zip(self._columns(self._rows.next()), values, _PADDING, strict=True):
            column[:num_seqs].copy_(value)
            column[num_seqs:size].fill_(padding)
        self._rows.send(self._max_num_seqs * _ROW_BYTES)
        # Of padding nothing but its first block is read: its context is one token.
        tables = self._tables.next()[: 4 * size * width].view(torch.int32).view(size, width)
        tables[:num_seqs].copy_(attention.block_tables)
        tables[num_seqs:].zero_()
        self._tables.send(4 * size * width)
        sent = self._tables.tensor[: 4 * size * width].view(torch.int32)
        self.block_tables[:size, :width].copy_(sent.view(size, width))


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
        self.max_source_tokens = runner.max_source_tokens
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
            in_flight.fill_in(self._static.input_ids, plan)
        self._runner.on_part("forward")
        return self._replays[size]()[:num_seqs]


def _is_recorded(chunk: Chunk) -> bool:
    """Whether a recording computes it: a decode, with the model's own weights."""
    return chunk.num_tokens == 1 and chunk.is_last and chunk.sequence.adapter is None
