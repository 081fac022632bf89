"""The bridge between transformers' model classes and a paged attention back-end.

transformers calls one function per layer, chosen by name. Ours hands the layer's query, key and value to whatever
`Attend` is current. It is current per thread and not passed as an argument, because not every family forwards keyword
arguments to its attention function; two engines in one process run on two threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from transformers import AttentionInterface, PreTrainedModel

from worker.engine.attention import call_sites
from worker.engine.attention.interface import AttentionBackend, AttentionBatch, AttentionOptions, LayerCache, LayerShape

ATTENTION_NAME: Final = "torchrelay"


class UnsupportedModel(Exception):
    """The model class does not route the attention of every layer through transformers' attention interface."""


class Attend(Protocol):
    """Attention of one layer over the tokens of the step."""

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,  # [num_tokens, num_heads, key_dim]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, key_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, value_dim]
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Return [num_tokens, num_heads, value_dim]."""
        ...


class _Current(threading.local):
    attend: Attend | None = None


_current = _Current()


@contextmanager
def attention(attend: Attend) -> Iterator[None]:
    """Answer this thread's attention calls with `attend`."""
    _current.attend = attend
    try:
        yield
    finally:
        _current.attend = None


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, num_heads, num_tokens, key_dim], as transformers lays it out
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    if _current.attend is None:
        raise RuntimeError("the model was called outside of `attention(...)`, so there is no KV cache to attend over")
    options = AttentionOptions(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=getattr(module, "sinks", None) if s_aux is None else s_aux,
    )
    layer: Any = module.layer_idx  # an int on every attention module, which nn.Module's types cannot know
    output = _current.attend(layer, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), options)
    return output.unsqueeze(0), None


def install(model: PreTrainedModel) -> None:
    """Make the model use our attention. Raises UnsupportedModel when its class ignores the choice."""
    if call_sites.adapt(model, lambda: None if _current.attend is None else _attention_forward):
        return
    AttentionInterface.register(ATTENTION_NAME, _attention_forward)
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation != ATTENTION_NAME:
        raise UnsupportedModel(
            f"{type(model).__name__} does not take its attention from transformers' attention interface"
        )


@dataclass(frozen=True, slots=True)
class LayerProbe:
    """What one layer asks of attention."""

    shape: LayerShape
    num_heads: int
    options: AttentionOptions


def probe_layers(model: PreTrainedModel, device: torch.device) -> dict[int, LayerProbe]:
    """Run one token through an installed model and return what its layers ask of attention, by layer index.

    Raises UnsupportedModel when a layer calls attention twice or no layer does.
    """
    probes: dict[int, LayerProbe] = {}

    def record(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        if layer in probes:
            raise UnsupportedModel(f"layer {layer} of {type(model).__name__} calls attention more than once")
        shape = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        probes[layer] = LayerProbe(shape, query.shape[1], options)
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])

    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.inference_mode(), attention(record):
        model(input_ids=zero, position_ids=zero, use_cache=False)
    if not probes:
        raise UnsupportedModel(f"{type(model).__name__} never calls the attention function")
    return probes


def probe_layer_shapes(model: PreTrainedModel, device: torch.device) -> dict[int, LayerShape]:
    """Return the shapes of keys and values by layer index; see `probe_layers`."""
    return {layer: probe.shape for layer, probe in probe_layers(model, device).items()}


class PagedAttention:
    """Answers attention calls from the paged caches of one model."""

    def __init__(self, backend: AttentionBackend, caches: dict[int, LayerCache]) -> None:
        self._backend = backend
        self._caches = caches
        self.batch: AttentionBatch | None = None  # of the step in progress

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        assert self.batch is not None, "no step is in progress"
        return self._backend.attend(query, key, value, self._caches[layer], self.batch, options)
