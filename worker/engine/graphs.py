"""Steps by replay: all launches of a step are recorded once per size of step and repeated with one call.

Python and dispatch cost a forward pass of transformers' classes and Triton's launches about 0.8 ms a layer, more than a
GPU computes but at the largest steps. A step is therefore padded to the next recorded size, copied into the tensors
that the recording reads, and replayed: one of nothing but decodes by their number, any other by its tokens and
sequences. The largest prefills, which hide what their launches cost, and steps with adapters run as usual.

Sequences of padding own no rows and have no context. Rows of padding are no sequence's: they compute token 0, write to
the scratch block, which nobody reads, and what comes out of them nobody reads either.

How a step is recorded is behind `Recorder`, so that everything else runs, and is tested, without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, NamedTuple

import structlog
import torch

from worker.engine.attention.interface import AttentionBatch
from worker.engine.batch import BatchBuffers, StepBatch, TokensInFlight
from worker.engine.runner import ModelRunner
from worker.engine.scheduler import BlockCopy, Chunk, Plan

_log = structlog.get_logger(__name__)

_FEW_SEQS: Final = 32  # mixed steps are recorded for so many sequences, and for the most there can be
_TOKEN_BYTES: Final = 20  # input id, position, slot
_SEQ_BYTES: Final = 16  # row of its logits, length of its context, first row
_LAST_START_BYTES: Final = 4

Step = Callable[[], torch.Tensor]
# Runs a step and returns what repeats it: the same launches on the same memory, with whatever that holds by then.
Recorder = Callable[[Step], Step]


def batch_sizes(most: int) -> tuple[int, ...]:
    """Return the batch sizes to record for at most `most` sequences, ascending; close where padding costs most.

    1, 2, 4, then steps of 8 up to 32, of 16 up to 64, of 32 behind that; `most` itself is among them.
    """
    sizes = [1, 2, 4, *range(8, 32, 8), *range(32, 64, 16), *range(64, most + 32, 32)]
    return (*(size for size in sizes if size < most), most)


def token_numbers(most: int) -> tuple[int, ...]:
    """Return the numbers of tokens of mixed steps to record, ascending, for at most `most`.

    Multiples of 16, and behind 64 four in each doubling: padding is then a fifth of a step at most.
    """
    numbers = [16, 32, 48]
    while numbers[-1] < most:
        step = max(16, (1 << numbers[-1].bit_length() - 1) // 4)
        numbers.append((numbers[-1] // step + 1) * step)
    return (*(number for number in numbers if number < most), most)


class Size(NamedTuple):
    """Of a recorded step."""

    num_tokens: int
    num_seqs: int  # and rows of logits
    max_query_len: int  # 1: all are decodes


def mixed_sizes(max_num_tokens: int, max_num_seqs: int) -> list[Size]:
    """Return the sizes of mixed steps to record, ascending."""
    numbers_of_seqs = sorted({min(_FEW_SEQS, max_num_seqs), max_num_seqs})
    return [
        Size(num_tokens, num_seqs, num_tokens)
        for num_tokens in token_numbers(max_num_tokens)
        for fewer, num_seqs in zip([0, *numbers_of_seqs], numbers_of_seqs, strict=False)
        if num_tokens > fewer  # else there cannot be so many
    ]


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


class _Columns(NamedTuple):
    """What a step consists of, one behind another in memory: those of 8 bytes first, so that all are aligned."""

    input_ids: torch.Tensor  # [max_num_tokens] int64
    position_ids: torch.Tensor  # [max_num_tokens] int64
    logit_rows: torch.Tensor  # [max_num_seqs] int64
    slots: torch.Tensor  # [max_num_tokens] int32
    context_lens: torch.Tensor  # [max_num_seqs] int32
    query_starts: torch.Tensor  # [max_num_seqs + 1] int32


class _Static:
    """The step that recordings read, at its largest; a smaller one is the beginning of each of its tensors."""

    def __init__(self, max_num_tokens: int, max_num_seqs: int, max_num_blocks: int, device: torch.device) -> None:
        self._max_num_tokens, self._max_num_seqs = max_num_tokens, max_num_seqs
        self._num_bytes = max_num_tokens * _TOKEN_BYTES + max_num_seqs * _SEQ_BYTES + _LAST_START_BYTES
        self._staged = _Staged(-(-self._num_bytes // 8) * 8, device)  # all in one copy: each costs more than its bytes
        self._tables = _Staged(max_num_seqs * max_num_blocks * 4, device)  # of a step, as narrow as it is
        self._device_columns = self._columns(self._staged.tensor)
        self.block_tables = torch.zeros((max_num_seqs, max_num_blocks), dtype=torch.int32, device=device)

    @property
    def input_ids(self) -> torch.Tensor:
        """[max_num_tokens] on the device."""
        return self._device_columns.input_ids

    def _columns(self, memory: torch.Tensor) -> _Columns:
        num_tokens, num_seqs = self._max_num_tokens, self._max_num_seqs
        num_wide = 2 * num_tokens + num_seqs
        wide, narrow = memory[: 8 * num_wide].view(torch.int64), memory[8 * num_wide :].view(torch.int32)
        return _Columns(
            *torch.split(wide, [num_tokens, num_tokens, num_seqs]),
            *torch.split(narrow[: num_tokens + 2 * num_seqs + 1], [num_tokens, num_seqs, num_seqs + 1]),
        )

    def batch(self, size: Size, max_context_len: int) -> StepBatch:
        """What a recording of this size reads."""
        columns = self._device_columns
        return StepBatch(
            input_ids=columns.input_ids[: size.num_tokens].unsqueeze(0),
            position_ids=columns.position_ids[: size.num_tokens].unsqueeze(0),
            logit_rows=columns.logit_rows[: size.num_seqs],
            attention=AttentionBatch(
                slots=columns.slots[: size.num_tokens],
                block_tables=self.block_tables[: size.num_seqs],
                query_starts=columns.query_starts[: size.num_seqs + 1],
                context_lens=columns.context_lens[: size.num_seqs],
                max_query_len=size.max_query_len,
                max_context_len=max_context_len,
            ),
        )

    def put(self, step: StepBatch, size: Size) -> None:
        """Copy a step, laid out on the host, and pad it to `size`."""
        attention = step.attention
        num_seqs, width = attention.block_tables.shape
        num_rows = step.input_ids.shape[1]
        columns = self._columns(self._staged.next())
        for column, value, padding, end in (
            (columns.input_ids, step.input_ids[0], 0, size.num_tokens),
            (columns.position_ids, step.position_ids[0], 0, size.num_tokens),
            (columns.logit_rows, step.logit_rows, 0, size.num_seqs),
            (columns.slots, attention.slots, 0, size.num_tokens),
            (columns.context_lens, attention.context_lens, 0, size.num_seqs),
            (columns.query_starts, attention.query_starts, num_rows, size.num_seqs + 1),
        ):
            column[: len(value)].copy_(value)
            column[len(value) : end].fill_(padding)
        self._staged.send(self._num_bytes)
        tables = self._tables.next()[: 4 * num_seqs * width].view(torch.int32).view(num_seqs, width)
        tables.copy_(attention.block_tables)
        self._tables.send(4 * num_seqs * width)
        sent = self._tables.tensor[: 4 * num_seqs * width].view(torch.int32)
        self.block_tables[:num_seqs, :width].copy_(sent.view(num_seqs, width))


class GraphRunner:
    """A model runner whose steps are replayed. Takes the place of the runner that it is made from."""

    def __init__(
        self, runner: ModelRunner, record: Recorder, max_num_seqs: int, block_size: int, max_num_tokens: int = 0
    ) -> None:
        """Record every size, the largest first: of decodes, and of mixed steps of at most `max_num_tokens`.

        Where the model cannot be recorded, steps run as usual. Logits of a replayed step are valid until the next step.
        """
        self._runner = runner
        self.device = runner.device
        self.num_blocks = runner.num_blocks
        self.max_model_len = runner.max_model_len
        self.max_source_tokens = runner.max_source_tokens
        self.vocab_size = runner.vocab_size
        max_num_blocks = -(-runner.max_model_len // block_size)
        most_tokens = max(max_num_tokens, max_num_seqs)
        self._static = _Static(most_tokens, max_num_seqs, max_num_blocks, runner.device)
        self._host = BatchBuffers(
            max_num_tokens=most_tokens,
            max_num_seqs=max_num_seqs,
            max_num_blocks=max_num_blocks,
            block_size=block_size,
            device=torch.device("cpu"),
        )
        started = time.monotonic()
        mixed = mixed_sizes(max_num_tokens, max_num_seqs) if max_num_tokens else []
        self._mixed = self._record_all(record, mixed)
        self._decodes = self._record_all(record, [Size(size, size, 1) for size in batch_sizes(max_num_seqs)])
        _log.info(
            "graphs.recorded",
            batch_sizes=[size.num_seqs for size in self._decodes],
            step_tokens=sorted({size.num_tokens for size in self._mixed}),
            seconds=round(time.monotonic() - started, 1),
        )

    def _record_all(self, record: Recorder, sizes: list[Size]) -> dict[Size, Step]:
        """Return the recordings, in ascending order of their sizes, as these are."""
        replays: dict[Size, Step] = {}
        for size in reversed(sizes):
            try:
                with torch.inference_mode():
                    replays[size] = record(partial(self._step, size))
            except Exception as error:  # noqa: BLE001 - a model that waits for the device may fail in any way
                _log.warning(
                    "graphs.unavailable", size=size._asdict(), reason=str(error), effect="steps run one by one"
                )
                break
        return dict(reversed(replays.items()))

    def _step(self, size: Size) -> torch.Tensor:
        # A new batch each time: back-ends that prepare a batch do so once per object.
        return self._runner.forward(self._static.batch(size, self.max_model_len))

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """As the runner's: on the stream on which steps are replayed. Raises StepOutOfMemory."""
        self._runner.copy_blocks(copies)

    def execute(self, plan: Plan, in_flight: TokensInFlight | None = None) -> torch.Tensor:
        """Compute the plan and return the logits of its rows that give a token. Raises StepOutOfMemory."""
        recorded, num_logit_rows = self._decodes, len(plan.chunks)
        if not all(map(_is_decode, plan.chunks)):
            recorded, num_logit_rows = self._mixed, sum(chunk.num_logit_rows for chunk in plan.chunks)
        size = next((size for size in recorded if _fits(plan, num_logit_rows, size)), None)
        if size is None or any(chunk.sequence.adapter is not None for chunk in plan.chunks):
            return self._runner.execute(plan, in_flight)
        self._runner.on_part("batch")
        self._static.put(self._host.fill(plan), size)
        if in_flight is not None:
            in_flight.fill_in(self._static.input_ids, plan)
        self._runner.on_part("forward")
        return recorded[size]()[:num_logit_rows]


def _is_decode(chunk: Chunk) -> bool:
    return chunk.num_tokens == 1 and chunk.is_last and not chunk.num_scored_rows


def _fits(plan: Plan, num_logit_rows: int, size: Size) -> bool:
    return plan.num_tokens <= size.num_tokens and max(len(plan.chunks), num_logit_rows) <= size.num_seqs
