"""Several linear layers on one input, computed as one product, without a change to the forward that calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn


class MergedProduct:
    """Several layers' product, computed when the first is called; the others take their parts of it."""

    def __init__(self, multiply: Callable[[torch.Tensor], torch.Tensor], widths: Sequence[int]) -> None:
        """`multiply` gives [..., sum of the widths], in the order in which the layers are called."""
        self.multiply = multiply
        self._widths = list(widths)
        self._input: torch.Tensor | None = None
        self._parts: list[torch.Tensor] = []

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return what layer `index` gives for `x`. Raises RuntimeError when the layers get different inputs."""
        if index == 0:
            self._input = x
            self._parts = list(torch.split(self.multiply(x), self._widths, dim=-1))
        elif x is not self._input:
            raise RuntimeError("merged layers were called with different inputs")
        part = self._parts[index]
        if index == len(self._widths) - 1:
            self._input, self._parts = None, []
        return part


class MergedPart(nn.Module):
    """Stands where one of the merged layers stood. The first one owns the product, where that is a module."""

    def __init__(self, product: MergedProduct, index: int) -> None:
        super().__init__()
        self._product = product
        self._index = index
        if index == 0 and isinstance(product.multiply, nn.Module):
            self.product = product.multiply  # a walk over the model finds its weights, once

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return this layer's part of the product."""
        return self._product.part(self._index, x)
