"""The attention back-end for CPUs: a C++ kernel over a paged cache, called through a plain C interface."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

import torch

from worker.engine.attention.interface import AttentionBatch, AttentionOptions, LayerCache, LayerShape
from worker.engine.host_memory import lazy_zeros
from worker.engine.kernels.library import Kernels

_BLOCK_SIZE: Final = 16
_ELEMENT_TYPES: Final = {torch.float32: 0, torch.bfloat16: 1}
_FAILURES: Final = {
    1: "a slot or a block table names a block that the cache does not have",
    2: "the batch contradicts itself: query_starts, context_lens, block table width or head counts",
    3: "out of memory",
}


# `PagedAttentionArguments` of kernels/paged_attention.h: 12 pointers, 17 strides and counts, scale and softcap, element
# type and thread count. Packed bytes: filling a ctypes structure would cost a call 1.5 microseconds more.
_ARGUMENTS: Final = struct.Struct("@12P17q2f2i")


class CpuAttention:
    """Paged attention in C++ (fp32 and bf16; accumulates in fp32).

    A row's output is the same to the bit whatever else is in the batch, however its prefill is cut into chunks, and on
    any number of threads. Inside a block keys are transposed, so that one vector holds a dimension of 16 (8, 4) tokens:

        keys    [num_blocks, num_kv_heads, key_dim, 16]
        values  [num_blocks, num_kv_heads, 16, value_dim]

    With AVX512_BF16, whose instruction multiplies pairs, bfloat16 lies in pairs of dimensions and of tokens, in as much
    room: keys [.., key_dim / 2, 16, 2], values [.., 8, value_dim, 2]. An odd key_dim is padded in bfloat16.
    """

    name = "cpu_ext"
    block_size = _BLOCK_SIZE

    def __init__(self, level: str | None = None, cache_root: Path | None = None) -> None:
        """Load the kernels for an instruction set (default: the best of this CPU), compiling them if need be.

        Raises KernelBuildError when there is no working compiler.
        """
        self.kernels = Kernels(level, cache_root)

    def allocate(self, shape: LayerShape, num_blocks: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """Return one layer's cache, zeroed. Raises ValueError for a dtype or device that the kernel does not know."""
        if dtype not in _ELEMENT_TYPES or device.type != "cpu":
            raise ValueError(f"the CPU attention kernel needs float32 or bfloat16 on cpu, not {dtype} on {device}")
        heads = shape.num_kv_heads
        return LayerCache(
            keys=lazy_zeros((num_blocks, heads, _padded(shape.key_dim, dtype), _BLOCK_SIZE), dtype),
            values=lazy_zeros((num_blocks, heads, _BLOCK_SIZE, shape.value_dim), dtype),
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

        Raises ValueError for tensors that do not fit each other, before the cache is touched.
        """
        keys, values = cache.keys, cache.values
        num_tokens, num_heads, key_dim = query.shape
        num_blocks, num_kv_heads, value_dim = values.shape[0], values.shape[1], values.shape[3]
        dtype = query.dtype
        if (
            key.shape != (num_tokens, num_kv_heads, key_dim)
            or value.shape != (num_tokens, num_kv_heads, value_dim)
            or keys.shape != (num_blocks, num_kv_heads, _padded(key_dim, keys.dtype), _BLOCK_SIZE)
            or batch.slots.shape[0] != num_tokens
        ):
            raise ValueError(
                f"shapes do not fit: query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}, "
                f"key cache {tuple(keys.shape)}, value cache {tuple(values.shape)}, slots {tuple(batch.slots.shape)}"
            )
        if not (key.dtype is value.dtype is keys.dtype is values.dtype is dtype):
            raise ValueError(f"dtypes differ: query {dtype}, key {key.dtype}, value {value.dtype}, cache {keys.dtype}")
        query, key, value = _rows(query), _rows(key), _rows(value)
        sinks = options.sinks
        if sinks is not None:
            sinks = sinks.to(torch.float32).contiguous()
        bias, num_distances = options.distance_bias, 0
        if bias is not None:
            num_distances = bias.shape[-1]
            if bias.shape != (num_heads, num_distances) or bias.dtype != torch.float32 or not bias.is_contiguous():
                raise ValueError(f"the bias by distance is {bias.dtype} {tuple(bias.shape)}, not float32 of each head")
        output = torch.empty((num_tokens, num_heads, value_dim), dtype=dtype)
        tables = batch.block_tables
        num_seqs, width = tables.shape
        query_strides, key_strides, value_strides = query.stride(), key.stride(), value.stride()
        arguments = _ARGUMENTS.pack(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            output.data_ptr(),
            batch.slots.data_ptr(),
            tables.data_ptr(),
            batch.query_starts.data_ptr(),
            batch.context_lens.data_ptr(),
            0 if sinks is None else sinks.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            query_strides[0],
            query_strides[1],
            key_strides[0],
            key_strides[1],
            value_strides[0],
            value_strides[1],
            tables.stride(0) if num_seqs > 1 else width,
            width,
            num_tokens,
            num_seqs,
            num_blocks,
            num_heads,
            num_kv_heads,
            key_dim,
            value_dim,
            options.sliding_window or 0,
            num_distances,
            options.scale,
            options.softcap or 0.0,
            _ELEMENT_TYPES[dtype],
            torch.get_num_threads(),
        )
        status = self.kernels.paged_attention(arguments)
        if status:
            raise ValueError(f"paged attention refused its arguments: {_FAILURES.get(status, status)}")
        return output


def _padded(key_dim: int, dtype: torch.dtype) -> int:
    return key_dim + key_dim % 2 if dtype == torch.bfloat16 else key_dim


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
