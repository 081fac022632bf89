"""A matrix times one row in Triton, with what stands before and behind it: the products of a decode that runs alone.

Such a product is bound by how fast its weights are read. cuBLAS reads them nearly as fast, but the norm before it, the
activation or sum behind it and the second kernel of a split product each cost a launch, and memory stands still between
launches. Here each is part of the one kernel: every program norms the row for itself, since the row is short. The first
weights are read while the kernel before still computes that row (`overlap.py`).

All compute in float32 and round once. `engine/fuse_cuda.py` puts this into models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from worker.engine.kernels.triton.layers import multiply_gate
from worker.engine.kernels.triton.overlap import launch_options

_LEAST_DEPTH = 16  # columns read at a time, at least


@triton.jit
def _vector_kernel(
    output,  # [num_outputs]
    weight,  # [num_outputs, DEPTH]; with an activation [2 * num_outputs, DEPTH]: gate, then up
    x,  # [DEPTH]
    addend,  # [num_outputs]; may be `output` itself
    norm_weight,  # [DEPTH]
    weight_scales,  # a factor of each row of the weights
    x_scale,  # [1]
    eps,
    offset,
    num_outputs,
    DEPTH: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    ACTIVATION: tl.constexpr,  # -1 for none
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (num_outputs / BLOCK_OUTPUTS,)."""
    if OVERLAPS:
        gdc_launch_dependents()
    rows = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    columns = tl.arange(0, BLOCK_DEPTH)
    first = weight + rows[:, None].to(tl.int64) * DEPTH + columns[None, :]
    second = first + num_outputs.to(tl.int64) * DEPTH
    # Each weight is read once: it need not stay in the cache. The next ones are on their way while these are used.
    weights = tl.load(first, eviction_policy="evict_first")
    more_weights = weights
    if ACTIVATION >= 0:
        more_weights = tl.load(second, eviction_policy="evict_first")
    if OVERLAPS:
        gdc_wait()
    sums = tl.zeros([BLOCK_OUTPUTS, BLOCK_DEPTH], dtype=tl.float32)
    more_sums = tl.zeros([BLOCK_OUTPUTS, BLOCK_DEPTH], dtype=tl.float32)
    squares = tl.zeros([BLOCK_DEPTH], dtype=tl.float32)
    for start in range(0, DEPTH, BLOCK_DEPTH):
        is_followed = start + BLOCK_DEPTH < DEPTH
        ahead = start + BLOCK_DEPTH
        next_weights = tl.load(first + ahead, mask=is_followed, eviction_policy="evict_first")
        values = tl.load(x + start + columns).to(tl.float32)
        if HAS_NORM:
            squares += values * values
            values *= tl.load(norm_weight + start + columns).to(tl.float32) + offset
        sums += weights.to(tl.float32) * values[None, :]
        weights = next_weights
        if ACTIVATION >= 0:
            next_more_weights = tl.load(second + ahead, mask=is_followed, eviction_policy="evict_first")
            more_sums += more_weights.to(tl.float32) * values[None, :]
            more_weights = next_more_weights
    result = tl.sum(sums, axis=1)
    scale = 1.0
    if HAS_NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / DEPTH + eps)
        result *= scale
    if HAS_SCALES:
        scale = tl.load(x_scale)
        result *= scale * tl.load(weight_scales + rows)
    if ACTIVATION >= 0:
        up = tl.sum(more_sums, axis=1) * scale
        if HAS_SCALES:
            up *= tl.load(weight_scales + num_outputs + rows)
        result = multiply_gate(result, up, ACTIVATION)
    if HAS_ADDEND:
        result += tl.load(addend + rows).to(tl.float32)
    tl.store(output + rows, result.to(output.dtype.element_ty))


@dataclass(frozen=True, slots=True)
class Norm:
    """The RMS norm of a row: `weight` [depth] and what is added to it."""

    weight: torch.Tensor
    eps: float
    offset: float


@dataclass(frozen=True, slots=True)
class Scales:
    """Factors of a product in 8 bits, float32: of each row of the weights [rows], and of the row they meet [1]."""

    weight: torch.Tensor
    x: torch.Tensor


def fits(weight: torch.Tensor) -> bool:
    """Whether the kernel takes these weights [num_outputs, depth]: of 16 bits or 8, contiguous, their depth not odd."""
    return (
        type(weight) in (torch.Tensor, torch.nn.Parameter)
        and weight.dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
        and weight.is_contiguous()
        and _power_of_two_in(weight.shape[1]) >= _LEAST_DEPTH
    )


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    addend: torch.Tensor | None = None,
    norm: Norm | None = None,
    scales: Scales | None = None,
    activation: int | None = None,
    in_place: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return weight @ norm(x) + addend for one row `x` [..., depth], all else in it 1, and weights that `fits`.

    With an activation of `layers.py`, `weight` holds gate and up, and activation(gate) * up is returned. `in_place`
    gives the sum to `addend` itself, and returns that; else the result is of `dtype`, by default the row's. `scales`
    multiply what a row and weights in 8 bits give, and go with no norm.
    """
    assert scales is None or norm is None
    depth = x.shape[-1]
    num_outputs = weight.shape[0] // (1 if activation is None else 2)
    if in_place:
        assert addend is not None
        output = addend
    else:
        output = torch.empty((*x.shape[:-1], num_outputs), dtype=dtype or x.dtype, device=x.device)
    block_outputs, block_depth, num_warps = _tile(
        num_outputs, depth, weight.element_size(), is_gated=activation is not None
    )
    _vector_kernel[(num_outputs // block_outputs,)](
        output,
        weight,
        x,
        output if addend is None else addend,
        x if norm is None else norm.weight,
        x if scales is None else scales.weight,
        x if scales is None else scales.x,
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.offset,
        num_outputs,
        DEPTH=depth,
        HAS_ADDEND=addend is not None,
        HAS_NORM=norm is not None,
        HAS_SCALES=scales is not None,
        ACTIVATION=-1 if activation is None else activation,
        BLOCK_OUTPUTS=block_outputs,
        BLOCK_DEPTH=block_depth,
        num_warps=num_warps,
        **launch_options(x.device),
    )
    return output


def _tile(num_outputs: int, depth: int, itemsize: int, *, is_gated: bool) -> tuple[int, int, int]:
    """Outputs and depth of a program's tile, and its warps: the best of those tried on an H200 with Llama's shapes."""
    if itemsize == 1:
        outputs, columns, num_warps = (16, 512, 8) if depth > 8192 else (2, 4096, 4)
    elif is_gated:
        outputs, columns, num_warps = 2, 4096, 8
    elif num_outputs <= 4096 and depth <= 8192:
        outputs, columns, num_warps = 4, 2048, 8
    elif num_outputs >= 32768:
        outputs, columns, num_warps = 4, 1024, 4
    else:
        outputs, columns, num_warps = 8, 512, 8 if depth > 8192 else 2
    block_depth = min(columns, _power_of_two_in(depth))
    return min(outputs, _power_of_two_in(num_outputs)), block_depth, num_warps


def _power_of_two_in(number: int) -> int:
    """The largest power of two that divides it."""
    return number & -number
