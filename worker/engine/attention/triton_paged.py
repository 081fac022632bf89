"""The attention back-end for CUDA: Triton kernels over a paged cache, safe to capture in a CUDA graph.

A layer costs a store, an attention launch for the sequences with few new rows (decodes) with its merge, and one for
those with many (prefills); a step of one kind skips the other. No launch reads anything back from the device, and how
many programs run follows from the batch's sizes alone: which tiles a step's prompts are made of is found out on the
device, once for all layers, and the programs behind the last tile end at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import torch
import triton

from worker.engine.attention.interface import AttentionBatch, AttentionOptions, LayerCache, LayerShape
from worker.engine.kernels.triton.attention import attend_kernel, merge_kernel, store_kernel, tile_kernel
from worker.engine.kernels.triton.overlap import launch_options

_BLOCK_SIZE: Final = 16
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_MAX_SHARES: Final = 64
_STORE_ELEMENTS: Final = 4096  # of a program of the store kernel, at most
_MERGE_DIMS: Final = 128
_DECODE_ROWS: Final = 16  # what a tensor core's product has at least
# Programs wanted per multiprocessor: two run at a time, and twice as many even out sequences of different lengths.
_PROGRAMS_PER_PROCESSOR: Final = 4
_LOW_LOAD: Final = 1.5  # programs per multiprocessor; with more, contexts are not cut
_HIGH_LOAD: Final = 4.0
_LEAST_TILES: Final = 2  # of a share: with less to do, what it costs to merge it is not worth it
_LONG_PROMPT: Final = 4096  # rows from which few large tiles are faster than many small ones
_KEPT_TILES: Final = 4  # a step's, for each shape of layer
_ASSUMED_PROCESSORS: Final = 4  # where there is no GPU to ask: the interpreter

# Whether kernels are interpreted (TRITON_INTERPRET=1) is settled when they are defined.
IS_INTERPRETED: Final = not isinstance(attend_kernel, triton.runtime.jit.JITFunction)


@dataclass(frozen=True, slots=True)
class Tile:
    """Shape of one program's work, and how the compiler is to lay it out."""

    rows: int  # queries times heads that share a kv head
    tokens: int  # of the context, at a time
    num_warps: int
    num_stages: int  # of the pipeline that loads keys and values


# Page numbers are loaded a stage before the keys that they lead to, so two of the stages buffer no keys.


def decode_tile(shape: LayerShape, num_grouped: int, dtype: torch.dtype, load: float = 2.0) -> Tile:
    """Few rows: bound by how fast keys and values are read, so two tiles in flight, and several programs at a time.

    `load` is how many programs there are for a multiprocessor before contexts are cut: with many, each needs but one
    warp; with few, short tiles make the shares even. Measured on an H200 with Llama's heads.
    """
    widest = triton.next_power_of_2(max(shape.key_dim, shape.value_dim))
    rows = min(64, max(_DECODE_ROWS, triton.next_power_of_2(num_grouped)))
    if dtype.itemsize == 4:
        return Tile(rows, 32 if widest <= 64 else 16, 4, 3)
    if widest <= 128:
        if rows == _DECODE_ROWS and load >= _HIGH_LOAD:
            return Tile(rows, 32, 1, 3)
        return Tile(rows, 32, 4, 3) if load < _LOW_LOAD else Tile(rows, 64, 4, 5)
    return Tile(rows, 32 if widest <= 256 else 16, 4, 3)


def prefill_tile(shape: LayerShape, num_grouped: int, dtype: torch.dtype, max_query_len: int) -> Tile:
    """Many rows: bound by arithmetic. 64 rows and 4 warps are the least for Hopper's wide products (wgmma)."""
    widest = triton.next_power_of_2(max(shape.key_dim, shape.value_dim))
    if dtype.itemsize == 4:
        return Tile(32 if widest <= 64 else 16, 32 if widest <= 64 else 16, 4, 1)
    if widest <= 128:
        return Tile(256, 64, 8, 3) if max_query_len >= _LONG_PROMPT else Tile(64, 64, 4, 2)
    if widest <= 256:
        return Tile(128, 32, 8, 2)
    return Tile(64, 16, 8, 1)


class TritonAttention:
    """Paged attention in Triton for float32, bfloat16 and float16; accumulates in float32.

    float32 is multiplied exactly (IEEE), never as TF32. How a row's sum is cut into shares depends on the batch's size,
    so its last bits may, too.
    """

    name = "triton"
    block_size = _BLOCK_SIZE

    def __init__(self, num_shares: int | None = None) -> None:
        """`num_shares` fixes into how many parts a decode's context is cut (1 to 64); default: by the device's size."""
        if num_shares is not None and not 1 <= num_shares <= _MAX_SHARES:
            raise ValueError(f"num_shares must be 1 to {_MAX_SHARES}, not {num_shares}")
        self._num_shares = num_shares
        self._num_processors: dict[torch.device, int] = {}
        self._tiles: deque[tuple[AttentionBatch, tuple[int, int], torch.Tensor]] = deque(maxlen=_KEPT_TILES)

    def allocate(self, shape: LayerShape, num_blocks: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """Return one layer's cache, zeroed. Raises ValueError for a dtype that the kernels do not know."""
        if dtype not in _DTYPES:
            raise ValueError(f"the Triton attention kernels need float32, bfloat16 or float16, not {dtype}")
        size = (num_blocks, shape.num_kv_heads, _BLOCK_SIZE)
        return LayerCache(
            keys=torch.zeros((*size, shape.key_dim), dtype=dtype, device=device),
            values=torch.zeros((*size, shape.value_dim), dtype=dtype, device=device),
        )

    def attend(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, key_dim], any strides but a contiguous last dimension
        key: torch.Tensor,  # [num_tokens, num_kv_heads, key_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, value_dim]
        cache: LayerCache,
        batch: AttentionBatch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Return [num_tokens, num_heads, value_dim], contiguous, in query's dtype.

        Raises ValueError for tensors that do not fit each other; whether slots and block tables are within the cache is
        not checked, since that would have to wait for the device.
        """
        _check(query, key, value, cache, batch)
        bias = options.distance_bias
        if bias is not None and (bias.dtype != torch.float32 or bias.ndim != 2 or not bias.is_contiguous()):
            raise ValueError(f"the bias by distance is {bias.dtype} {tuple(bias.shape)}, not float32 of each head")
        query, key, value = _rows(query), _rows(key), _rows(value)
        _store(key, value, cache, batch.slots)
        num_tokens, num_heads, key_dim = query.shape
        shape = LayerShape(key.shape[1], key_dim, value.shape[2])
        num_grouped = num_heads // shape.num_kv_heads
        num_seqs = batch.context_lens.shape[0]
        load = num_seqs * shape.num_kv_heads * triton.cdiv(num_grouped, 64) / self._processors(query.device)
        decode = decode_tile(shape, num_grouped, query.dtype, load)
        most_short_queries = max(1, decode.rows // num_grouped)
        # Tokens that only fill a recorded step up get no output. A GPU may go on with what memory held there; numpy,
        # which interprets the kernels without one, warns of some of it.
        allocate = torch.empty if query.is_cuda else torch.zeros
        output = allocate((num_tokens, num_heads, shape.value_dim), dtype=query.dtype, device=query.device)
        sinks = options.sinks
        if sinks is not None:
            sinks = sinks.to(torch.float32).contiguous()
        call = _Call(query, output, shape, cache, batch, options, sinks, most_short_queries)
        if num_seqs > 1 or batch.max_query_len <= most_short_queries:
            call.decode(decode, self._shares(query.device, num_seqs, shape, num_grouped, decode, batch.max_context_len))
        if batch.max_query_len > most_short_queries:
            tile = prefill_tile(shape, num_grouped, query.dtype, batch.max_query_len)
            call.prefill(tile, self._tiles_of(batch, max(1, tile.rows // num_grouped), call.num_skipped))
        return output

    def _tiles_of(self, batch: AttentionBatch, num_queries: int, num_skipped: int) -> torch.Tensor:
        """[num_tiles, 2] int32: tiles of `num_queries`, those of the sequences with more than `num_skipped` rows."""
        key = (num_queries, num_skipped)
        found = next((tiles for other, known, tiles in self._tiles if other is batch and known == key), None)
        if found is not None:
            return found
        num_tokens, num_seqs = batch.slots.shape[0], batch.context_lens.shape[0]
        # A last tile that is not full in each of so many sequences, at most.
        num_tiles = num_tokens // num_queries + min(num_seqs, num_tokens // (num_skipped + 1))
        tiles = torch.empty((num_tiles, 2), dtype=torch.int32, device=batch.slots.device)
        tile_kernel[(num_seqs,)](
            tiles, batch.query_starts, num_tiles, num_skipped, QUERIES=num_queries, **launch_options(tiles.device)
        )
        self._tiles.append((batch, key, tiles))
        return tiles

    def _shares(
        self,
        device: torch.device,
        num_seqs: int,
        shape: LayerShape,
        num_grouped: int,
        tile: Tile,
        max_context_len: int,
    ) -> int:
        """Into how many parts a decode's context is cut: a power of two, so that few kernels are compiled."""
        if self._num_shares is not None:
            return self._num_shares
        num_programs: int = num_seqs * shape.num_kv_heads * triton.cdiv(num_grouped, tile.rows)
        wanted = _PROGRAMS_PER_PROCESSOR * self._processors(device) // num_programs
        if wanted < _PROGRAMS_PER_PROCESSOR / _LOW_LOAD:
            return 1
        useful: int = triton.next_power_of_2(triton.cdiv(max_context_len, _LEAST_TILES * tile.tokens))
        return min(_MAX_SHARES, useful, 1 << (max(wanted, 1).bit_length() - 1))

    def _processors(self, device: torch.device) -> int:
        if device not in self._num_processors:
            self._num_processors[device] = (
                torch.cuda.get_device_properties(device).multi_processor_count
                if device.type == "cuda"
                else _ASSUMED_PROCESSORS
            )
        return self._num_processors[device]


@dataclass(frozen=True, slots=True)
class _Call:
    """What both launches of one layer share."""

    query: torch.Tensor
    output: torch.Tensor
    shape: LayerShape
    cache: LayerCache
    batch: AttentionBatch
    options: AttentionOptions
    sinks: torch.Tensor | None  # [num_heads] float32, contiguous
    most_short_queries: int

    @property
    def num_grouped(self) -> int:
        """Query heads of one kv head."""
        return self.query.shape[1] // self.shape.num_kv_heads

    @property
    def num_skipped(self) -> int:
        """Rows of the longest sequence that `prefill` leaves to `decode`: a sequence alone is left to nobody."""
        return self.most_short_queries if self.batch.context_lens.shape[0] > 1 else 0

    def decode(self, tile: Tile, num_shares: int) -> None:
        """Sequences with at most `most_short_queries` rows."""
        num_seqs = self.batch.context_lens.shape[0]
        if num_shares == 1:
            self._attend(tile, num_seqs, self.output, self.output, num_shares)
            return
        num_tokens, num_heads, value_dim = self.output.shape
        size = (num_tokens, num_heads, num_shares)
        shares = torch.empty((*size, value_dim), dtype=torch.float32, device=self.output.device)
        peaks_and_totals = torch.empty((*size, 2), dtype=torch.float32, device=self.output.device)
        self._attend(tile, num_seqs, shares, peaks_and_totals, num_shares)
        num_queries = min(self.batch.max_query_len, self.most_short_queries)
        block_dims = min(_MERGE_DIMS, triton.next_power_of_2(value_dim))
        merge_kernel[(num_seqs * num_queries, num_heads, triton.cdiv(value_dim, block_dims))](
            self.output,
            shares,
            peaks_and_totals,
            self.batch.query_starts,
            self.output if self.sinks is None else self.sinks,
            num_heads,
            self.most_short_queries,
            HAS_SINKS=self.sinks is not None,
            SHARES=num_shares,
            BLOCK_SHARES=triton.next_power_of_2(num_shares),
            VALUE_DIM=value_dim,
            BLOCK_DIMS=block_dims,
            QUERIES=num_queries,
            **launch_options(self.output.device),
        )

    def prefill(self, tile: Tile, tiles: torch.Tensor) -> None:
        """All other sequences; `tiles` as `TritonAttention` made them."""
        self._attend(tile, len(tiles), self.output, self.output, 1, tiles)

    def _attend(
        self,
        tile: Tile,
        num_programs: int,
        output: torch.Tensor,
        peaks_and_totals: torch.Tensor,
        num_shares: int,
        tiles: torch.Tensor | None = None,
    ) -> None:
        query, keys, values, options, batch = self.query, self.cache.keys, self.cache.values, self.options, self.batch
        num_heads, num_kv_heads = query.shape[1], self.shape.num_kv_heads
        heads = min(self.num_grouped, tile.rows)
        attend_kernel[(num_programs, num_kv_heads * triton.cdiv(self.num_grouped, heads), num_shares)](
            output,
            peaks_and_totals,
            query,
            keys,
            values,
            batch.block_tables,
            batch.query_starts,
            batch.context_lens,
            output if tiles is None else tiles,
            output if self.sinks is None else self.sinks,
            output if options.distance_bias is None else options.distance_bias,
            0 if options.distance_bias is None else options.distance_bias.shape[1],
            query.stride(0),
            query.stride(1),
            keys.stride(0),
            values.stride(0),
            batch.block_tables.stride(0),
            num_heads,
            num_kv_heads,
            self.most_short_queries,
            options.scale,
            options.softcap or 0.0,
            options.sliding_window or 0,
            SHORT=tiles is None,
            SHARES=num_shares,
            HAS_WINDOW=options.sliding_window is not None,
            HAS_SOFTCAP=options.softcap is not None,
            HAS_SINKS=self.sinks is not None,
            HAS_BIAS=options.distance_bias is not None,
            AS_FLOAT32=IS_INTERPRETED and query.dtype == torch.bfloat16,
            KEY_DIM=self.shape.key_dim,
            VALUE_DIM=self.shape.value_dim,
            PAGE=_BLOCK_SIZE,
            HEADS=heads,
            QUERIES=max(1, tile.rows // heads),
            ROWS=tile.rows,
            TOKENS=tile.tokens,
            LEAST_TILES=_LEAST_TILES,
            BLOCK_KEY=max(16, triton.next_power_of_2(self.shape.key_dim)),
            BLOCK_VALUE=max(16, triton.next_power_of_2(self.shape.value_dim)),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **launch_options(query.device),
        )


def _check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, batch: AttentionBatch
) -> None:
    num_tokens, num_heads, key_dim = query.shape
    num_blocks, num_kv_heads = cache.keys.shape[:2]
    if (
        key.shape != (num_tokens, num_kv_heads, key_dim)
        or value.shape != (num_tokens, num_kv_heads, cache.values.shape[3])
        or cache.keys.shape != (num_blocks, num_kv_heads, _BLOCK_SIZE, key_dim)
        or num_heads % num_kv_heads
        or batch.slots.shape[0] != num_tokens
        or batch.query_starts.shape[0] != batch.context_lens.shape[0] + 1
    ):
        raise ValueError(
            f"shapes do not fit: query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}, "
            f"key cache {tuple(cache.keys.shape)}, value cache {tuple(cache.values.shape)}, "
            f"slots {tuple(batch.slots.shape)}, query_starts {tuple(batch.query_starts.shape)}"
        )
    dtype = query.dtype
    if not (key.dtype is value.dtype is cache.keys.dtype is cache.values.dtype is dtype):
        raise ValueError(
            f"dtypes differ: query {dtype}, key {key.dtype}, value {value.dtype}, cache {cache.keys.dtype}"
        )


def _store(key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
    num_tokens, num_kv_heads, key_dim = key.shape
    value_dim = value.shape[2]
    block_key, block_value = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    block_heads = min(triton.next_power_of_2(num_kv_heads), max(1, _STORE_ELEMENTS // max(block_key, block_value)))
    store_kernel[(num_tokens, triton.cdiv(num_kv_heads, block_heads))](
        key,
        value,
        cache.keys,
        cache.values,
        slots,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        num_kv_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        PAGE=_BLOCK_SIZE,
        BLOCK_HEADS=block_heads,
        BLOCK_KEY=block_key,
        BLOCK_VALUE=block_value,
        **launch_options(key.device),
    )


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
