"""Linear layers in fp8: weights with a scale per output, inputs rounded to 8 bits with a scale per row.

Both are e4m3, and the product is torch's own. torchao makes the same numbers out of a tensor of its own kind, whose
every product goes through Python many times, with eight kernels before each to round its input: more than a GPU takes
for a step. Here one kernel rounds, together with the norm or the activation that stands before the product, and a row
that comes alone, as a decode's does, is multiplied by the kernel that reads weights fastest.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from worker.engine.kernels.triton import rows, vector


class Fp8Linear(nn.Module):
    """Stands where a linear layer in bfloat16 stood."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`codes` are [outputs, inputs] in e4m3, `scales` [outputs] float32, `bias` [outputs] bfloat16."""
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.codes = nn.Buffer(codes)
        self.scales = nn.Buffer(scales)
        self.bias = None if bias is None else nn.Buffer(bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Round a layer's weights to 8 bits."""
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(*rows.quantize_rows(linear.weight.detach()), bias)

    def forward(
        self,
        x: torch.Tensor,
        *,
        norm: vector.Norm | None = None,
        activation: int | None = None,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the product of the rows of `x` [..., inputs], after a norm or an activation as in `quantize_rows`.

        With `into` [..., outputs] it is added to that, in place, and that is returned.
        """
        codes, scales = rows.quantize_rows(x, norm=norm, activation=activation)
        if len(codes) == 1 and vector.fits(self.codes):
            factors = vector.Scales(self.scales, scales)
            if into is not None and self.bias is None:
                return vector.multiply(codes, self.codes, scales=factors, addend=into, in_place=True)
            output = vector.multiply(codes, self.codes, scales=factors, addend=self.bias, dtype=x.dtype)
        else:
            output = torch._scaled_mm(
                codes,
                self.codes.t(),
                scale_a=scales[:, None],
                scale_b=self.scales[None, :],
                bias=self.bias,
                out_dtype=x.dtype,
                use_fast_accum=True,
            )
        output = output.view(*x.shape[:-1], self.out_features)
        return output if into is None else into.add_(output)
