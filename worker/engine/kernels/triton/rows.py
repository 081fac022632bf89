"""Rows in 8 bits in Triton: what a product of fp8 takes, made by one kernel out of what stands before it.

A row of values becomes e4m3 (arXiv:2209.05433) with a scale of its own, its largest magnitude over 448. What a decoder
computes between its products, an RMS norm or a gated activation, is part of the kernel: its values are rounded once,
and are never in memory at their full width.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from worker.engine.kernels.triton.layers import multiply_gate
from worker.engine.kernels.triton.overlap import launch_options, start_early
from worker.engine.kernels.triton.vector import Norm

FORMAT: Final = torch.float8_e4m3fn
LARGEST: Final = 448.0  # of the format
_LEAST_SCALE: Final = 1e-12  # of a row of zeros


@triton.jit
def _quantize_kernel(
    output,  # [num_rows, WIDTH]
    scales,  # [num_rows]
    x,  # [num_rows, WIDTH]; with an activation [num_rows, 2 * WIDTH]: gate, then up
    norm_weight,  # [WIDTH]
    row_stride,
    eps,
    offset,
    largest,
    least_scale,
    HAS_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,  # -1 for none
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (num_rows,)."""
    start_early(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    values = tl.load(x + row * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        weights = tl.load(norm_weight + columns, mask=mask, other=0.0).to(tl.float32) + offset
        values *= weights / tl.sqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    if ACTIVATION >= 0:
        up = tl.load(x + row * row_stride + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
        values = multiply_gate(values, up, ACTIVATION)
    scale = tl.maximum(tl.max(tl.abs(values), axis=0) / largest, least_scale)
    tl.store(scales + row, scale)
    tl.store(output + row * WIDTH + columns, (values * (1.0 / scale)).to(output.dtype.element_ty), mask=mask)


def quantize_rows(
    x: torch.Tensor, *, norm: Norm | None = None, activation: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of `x` [..., width] in 8 bits [num_rows, width], and their scales [num_rows] float32.

    With a norm, of norm(x); with an activation of `layers.py` `x` holds gate and up, of activation(gate) * up.
    """
    rows = x.reshape(-1, x.shape[-1])
    num_rows, width = rows.shape[0], rows.shape[1] // (1 if activation is None else 2)
    output = torch.empty((num_rows, width), dtype=FORMAT, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    if num_rows:
        _quantize_kernel[(num_rows,)](
            output,
            scales,
            rows,
            rows if norm is None else norm.weight,
            rows.stride(0),
            0.0 if norm is None else norm.eps,
            0.0 if norm is None else norm.offset,
            LARGEST,
            _LEAST_SCALE,
            HAS_NORM=norm is not None,
            ACTIVATION=-1 if activation is None else activation,
            WIDTH=width,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
            **launch_options(x.device),
        )
    return output, scales
