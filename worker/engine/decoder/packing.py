"""Packs the weights of linear layers for the C++ kernels: panels of 32 outputs, inputs grouped into words of 32 bits.

    panels [outputs / 32, inputs / k, 32, k]     k = 1 (float32), 2 (bfloat16)

int8 weights stand in groups of 32 inputs, each with a scale per output, as kernels/grouped.h says. What ruins a model's
output is not so much 8 bits of weights as 8 bits of activations where their magnitudes vary most: queries, keys and
values, the MLP's last layer and the head are computed from 16 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import torch
from torch import nn
from torch.nn import functional

from worker.engine.host_memory import lazy_zeros

PANEL: Final = 32
GROUP: Final = 32  # inputs that share a scale
COLUMNS: Final = 16  # outputs of one vector
_ALIGNMENT: Final = 64
_ROWS_AT_A_TIME: Final = 64 * PANEL


class LinearFormat(IntEnum):
    """`LinearFormat` of kernels/decoder.h."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2  # inputs of 8 bits, in groups too
    INT8_WIDE = 3  # inputs of 16 bits


_PLAIN_DTYPE: Final = {LinearFormat.FLOAT32: torch.float32, LinearFormat.BFLOAT16: torch.bfloat16}


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """Linear layers as the kernels read them. Outputs are padded to whole panels in all but `outputs`."""

    format: LinearFormat
    inputs: int
    outputs: int
    panels: torch.Tensor
    bias: torch.Tensor | None  # [outputs] float32


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
    size = math.prod(_panels_shape(inputs, outputs, linear_format)) * _panels_dtype(linear_format).itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def padded(outputs: int) -> int:
    return -(-outputs // PANEL) * PANEL


def fits(inputs: int, linear_format: LinearFormat) -> bool:
    """Whether rows of so many inputs are whole words; those of int8 are padded."""
    dtype = _PLAIN_DTYPE.get(linear_format)
    return dtype is None or inputs * dtype.itemsize % 4 == 0


def _panels_dtype(linear_format: LinearFormat) -> torch.dtype:
    return _PLAIN_DTYPE.get(linear_format, torch.uint8)


def _panels_shape(inputs: int, outputs: int, linear_format: LinearFormat) -> tuple[int, ...]:
    num_panels, dtype = padded(outputs) // PANEL, _PLAIN_DTYPE.get(linear_format)
    if dtype is None:
        return num_panels, -(-inputs // GROUP), PANEL * (GROUP + torch.bfloat16.itemsize)
    k = 4 // dtype.itemsize
    return num_panels, inputs // k, PANEL, k


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
        weight = interleave(weight)
        bias = None if bias is None else interleave(bias[:, None])[:, 0]
    outputs, inputs = weight.shape
    extra = padded(outputs) - outputs
    panels = arena.empty(_panels_shape(inputs, outputs, linear_format), _panels_dtype(linear_format))
    # In parts: a head in float32 would take several times the memory of the model's packed layers.
    for start in range(0, outputs, _ROWS_AT_A_TIME):
        rows = weight[start : start + _ROWS_AT_A_TIME]
        rows = functional.pad(rows, (0, 0, 0, -len(rows) % PANEL))
        if factors is not None:
            rows = rows.float() * factors
        if linear_format in _PLAIN_DTYPE:
            k = panels.shape[-1]
            part = rows.view(-1, PANEL, inputs // k, k).permute(0, 2, 1, 3)
        else:
            part = _groups(rows.float())
        first = start // PANEL
        panels[first : first + len(part)].copy_(part)
    return PackedLinear(
        format=linear_format,
        inputs=inputs,
        outputs=outputs,
        panels=panels,
        bias=None if bias is None else functional.pad(bias, (0, extra)).contiguous(),
    )


def _groups(rows: torch.Tensor) -> torch.Tensor:
    """Rows [outputs, inputs] of whole panels as kernels/grouped.h reads them: [panels, groups, bytes] uint8."""
    rows = functional.pad(rows, (0, -rows.shape[1] % GROUP)).view(-1, PANEL, -(-rows.shape[1] // GROUP), GROUP)
    scales = _scales(rows)
    steps = (rows / scales[..., None].float()).round() + 128
    weights = steps.to(torch.uint8).view(*scales.shape, GROUP // 4, 4).permute(0, 2, 3, 1, 4).flatten(2)
    # Word i holds the scales of outputs i and i + 16.
    words = scales.view(-1, 2, COLUMNS, scales.shape[2]).permute(0, 3, 2, 1).contiguous()
    return torch.cat([weights, words.view(torch.uint8).flatten(2)], dim=2)


def _scales(rows: torch.Tensor) -> torch.Tensor:
    """Steps [..., groups] bfloat16 of rows [..., groups, GROUP], of which none is more than 127 away from zero."""
    exact = rows.abs().amax(-1) / 127
    scales = exact.bfloat16()
    # Rounded up, where rounding to nearest went down: the next bfloat16 is one more in the bits.
    scales = torch.where(scales.float() < exact, (scales.view(torch.int16) + 1).view(torch.bfloat16), scales)
    return torch.where(exact > 0, scales, torch.ones_like(scales))


def interleave(rows: torch.Tensor) -> torch.Tensor:
    """Rows of gates, then of ups [2 * size, n] as 16 gates, 16 ups, 16 gates and so on, padded with zeros."""
    size, width = rows.shape[0] // 2, rows.shape[1]
    halves = rows.view(2, size, width)
    halves = functional.pad(halves, (0, 0, 0, -size % COLUMNS))
    return halves.view(2, -1, COLUMNS, width).transpose(0, 1).reshape(-1, width)
