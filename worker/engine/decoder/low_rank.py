"""Adapters as the compiled decoder reads them: factors of each layer's products, in the order of their outputs.

A product computes several of a model's linear layers. Its adapter has one `down` for all of them, one below the other,
and for each 16 outputs the part of `up` that reaches them: of queries, the rows of the queries' own factor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from worker.engine.adapters.files import AdapterWeights, LinearShape, LowRankWeights
from worker.engine.decoder.layout import DecoderLayout
from worker.engine.decoder.packing import COLUMNS, interleave

PRODUCTS: Final = ("qkv", "output", "gate_up", "down")  # kProducts of kernels/low_rank.h


class Place(NamedTuple):
    """Where a linear layer of the model is computed."""

    layer: int
    product: str
    first_output: int  # in the product, before gates and ups take turns
    shape: LinearShape


class LowRank(ctypes.Structure):
    """`LowRank` of kernels/decoder.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("down", "up", "blocks")],
        ("rank", ctypes.c_int64),
    ]


@dataclass(frozen=True, slots=True, eq=False)
class DecoderAdapter:
    """An adapter for one decoder."""

    products: ctypes.Array[LowRank]  # [num_layers * 4]
    num_bytes: int
    _kept: tuple[torch.Tensor, ...]  # what the products point to


def read_places(layout: DecoderLayout, module: nn.Module) -> dict[str, Place]:
    """Return where each linear layer of a model is computed, by its path in the module."""
    names = {id(child): name for name, child in module.named_modules()}
    places: dict[str, Place] = {}
    for index, layer in enumerate(layout.layers):
        for product in PRODUCTS:
            first_output = 0
            for linear in getattr(layer, product).layers:
                shape = LinearShape(linear.in_features, linear.out_features)
                places[names[id(linear)]] = Place(index, product, first_output, shape)
                first_output += linear.out_features
    return places


def pack_adapter(
    weights: AdapterWeights,
    places: Mapping[str, Place],
    num_layers: int,
    outputs: Mapping[str, int],
    factors: Mapping[tuple[int, str], torch.Tensor],
) -> DecoderAdapter:
    """Pack an adapter, whose layers all have a place.

    `outputs` is the number of each product's; `factors` is what inputs of products were divided by.
    """
    parts: dict[tuple[int, str], list[tuple[int, LowRankWeights]]] = {}
    for name, layer in weights.layers.items():
        place = places[name]
        parts.setdefault((place.layer, place.product), []).append((place.first_output, layer))
    products = (LowRank * (num_layers * len(PRODUCTS)))()
    kept: list[torch.Tensor] = []
    for (index, product), found in parts.items():
        down = torch.cat([layer.down for _, layer in found])
        if (index, product) in factors:
            down = down * factors[index, product]
        up, blocks = _pack_up(found, outputs[product], gated=product == "gate_up")
        kept += (down, up, blocks)
        products[index * len(PRODUCTS) + PRODUCTS.index(product)] = LowRank(
            down.data_ptr(), up.data_ptr(), blocks.data_ptr(), len(down)
        )
    return DecoderAdapter(products, sum(tensor.nbytes for tensor in kept), tuple(kept))


def _pack_up(
    parts: Iterable[tuple[int, LowRankWeights]], outputs: int, *, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the parts of `up`, [numbers] float32, and the blocks that say where they stand, [blocks, 3] int64."""
    parts = list(parts)
    rank = sum(layer.up.shape[1] for _, layer in parts)
    dense = torch.zeros(outputs, rank)
    reach = torch.zeros(outputs, rank)  # which numbers of the rank belong to an output, whatever their values
    first = 0
    for first_output, layer in parts:
        size, width = layer.up.shape
        dense[first_output : first_output + size, first : first + width] = layer.up
        reach[first_output : first_output + size, first : first + width] = 1
        first += width
    if gated:
        dense, reach = interleave(dense), interleave(reach)
    dense = functional.pad(dense, (0, 0, 0, -len(dense) % COLUMNS)).view(-1, COLUMNS, rank)
    reached = functional.pad(reach, (0, 0, 0, -len(reach) % COLUMNS)).view(-1, COLUMNS, rank).amax(1)  # [blocks, rank]
    firsts = reached.argmax(1)
    lasts = rank - reached.flip(1).argmax(1)
    counts = torch.where(reached.amax(1) > 0, lasts - firsts, 0)
    blocks = torch.zeros(len(dense), 3, dtype=torch.int64)
    blocks[:, 0], blocks[:, 1] = firsts, counts
    stretches: list[torch.Tensor] = []
    offset = 0
    for start, count in torch.unique(blocks[:, :2], dim=0).tolist():
        if not count:
            continue
        chosen = ((firsts == start) & (counts == count)).nonzero()[:, 0]
        stretch = dense[chosen, :, start : start + count].transpose(1, 2).contiguous()  # [chosen, count, 16]
        blocks[chosen, 2] = offset + torch.arange(len(chosen)) * (count * COLUMNS)
        stretches.append(stretch.flatten())
        offset += stretch.numel()
    return torch.cat(stretches), blocks
