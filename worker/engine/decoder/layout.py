"""Reads what a Llama-shaped decoder consists of out of transformers' module, by its structure and not by its name.

    x += output(attention(rotary(qkv(norm(x)))))
    x += down(activation(gate(norm(x))) * up(norm(x)))

Norms may also stand behind attention and MLP, instead or besides (Gemma 2, OLMo 2), and inside of attention on queries
and keys (Qwen 3). Whatever has a part that is not known here is refused, and what is read is compared with the module's
own logits before it is used: see `compile.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from worker.engine.attention.hf import LayerProbe

Activation = Literal["silu", "gelu_tanh"]

_ACTIVATIONS: Final[Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}

# Which norms of a decoder layer stand where: before attention, behind it, before the MLP, behind it.
_NORM_NAMES: Final = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)


class NotLlamaShaped(Exception):
    """The model has a part that the compiled decoder does not know; the message names it."""


@dataclass(frozen=True, slots=True)
class LinearLayout:
    """Linear layers on one input, to be computed as one. Weights are [outputs, inputs]."""

    layers: tuple[nn.Linear, ...]

    @property
    def inputs(self) -> int:
        return self.layers[0].in_features

    @property
    def outputs(self) -> int:
        return sum(layer.out_features for layer in self.layers)


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One layer. Norm weights are float32 vectors; None where there is no norm."""

    qkv: LinearLayout
    output: LinearLayout
    gate_up: LinearLayout  # gates, then ups
    down: LinearLayout
    attention_norm: torch.Tensor | None
    attention_output_norm: torch.Tensor | None
    mlp_norm: torch.Tensor | None
    mlp_output_norm: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    rope: str | None  # key of DecoderLayout.rope_tables; None: no rotary positions
    attention: LayerProbe

    def linears(self) -> tuple[nn.Linear, ...]:
        return (*self.qkv.layers, *self.output.layers, *self.gate_up.layers, *self.down.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayout:
    """A whole model."""

    layers: tuple[LayerLayout, ...]
    embedding: torch.Tensor  # [vocab_size, hidden_size]
    head: LinearLayout
    final_norm: torch.Tensor
    rope_tables: Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # cosines and sines, [num_positions, rotary_dim / 2]
    num_positions: int
    mlp_size: int
    activation: Activation
    wide_query_key_norm: bool  # these norms run over all heads together
    norm_epsilon: float
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    logit_softcap: float  # 0: none


def read_layout(module: PreTrainedModel, probes: Mapping[int, LayerProbe], num_positions: int) -> DecoderLayout:
    """Read a model; `probes` are its attention's shapes and options by layer. Raises NotLlamaShaped."""
    base: Any = module.base_model
    _check_children(module, {module.base_model_prefix, "lm_head"})
    _check_children(base, {"embed_tokens", "layers", "norm", "rotary_emb"})
    config: Any = module.config.get_text_config()
    norms = _Norms(module.dtype)
    final_norm = norms.read(base.norm)
    layers, activations = [], set()
    rope_of = _RopeTables(base.rotary_emb, num_positions)
    for index, layer in enumerate(base.layers):
        _check_children(layer, {"self_attn", "mlp", *(n for names in _NORM_NAMES for n in names if n)})
        layers.append(_read_layer(layer, probes[index], norms, rope_of, _layer_type(config, index)))
        activations.add(_activation(layer.mlp))
    if len(activations) != 1 or len(norms.epsilons) != 1:
        raise NotLlamaShaped("layers differ in activation or epsilon")
    weights = [linear.weight.data_ptr() for layer in layers for linear in layer.linears()]
    if len(set(weights)) != len(weights):
        raise NotLlamaShaped("layers share their weights")
    widths = {
        layer.query_norm.numel() != layer.attention.shape.key_dim for layer in layers if layer.query_norm is not None
    }
    if len(widths) > 1:
        raise NotLlamaShaped("layers differ in the width of query norms")
    embedding = base.embed_tokens
    return DecoderLayout(
        layers=tuple(layers),
        embedding=embedding.weight.detach(),
        head=_linear(getattr(module, "lm_head", None)),
        final_norm=final_norm,
        rope_tables=rope_of.tables,
        num_positions=num_positions,
        mlp_size=layers[0].down.inputs,
        activation=activations.pop(),
        wide_query_key_norm=widths == {True},
        norm_epsilon=norms.epsilons.pop(),
        embedding_scale=_embedding_scale(base, config, module.dtype),
        residual_scale=float(getattr(config, "residual_multiplier", 1.0)),
        logit_scale=_logit_scale(config),
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


def _check_children(module: nn.Module, known: set[str]) -> None:
    for name, child in module.named_children():
        if name not in known and any(True for _ in child.parameters()):
            raise NotLlamaShaped(f"{type(module).__name__} has a part {name!r}")
    for name, _ in module.named_parameters(recurse=False):
        raise NotLlamaShaped(f"{type(module).__name__} has a parameter {name!r}")


def _read_layer(
    layer: Any, probe: LayerProbe, norms: _Norms, rope_of: _RopeTables, layer_type: str | None
) -> LayerLayout:
    attention, mlp = layer.self_attn, layer.mlp
    _check_children(attention, {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"})
    _check_children(mlp, {"gate_proj", "up_proj", "gate_up_proj", "down_proj"})
    if probe.options.sinks is not None:
        raise NotLlamaShaped("attention has sinks")
    if probe.shape.key_dim != probe.shape.value_dim:
        raise NotLlamaShaped("keys and values differ in size")
    present = {name for name, child in layer.named_children() if any(True for _ in child.parameters())}
    placed = next((names for names in _NORM_NAMES if {n for n in names if n} == present - {"self_attn", "mlp"}), None)
    if placed is None:
        raise NotLlamaShaped(f"a layer's parts are {', '.join(sorted(present))}")
    before, behind, before_mlp, behind_mlp = (norms.read(getattr(layer, name)) if name else None for name in placed)
    result = LayerLayout(
        qkv=_merged(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
        output=_linear(attention.o_proj),
        gate_up=_merged(mlp, ("gate_proj", "up_proj"), "gate_up_proj"),
        down=_linear(mlp.down_proj),
        attention_norm=before,
        attention_output_norm=behind,
        mlp_norm=before_mlp,
        mlp_output_norm=behind_mlp,
        query_norm=norms.read(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=norms.read(attention.k_norm) if hasattr(attention, "k_norm") else None,
        rope=rope_of.key(layer_type) if _has_rope(attention) else None,
        attention=probe,
    )
    heads = probe.num_heads * probe.shape.key_dim
    if (
        result.qkv.outputs != heads + 2 * probe.shape.num_kv_heads * probe.shape.key_dim
        or result.output.inputs != heads
        or result.gate_up.outputs != 2 * result.down.inputs
    ):
        raise NotLlamaShaped("a layer's linear layers do not fit its heads or its MLP")
    return result


def _has_rope(attention: Any) -> bool:
    """SmolLM3 and others leave rotary positions out of some layers."""
    return bool(getattr(attention, "use_rope", True))


def _layer_type(config: Any, index: int) -> str | None:
    types = getattr(config, "layer_types", None)
    return types[index] if types else None


def _linear(layer: object) -> LinearLayout:
    if type(layer) is not nn.Linear:
        raise NotLlamaShaped(f"a linear layer is a {type(layer).__name__}")
    return LinearLayout((layer,))


def _merged(parent: Any, names: tuple[str, ...], whole: str) -> LinearLayout:
    if hasattr(parent, whole):
        return _linear(getattr(parent, whole))
    layers = tuple(_linear(getattr(parent, name, None)).layers[0] for name in names)
    if len({layer.in_features for layer in layers}) != 1 or len({layer.bias is None for layer in layers}) != 1:
        raise NotLlamaShaped(f"{', '.join(names)} do not read the same input, or only some have a bias")
    return LinearLayout(layers)


def _activation(mlp: Any) -> Activation:
    """Tell the activation by what it does."""
    function = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    if function is None:
        raise NotLlamaShaped("an MLP has no act_fn")
    x = torch.linspace(-8, 8, 257)
    for name, known in _ACTIVATIONS.items():
        if torch.allclose(function(x), known(x), atol=1e-6):
            return name
    raise NotLlamaShaped("the MLP's activation is neither SiLU nor tanh GELU")


class _Norms:
    """Reads RMS norms; some add one to their weight, told by what they do."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.epsilons: set[float] = set()
        self._dtype = dtype

    def read(self, norm: Any) -> torch.Tensor:
        if [name for name, _ in norm.named_parameters()] != ["weight"]:
            raise NotLlamaShaped(f"a {type(norm).__name__} has more than a weight")
        epsilon = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
        if not isinstance(epsilon, float):
            raise NotLlamaShaped(f"a {type(norm).__name__} names no epsilon")
        self.epsilons.add(epsilon)
        weight: torch.Tensor = norm.weight.detach().float()
        x = torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)) + 0.5
        root = (x.square().mean() + epsilon).sqrt()
        actual = norm(x.to(self._dtype)).float()
        for candidate in (weight, weight + 1.0):
            if torch.allclose(actual, x / root * candidate, rtol=0.05, atol=0.05):
                return candidate.contiguous()
        raise NotLlamaShaped(f"a {type(norm).__name__} is no RMS norm")


class _RopeTables:
    """Cosines and sines of all positions, by the layers' types where those differ."""

    def __init__(self, rotary: Any, num_positions: int) -> None:
        self._rotary = rotary
        self._num_positions = num_positions
        self.tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def key(self, layer_type: str | None) -> str:
        by_type = layer_type is not None and hasattr(self._rotary, f"{layer_type}_inv_freq")
        key = layer_type if by_type and layer_type is not None else "all"
        if key not in self.tables:
            positions = torch.arange(self._num_positions)[None]
            extra = (layer_type,) if by_type else ()
            tables = [table[0] for table in self._rotary(torch.empty(1, dtype=torch.float32), positions, *extra)]
            half = tables[0].shape[-1] // 2
            if any(not torch.equal(table[:, :half], table[:, half:]) for table in tables):
                raise NotLlamaShaped("rotary positions turn neighbouring dimensions")
            cosines, sines = (table[:, :half].contiguous() for table in tables)
            self.tables[key] = cosines, sines
        return key


def _embedding_scale(base: Any, config: Any, dtype: torch.dtype) -> float:
    """Gemma multiplies by the root of the width, rounded to the model's format; Granite by a number of its own."""
    if type(base.embed_tokens) is not nn.Embedding:
        scale = getattr(base.embed_tokens, "embed_scale", None)
        if scale is None:
            raise NotLlamaShaped(f"the embedding is a {type(base.embed_tokens).__name__}")
        return float(torch.as_tensor(scale).to(dtype))
    if config.model_type in ("gemma", "gemma2"):
        return float(torch.tensor(config.hidden_size**0.5).to(dtype))
    return float(getattr(config, "embedding_multiplier", 1.0))


def _logit_scale(config: Any) -> float:
    """Granite divides its logits."""
    return 1.0 / float(getattr(config, "logits_scaling", 1.0))
