"""Packs the weights of linear layers for the C++ kernels: panels of 32 outputs, inputs grouped into words of 32 bits.

    panels [outputs / 32, inputs / k, 32, k]     k = 1 (float32), 2 (bfloat16), 4 (int8)

int8 weights have one scale per output, its largest magnitude over 127. What ruins a model's output is not 8 bits of
weights but 8 bits of activations where their magnitudes vary most: the MLP's last layer and the head take 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import torch
from torch import nn
from torch.nn import functional

from worker.engine.host_memory import lazy_zeros

PANEL: Final = 32
COLUMNS: Final = 16  # outputs of one vector
_ALIGNMENT: Final = 64
_ROWS_AT_A_TIME: Final = 64 * PANEL


class LinearFormat(IntEnum):
    """`LinearFormat` of kernels/decoder.h."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2  # inputs of 8 bits
    INT8_WIDE = 3  # inputs of 16 bits


_WEIGHT_DTYPE: Final = {
    LinearFormat.FLOAT32: torch.float32,
    LinearFormat.BFLOAT16: torch.bfloat16,
    LinearFormat.INT8: torch.int8,
    LinearFormat.INT8_WIDE: torch.int8,
}


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """Linear layers as the kernels read them. Outputs are padded to whole panels in all but `outputs`."""

    format: LinearFormat
    inputs: int
    outputs: int
    panels: torch.Tensor
    bias: torch.Tensor | None  # [outputs] float32
    scales: torch.Tensor | None  # [outputs] float32; int8 only
    column_sums: torch.Tensor | None  # [outputs] int32; int8 only

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.panels, self.bias, self.scales, self.column_sums) if t is not None]


class Arena:
    """One stretch of memory for all weights, which is streamed at every step."""

    def __init__(self, num_bytes: int) -> None:
        self._bytes = lazy_zeros((max(num_bytes, 1),), torch.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in the arena, to be filled. Raises MemoryError when it does not fit."""
        size = dtype.itemsize
        for length in shape:
            size *= length
        start = self._used
        self._used = start + -(-size // _ALIGNMENT) * _ALIGNMENT
        if self._used > len(self._bytes):
            raise MemoryError("the arena is smaller than what was to go into it")
        return self._bytes[start : start + size].view(dtype).view(shape)


def packed_bytes(inputs: int, outputs: int, linear_format: LinearFormat) -> int:
    """Room that the panels of a layer take in an arena."""
    size = padded(outputs) * inputs * _WEIGHT_DTYPE[linear_format].itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def padded(outputs: int) -> int:
    return -(-outputs // PANEL) * PANEL


def fits(inputs: int, linear_format: LinearFormat) -> bool:
    """Whether rows of so many inputs are whole words."""
    return inputs * _WEIGHT_DTYPE[linear_format].itemsize % 4 == 0


def pack(
    layers: tuple[nn.Linear, ...],
    linear_format: LinearFormat,
    arena: Arena,
    *,
    gated: bool = False,
    factors: torch.Tensor | None = None,
) -> PackedLinear:
    """Pack layers on one input into the arena.

    `gated`: gates and ups take turns, 16 outputs each. `factors` [inputs] multiply the weights of each input.
    """
    weights = [layer.weight.detach() for layer in layers]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = None
    if layers[0].bias is not None:
        bias = torch.cat([layer.bias.detach() for layer in layers]).float()
    if gated:
        weight = _interleave(weight)
        bias = None if bias is None else _interleave(bias[:, None])[:, 0]
    outputs, inputs = weight.shape
    extra = padded(outputs) - outputs
    dtype = _WEIGHT_DTYPE[linear_format]
    k = 4 // dtype.itemsize
    panels = arena.empty((padded(outputs) // PANEL, inputs // k, PANEL, k), dtype)
    scales, sums = [], []
    # In parts: a head in float32 would take several times the memory of the model's packed layers.
    for start in range(0, outputs, _ROWS_AT_A_TIME):
        rows = weight[start : start + _ROWS_AT_A_TIME]
        rows = functional.pad(rows, (0, 0, 0, -len(rows) % PANEL))
        if factors is not None:
            rows = rows.float() * factors
        if dtype == torch.int8:
            rows, rows_scales = _quantize(rows.float())
            scales.append(rows_scales)
            sums.append(rows.sum(1).to(torch.int32))
        first = start // PANEL
        part = rows.view(-1, PANEL, inputs // k, k).permute(0, 2, 1, 3)
        panels[first : first + len(part)].copy_(part)
    return PackedLinear(
        format=linear_format,
        inputs=inputs,
        outputs=outputs,
        panels=panels,
        bias=None if bias is None else functional.pad(bias, (0, extra)).contiguous(),
        scales=torch.cat(scales) if scales else None,
        column_sums=torch.cat(sums) if sums else None,
    )


def _quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in whole steps of their own scales, from -127 to 127, and the scales."""
    largest = rows.abs().amax(1)
    scales = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return (rows / scales[:, None]).round(), scales


def _interleave(rows: torch.Tensor) -> torch.Tensor:
    """Rows of gates, then of ups [2 * size, n] as 16 gates, 16 ups, 16 gates and so on, padded with zeros."""
    size, width = rows.shape[0] // 2, rows.shape[1]
    halves = rows.view(2, size, width)
    halves = functional.pad(halves, (0, 0, 0, -size % COLUMNS))
    return halves.view(2, -1, COLUMNS, width).transpose(0, 1).reshape(-1, width)
