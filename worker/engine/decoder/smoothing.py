"""Evens out activations before they are rounded to 8 bits: SmoothQuant (arXiv:2211.10438), with a strength of one half.

A few inputs of a layer are tens of times larger than the rest and would take all the steps of their group's 8 bits; or,
where the inputs have 16, their small weights would get too few.
Dividing each input by a factor and multiplying its weights with it changes nothing but the rounding. Inputs that come
from a norm are divided in the norm's weights, so it costs nothing. The magnitudes are those of the random tokens with
which a model is checked: which inputs are large hardly depends on the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import torch
from torch import nn

from worker.engine.decoder.layout import DecoderLayout, LinearLayout

Magnitudes: TypeAlias = dict[
    nn.Linear, torch.Tensor
]  # by first layer of a product: largest input seen, [inputs] float32

_SMALLEST_INPUT: Final = 1e-4
_SMALLEST_WEIGHT: Final = 1e-5


@contextmanager
def observed_magnitudes(layout: DecoderLayout) -> Iterator[Magnitudes]:
    """Fill the magnitudes of what norms feed into layers while the model runs."""
    magnitudes: Magnitudes = {}

    def observe(linear: nn.Linear, args: tuple[Any, ...]) -> None:
        largest = args[0].float().abs().flatten(0, -2).amax(0)
        magnitudes[linear] = torch.maximum(largest, magnitudes.get(linear, largest))

    observed = [
        product.layers[0]
        for layer in layout.layers
        for product, norm in ((layer.qkv, layer.attention_norm), (layer.gate_up, layer.mlp_norm))
        if norm is not None
    ]
    hooks = [linear.register_forward_pre_hook(observe) for linear in observed]
    try:
        yield magnitudes
    finally:
        for hook in hooks:
            hook.remove()


def input_factors(product: LinearLayout, magnitudes: Magnitudes) -> torch.Tensor | None:
    """Return what to divide each input by and to multiply its weights with, [inputs] float32; None: not observed."""
    largest = magnitudes.get(product.layers[0])
    if largest is None:
        return None
    weights = torch.stack([layer.weight.detach().float().abs().amax(0) for layer in product.layers]).amax(0)
    return (largest.clamp(min=_SMALLEST_INPUT) / weights.clamp(min=_SMALLEST_WEIGHT)).sqrt()
