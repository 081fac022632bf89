"""The bridge between transformers' encoder-decoder classes and the paged KV cache.

Their attention modules call one function, as `attention/hf.py` has it for decoders. Here it does three things:

    of the encoder    plain attention of a source, alone in its batch: no mask, nothing is kept
    of the decoder    paged and causal, over the tokens of the step, whose positions are the batch's
    across            paged, over the keys and values of the source, which were stored when it was encoded

What these classes take from elsewhere is replaced while a step runs: positions that count from the beginning of the
batch become those of its rows, T5's bias becomes a table by distance (never one for every pair of tokens), keys and
values across come from a cache that says that it is filled, and only rows whose logits are wanted reach the head.
Without a step the classes compute as they are, so that the load check can compare both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Final, Protocol

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, EncoderDecoderCache, PreTrainedModel

from worker.engine.attention.hf import UnsupportedModel
from worker.engine.attention.interface import AttentionOptions, LayerShape
from worker.engine.seq2seq.families import most_tokens

ATTENTION_NAME: Final = "torchrelay_seq2seq"
_ROLE: Final = "torchrelay_role"  # of an attention module
_ENCODER, _DECODER, _ACROSS = "encoder", "decoder", "across"


class StepAttention(Protocol):
    """Attention of the decoder's layers in one step. Tensors are [num_tokens, num_heads, head_dim]."""

    def within(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """Over the sequences themselves."""
        ...

    def across(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        """Over their sources."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """What the decoder's modules read besides their arguments."""

    attention: StepAttention
    position_ids: torch.Tensor  # [num_tokens] int64
    logit_rows: torch.Tensor  # [num_logit_rows] int64


class _Current(threading.local):
    step: Step | None = None


_current = _Current()


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Let this thread's calls of a decoder compute `step`."""
    _current.step = step
    try:
        yield
    finally:
        _current.step = None


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Where one layer's attention is in a model."""

    within: Any
    across: Any

    def keys_and_values(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [num_tokens, num_heads, head_dim] across, of what an encoder made of a source [num_tokens, width]."""
        key, value = (_projection(self.across, name)(hidden) for name in ("k", "v"))
        heads = (hidden.shape[0], _num_heads(self.across), -1)
        return key.view(heads), value.view(heads)

    @property
    def shape(self) -> LayerShape:
        """Of keys and values, within as across."""
        attention = self.within
        head_dim = getattr(attention, "head_dim", None) or attention.key_value_proj_dim
        return LayerShape(_num_heads(attention), head_dim, head_dim)


def _projection(attention: nn.Module, name: str) -> Any:
    return getattr(attention, f"{name}_proj", None) or getattr(attention, name)


def _num_heads(attention: Any) -> int:
    return int(getattr(attention, "num_heads", None) or attention.n_heads)


def encoder_of(model: Any) -> Any:
    return model.get_encoder()


def decoder_of(model: Any) -> Any:
    return model.get_decoder()


def decoder_layers(model: PreTrainedModel) -> list[DecoderLayer]:
    """Return the layers of the decoder, in order."""
    decoder = decoder_of(model)
    if hasattr(decoder, "block"):  # T5
        return [DecoderLayer(block.layer[0].SelfAttention, block.layer[1].EncDecAttention) for block in decoder.block]
    return [DecoderLayer(layer.self_attn, layer.encoder_attn) for layer in decoder.layers]


def install(model: PreTrainedModel) -> None:
    """Make the model of a family that is served compute steps. May be repeated.

    Raises UnsupportedModel where its class is not as expected.
    """
    AttentionInterface.register(ATTENTION_NAME, _attention_forward)
    model.set_attn_implementation(ATTENTION_NAME)
    encoder, decoder = encoder_of(model), decoder_of(model)
    layers = decoder_layers(model)
    roles = {layer.within: _DECODER for layer in layers} | {layer.across: _ACROSS for layer in layers}
    for part, own in ((encoder, _ENCODER), (decoder, None)):
        if part.config._attn_implementation != ATTENTION_NAME:
            raise UnsupportedModel(
                f"{type(part).__name__} does not take its attention from transformers' attention interface"
            )
        for module in part.modules():
            if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx"):
                setattr(module, _ROLE, own or roles[module])
    if model.config.model_type == "t5":
        first = layers[0].within
        first.compute_bias = partial(_bias_by_distance, first)
    else:
        positions = decoder.embed_positions
        positions.forward = partial(_POSITIONS[model.config.model_type](positions, model), positions)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not hasattr(head, _ROLE):
        setattr(head, _ROLE, "head")
        head.register_forward_pre_hook(_keep_logit_rows)


# -- attention --------------------------------------------------------------------------------------------------------


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, num_heads, num_tokens, head_dim], as transformers lays it out
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    role, step = getattr(module, _ROLE), _current.step
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if role == _ENCODER:
        output = scaled_dot_product_attention(query, key, value, attn_mask=position_bias, scale=scale)
        return output.transpose(1, 2), None
    if step is None:
        raise RuntimeError("the decoder was called outside of `running(...)`, so there is no KV cache to attend over")
    layer: Any = module.layer_idx
    rows = query[0].transpose(0, 1)
    if role == _ACROSS:  # T5's bias is zero there
        return step.attention.across(layer, rows, AttentionOptions(scale)).unsqueeze(0), None
    options = AttentionOptions(scale, distance_bias=position_bias)
    output = step.attention.within(layer, rows, key[0].transpose(0, 1), value[0].transpose(0, 1), options)
    return output.unsqueeze(0), None


class FilledCache(EncoderDecoderCache):
    """A cache that holds what is across already, and adds nothing to what is within."""

    def __init__(self, model: PreTrainedModel) -> None:
        """What stands in for keys and values has their shape, and our attention does not read it."""
        shape, dtype, device = decoder_layers(model)[0].shape, model.dtype, model.device
        self.source = torch.zeros(1, 1, model.config.d_model, dtype=dtype, device=device)  # nor does anything read this
        nothing = torch.zeros(1, shape.num_kv_heads, 1, shape.key_dim, dtype=dtype, device=device)
        self.is_updated = _Same(True)
        across: Any = SimpleNamespace(layers=_Same(SimpleNamespace(keys=nothing, values=nothing)))
        within: Any = SimpleNamespace(update=lambda key, value, layer: (key, value))
        self.cross_attention_cache, self.self_attention_cache = across, within

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class _Same(dict[int, Any]):
    """The same for every layer."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def get(self, layer: int, default: Any = None) -> Any:
        return self._value

    def __getitem__(self, layer: int) -> Any:
        return self._value


# -- positions --------------------------------------------------------------------------------------------------------


def _bias_by_distance(attention: Any, query_length: int, key_length: int, *args: Any, **kwargs: Any) -> torch.Tensor:
    """T5's bias (arXiv:1910.10683) as [num_heads, num_distances] float32, the last one for all that are farther.

    Every layer gets what the first one has made.
    """
    if _current.step is None:
        plain: torch.Tensor = type(attention).compute_bias(attention, query_length, key_length, *args, **kwargs)
        return plain
    table = getattr(attention, "torchrelay_bias", None)
    if table is None:
        table = attention.torchrelay_bias = bias_table(attention)
    return table


def bias_table(attention: Any) -> torch.Tensor:
    """Return the bias of a T5 decoder's first layer by distance, [num_heads, num_distances] float32."""
    most = attention.relative_attention_max_distance
    distances = torch.arange(most + 1, device=attention.relative_attention_bias.weight.device)
    buckets = attention._relative_position_bucket(
        -distances,
        bidirectional=False,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=most,
    )
    table: torch.Tensor = attention.relative_attention_bias(buckets).float()
    return table.t().contiguous()


# Makes the forward of a decoder's position embedding; without a step the class's own runs.
_Forward = Callable[..., torch.Tensor]


def _own(embedding: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    own: torch.Tensor = type(embedding).forward(embedding, *args, **kwargs)
    return own


def _learned(positions: Any, model: PreTrainedModel) -> _Forward:
    offset = int(positions.offset)

    def forward(embedding: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _current.step is None:
            return _own(embedding, *args, **kwargs)
        return nn.functional.embedding(_current.step.position_ids + offset, embedding.weight)[None]

    return forward


def _computed(positions: Any, model: PreTrainedModel) -> _Forward:
    def forward(embedding: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _current.step is None:
            return _own(embedding, *args, **kwargs)
        return nn.functional.embedding(_current.step.position_ids, embedding.weight)

    return forward


def _computed_but_for_padding(positions: Any, model: PreTrainedModel) -> _Forward:
    """Of M2M100, where tokens of padding have a place of their own, as in generate one by one."""
    padding = int(positions.padding_idx)
    num_positions = (most_tokens(model.config) or 0) + padding + 1
    if positions.weights.shape[0] < num_positions:
        positions.make_weights(num_positions, positions.embedding_dim, positions.padding_idx)

    def forward(embedding: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _current.step is None:
            return _own(embedding, input_ids, *args, **kwargs)
        places = (_current.step.position_ids + padding + 1)[None]
        return nn.functional.embedding(torch.where(input_ids == padding, padding, places), embedding.weights)

    return forward


_POSITIONS: Final[dict[str, Callable[[Any, PreTrainedModel], _Forward]]] = {
    "bart": _learned,
    "m2m_100": _computed_but_for_padding,
    "marian": _computed,
    "mbart": _learned,
}


def _keep_logit_rows(head: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """What the head is called with: [1, num_logit_rows, width] of [1, num_tokens, width]."""
    if _current.step is None:
        return None
    return (arguments[0].index_select(1, _current.step.logit_rows),)
