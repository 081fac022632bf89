"""Adapters on transformers' modules: linear layers' outputs get, in the rows that have an adapter, what it adds.

Layers that were merged for speed keep their places, or tell their parts (`parts`), so an adapter finds each by the path
that it had in the model as it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from worker.engine.adapters.files import AdapterWeights, LinearShape, LowRankWeights
from worker.engine.attention import hf
from worker.engine.attention.interface import AttentionOptions
from worker.engine.batch import AdapterRows

_PROBE_TOKENS = 5


@dataclass(frozen=True, slots=True, eq=False)
class ModuleAdapter:
    """An adapter on the model's device, by the paths of its layers."""

    layers: Mapping[str, LowRankWeights]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Site:
    """Where a layer's outputs appear: in columns of this module's output."""

    module: nn.Module
    first_column: int
    shape: LinearShape


class AdaptedModule:
    """A model whose linear layers take adapters: those of `rows`, which is set for the time of a step."""

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, LinearShape]) -> None:
        """`shapes` are the model's linear layers as it came. The model's attention must be ours already.

        Those that do not see every token of a step, exactly once, such as experts, take no adapters.
        """
        self.rows: AdapterRows | None = None
        self._device = model.device
        self._indices: list[torch.Tensor] = []  # of `rows`: by adapter, its rows
        sites = {name: site for name, shape in shapes.items() if (site := _site(model, name, shape)) is not None}
        seen = _calls(model, {id(site.module): site.module for site in sites.values()})
        self.adaptable = {
            name: site.shape
            for name, site in sites.items()
            if seen.get(id(site.module)) == [(_PROBE_TOKENS, site.shape.inputs)]
        }
        for name in self.adaptable:
            sites[name].module.register_forward_hook(partial(self._add, name, sites[name]))

    def adapter_form(self, weights: AdapterWeights) -> ModuleAdapter:
        """Return an adapter of this model as steps read it."""
        layers = {
            name: LowRankWeights(layer.down.to(self._device), layer.up.to(self._device))
            for name, layer in weights.layers.items()
        }
        return ModuleAdapter(layers, weights.num_bytes)

    def begin(self, rows: AdapterRows | None) -> None:
        """Set what the next step's rows have; None for nothing."""
        self.rows = rows
        if rows is not None:
            self._indices = [
                (rows.of_rows == index).nonzero()[:, 0].to(self._device) for index in range(len(rows.forms))
            ]

    def _add(self, name: str, site: _Site, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if self.rows is None:
            return
        inputs, outputs = site.shape
        x = args[0].reshape(-1, inputs)
        y = output.view(-1, output.shape[-1])[:, site.first_column : site.first_column + outputs]
        for form, rows in zip(self.rows.forms, self._indices, strict=True):
            layer = form.layers.get(name)
            if layer is not None:
                added = nn.functional.linear(nn.functional.linear(x[rows].float(), layer.down), layer.up)
                y.index_add_(0, rows, added.to(y.dtype))


def _site(model: nn.Module, name: str, shape: LinearShape) -> _Site | None:
    """Find a layer by its path in the model as it came; None where it is part of something else now."""
    parent_name, _, child = name.rpartition(".")
    try:
        parent: Any = model.get_submodule(parent_name)
    except AttributeError:
        return None
    parts: Mapping[str, tuple[nn.Module, int]] = getattr(parent, "parts", {})
    if child in parts:
        return _Site(*parts[child], shape)
    module = getattr(parent, child, None)
    return _Site(module, 0, shape) if isinstance(module, nn.Module) else None


def _calls(model: PreTrainedModel, modules: Mapping[int, nn.Module]) -> dict[int, list[tuple[int, int]]]:
    """Run some tokens; return, by module id, number and width of the rows of each call that gave one output."""
    calls: dict[int, list[tuple[int, int]]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        rows = (0, 0)
        if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
            rows = args[0].shape[:-1].numel(), args[0].shape[-1]
        calls.setdefault(id(module), []).append(rows)

    def attend(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])

    hooks = [module.register_forward_hook(record) for module in modules.values()]
    tokens = torch.arange(_PROBE_TOKENS, device=model.device)[None]
    try:
        with torch.inference_mode(), hf.attention(attend):
            model(input_ids=tokens, position_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
