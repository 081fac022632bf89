"""The largest score of each row in Triton: two launches, where torch needs five and an eighth of the device.

Of equal scores the first one wins, whatever the device does first: so that a greedy output is the same each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker.engine.kernels.triton.overlap import launch_options, start_early

_BLOCK = 4096  # scores of a program


@triton.jit
def _part_kernel(
    best,  # [num_rows, num_parts] float32
    places,  # [num_rows, num_parts] int32
    scores,  # [num_rows, width], any stride of rows
    row_stride,
    width,
    num_parts,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (num_rows, num_parts)."""
    start_early(OVERLAPS)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(scores + row * row_stride + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
    values = tl.where(values == values, values, float("inf"))  # a NaN is no less invalid than an infinity
    value, place = tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + row * num_parts + part, value)
    tl.store(places + row * num_parts + part, part * BLOCK + place)


@triton.jit
def _join_kernel(
    output,  # [num_rows] int64
    best,
    places,
    num_parts,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (num_rows,)."""
    start_early(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, BLOCK)
    values = tl.load(best + row * num_parts + parts, mask=parts < num_parts, other=float("-inf"))
    value, part = tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)
    place = tl.load(places + row * num_parts + part).to(tl.int64)
    is_finite = (value > float("-inf")) & (value < float("inf"))
    tl.store(output + row, tl.where(is_finite, place, -1 - place))


def argmax(scores: torch.Tensor) -> torch.Tensor:
    """Return [num_rows] int64 for `scores` [num_rows, width] of any float type: the place of each row's largest score.

    Or ~place where that is not finite, or a NaN is among the row; the place means nothing then.
    """
    num_rows, width = scores.shape
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    output = torch.empty(num_rows, dtype=torch.int64, device=scores.device)
    if not num_rows:
        return output
    num_parts = triton.cdiv(width, _BLOCK)
    best = torch.empty((num_rows, num_parts), dtype=torch.float32, device=scores.device)
    places = torch.empty((num_rows, num_parts), dtype=torch.int32, device=scores.device)
    options = launch_options(scores.device)
    _part_kernel[(num_rows, num_parts)](
        best, places, scores, scores.stride(0), width, num_parts, BLOCK=_BLOCK, **options
    )
    _join_kernel[(num_rows,)](output, best, places, num_parts, BLOCK=triton.next_power_of_2(num_parts), **options)
    return output
