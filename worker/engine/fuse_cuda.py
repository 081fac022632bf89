"""Makes a loaded model faster on CUDA without touching its class: merged products, and one kernel where there were ten.

    merged projections    query, key and value are one product
    gated layers          gate and up are one product, activation and product of both one kernel
    norms                 one kernel instead of six
    rotary embedding      one kernel for queries and keys, in place, instead of ten
    head                  of one row alone by the kernel that reads weights fastest
    residual sums         added by the products that end attention and MLP, instead of by kernels of their own; a
                          decode alone has norms and activation in its products as well (`kernels/triton/vector.py`)

As in `fuse.py`, nothing here knows a family: a change is made where modules have the shape that it needs, the model's
logits are compared with those before it, and a change that moves them beyond rounding, or that the model's class does
not bear, is taken back. Bound by launches and by reading activations at small batches, a step gains most there.

Every product stays a linear layer in the tree of modules, so that `quantize.py` finds merged ones as it finds others.
In fp8 (`fp8.py`) norms and activations are part of what rounds a product's input, for any number of rows.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

import structlog
import torch
from torch import nn
from transformers import PreTrainedModel

from worker.engine.closeness import TOLERANCE, relative_error
from worker.engine.fp8 import Fp8Linear
from worker.engine.kernels.triton import layers, vector
from worker.engine.merged import MergedPart, MergedProduct

_log = structlog.get_logger(__name__)

_TEST_TOKENS: Final = 24
_PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj")
_GATED: Final = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})
_LAYER: Final = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
_ROTARY: Final = "apply_rotary_pos_emb"  # what every family calls its function

Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One layer that gives what several on one input give, side by side."""
    weights = [linear.weight.detach() for linear in linears]
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    joined = nn.Linear(linears[0].in_features, sum(map(len, weights)), bias=bool(biases), device="meta")
    joined.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    if biases:
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return joined


class NormingLinear(nn.Module):
    """A linear layer that norms its input itself when `norm` is set: of a single row, or in fp8 of any."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear: nn.Linear | Fp8Linear = linear
        self.norm: KernelNorm | None = None  # the next call unsets it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm, self.norm = self.norm, None
        if norm is None:
            output: torch.Tensor = self.linear(x)
            return output
        if isinstance(self.linear, Fp8Linear):
            normed: torch.Tensor = self.linear(x, norm=norm.norm)
            return normed
        return vector.multiply(x, self.linear.weight, addend=self.linear.bias, norm=norm.norm)


class AddingLinear(nn.Module):
    """A linear layer without bias that adds to `into` when that is set: the product's own epilogue does it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear: nn.Linear | Fp8Linear = linear
        self.into: torch.Tensor | None = None  # [..., outputs], changed in place by the next call, which unsets it

    def forward(self, x: torch.Tensor, activation: int | None = None) -> torch.Tensor:
        """With an activation, as `Fp8Linear` has it, which the layer must be then."""
        into, self.into = self.into, None
        if isinstance(self.linear, Fp8Linear):
            sums: torch.Tensor = self.linear(x, activation=activation, into=into)
            return sums
        weight = self.linear.weight
        if into is None:
            output: torch.Tensor = self.linear(x)
            return output
        if type(weight) is not nn.Parameter:  # quantized: its product has no such epilogue
            return into.add_(self.linear(x))
        if x.numel() == x.shape[-1] and vector.fits(weight):
            return vector.multiply(x.contiguous(), weight, addend=into, in_place=True)
        into.view(-1, weight.shape[0]).addmm_(x.reshape(-1, weight.shape[1]), weight.detach().t())
        return into


class GatedLayer(nn.Module):
    """down(activation(gate(x)) * up(x)), with gate and up as one product."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, activation: int) -> None:
        super().__init__()
        self.gate_up_proj: nn.Linear | Fp8Linear = _joined((gate, up))
        self._activation = activation
        self.norm: KernelNorm | None = None  # of rows that come without it; the next call unsets it
        self.down_proj: nn.Module = down
        self._gate_size = gate.out_features

    @property
    def parts(self) -> dict[str, tuple[nn.Module, int]]:
        """The layers that are computed together: in which module, from which of its outputs on."""
        return {"gate_proj": (self.gate_up_proj, 0), "up_proj": (self.gate_up_proj, self._gate_size)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm, self.norm = self.norm, None
        if isinstance(self.gate_up_proj, Fp8Linear):
            halves = self.gate_up_proj(x, norm=None if norm is None else norm.norm)
            if _rounds(self.down_proj):
                rounded: torch.Tensor = self.down_proj(halves, activation=self._activation)
                return rounded
            between = layers.gated(halves, self._activation)
        elif norm is not None:
            between = vector.multiply(x, self.gate_up_proj.weight, norm=norm.norm, activation=self._activation)
        else:
            between = layers.gated(self.gate_up_proj(x), self._activation)
        output: torch.Tensor = self.down_proj(between)
        return output


def _rounds(down: nn.Module) -> bool:
    """Whether the layer takes gate and up as they are: in fp8, and without hooks, which are to see its input."""
    layers = (down, down.linear) if isinstance(down, AddingLinear) else (down,)
    return isinstance(layers[-1], Fp8Linear) and not any(layer._forward_hooks for layer in layers)


class KernelNorm(nn.Module):
    """RMS norm in one kernel."""

    def __init__(self, weight: torch.Tensor, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self._eps = eps
        self._offset = offset

    @property
    def norm(self) -> vector.Norm:
        """The norm as part of a product."""
        return vector.Norm(self.weight, self._eps, self._offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layers.rms_norm(x, self.weight, self._eps, self._offset)


@dataclass(slots=True)
class _Change:
    """A submodule or method of a module, and what takes its place."""

    owner: nn.Module
    name: str
    new: object
    _old: object = field(default=None, init=False)

    def make(self) -> None:
        self._old = self.owner._modules.get(self.name, self.owner.__dict__.get(self.name))
        setattr(self.owner, self.name, self.new)

    def take_back(self) -> None:
        if self._old is None:
            delattr(self.owner, self.name)  # the class's method is seen again
        else:
            setattr(self.owner, self.name, self._old)


@torch.inference_mode()
def speed_up(module: PreTrainedModel) -> tuple[str, ...]:
    """Change a model in place, as far as its logits stay; return the names of the changes that were kept.

    To be called before the model's attention is replaced. Needs the memory of the merged layers a second time while it
    works; where there is not so much, they stay apart.
    """
    if module.dtype not in TOLERANCE:
        return ()
    started = time.monotonic()
    generator = torch.Generator().manual_seed(20240229)
    tokens = torch.randint(module.config.get_text_config().vocab_size, (_TEST_TOKENS,), generator=generator)
    tokens = tokens.to(module.device)
    expected = _logits(module, tokens)
    kept: list[str] = []
    for name, propose in _CHANGES:
        made: list[_Change] = []
        try:
            for change in propose(module):
                change.make()
                made.append(change)
            error = relative_error(_logits(module, tokens), expected, module.dtype) if made else 0.0
            reason = None if error <= TOLERANCE[module.dtype] else f"logits moved by {error:.2g}"
        except Exception as failure:  # noqa: BLE001 - a class that does not bear the change may fail in any way
            reason = str(failure) or type(failure).__name__
        if reason is None and made:
            kept.append(name)
        elif reason is not None:
            for change in reversed(made):
                change.take_back()
            _log.info("model.change_taken_back", change=name, family=module.config.model_type, reason=reason)
    _log.info("model.sped_up", changes=kept, seconds=round(time.monotonic() - started, 1))
    return tuple(kept)


def _logits(module: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Of the tokens together, and of the first one alone, which may be computed by other kernels."""
    runs = [module(input_ids=ids[None], use_cache=False).logits[0] for ids in (tokens, tokens[:1])]
    return torch.cat(runs).float()


def _merged_changes(module: PreTrainedModel) -> Iterator[_Change]:
    for parent in list(module.modules()):
        linears = [layer for name in _PROJECTIONS if _is_linear(layer := getattr(parent, name, None))]
        if len(linears) == len(_PROJECTIONS) and _mergeable(linears):
            product = MergedProduct(NormingLinear(_joined(linears)), [linear.out_features for linear in linears])
            for index, name in enumerate(_PROJECTIONS):
                yield _Change(parent, name, MergedPart(product, index))


def _gated_changes(module: PreTrainedModel) -> Iterator[_Change]:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            parts = dict(child.named_children())
            if parts.keys() != _GATED:
                continue
            gate, up, down, function = (parts[part] for part in ("gate_proj", "up_proj", "down_proj", "act_fn"))
            if not (_is_linear(gate) and _is_linear(up) and _is_linear(down) and _mergeable((gate, up))):
                continue
            activation = _activation(function, module.device)
            if activation is not None:
                yield _Change(parent, name, GatedLayer(gate, up, down, activation))


def _activation(function: nn.Module, device: torch.device) -> int | None:
    """Which of our activations this is, found by trying."""
    x = torch.linspace(-6, 6, 50, device=device)
    candidates = {layers.SILU: nn.functional.silu(x), layers.GELU_TANH: nn.functional.gelu(x, approximate="tanh")}
    result = function(x)
    return next((name for name, expected in candidates.items() if torch.allclose(result, expected, atol=1e-5)), None)


def _norm_changes(module: PreTrainedModel) -> Iterator[_Change]:
    for parent in list(module.modules()):
        for name, norm in list(parent.named_children()):
            eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
            parameters = dict(norm.named_parameters())
            if type(norm).__name__.endswith("RMSNorm") and isinstance(eps, float) and list(parameters) == ["weight"]:
                offset = _offset(norm, parameters["weight"], eps)
                if offset is not None:
                    yield _Change(parent, name, KernelNorm(parameters["weight"], eps, offset))


def _offset(norm: nn.Module, weight: torch.Tensor, eps: float) -> float | None:
    """What the norm adds to its weight, found by trying; None if it is another formula."""
    if weight.ndim != 1:
        return None
    x = torch.linspace(-3, 5, weight.numel(), device=weight.device).to(weight.dtype)[None]
    result = norm(x).float()
    for offset in (0.0, 1.0):
        expected = nn.functional.rms_norm(x.float(), weight.shape, weight.float() + offset, eps)
        if relative_error(result, expected, torch.float32) <= (1e-5 if weight.dtype == torch.float32 else 0.02):
            return offset
    return None


def _rotary_changes(module: PreTrainedModel) -> Iterator[_Change]:
    """An attention module's forward, its own code, run with another function for the rotary embedding."""
    for child in module.modules():
        forward = type(child).forward
        if not isinstance(forward, types.FunctionType) or _ROTARY not in forward.__code__.co_names:
            continue
        original = forward.__globals__.get(_ROTARY)
        if "forward" not in vars(child) and _turns_halves(original):
            scope = {**forward.__globals__, _ROTARY: _rotary(original)}
            clone = types.FunctionType(
                forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__
            )
            clone.__kwdefaults__ = forward.__kwdefaults__
            yield _Change(child, "forward", types.MethodType(clone, child))


def _turns_halves(original: Any) -> TypeGuard[Rotary]:
    """Whether a rotary function is the one that we have, found by trying."""
    query, key = torch.linspace(-3, 5, 48).view(1, 2, 3, 8), torch.linspace(4, -2, 24).view(1, 1, 3, 8)
    cos, sin = torch.linspace(-1, 1, 24).view(1, 3, 8), torch.linspace(1, 0, 24).view(1, 3, 8)
    try:
        results = original(query, key, cos, sin)
    except Exception:  # noqa: BLE001 - a function of other arguments may fail in any way
        return False
    expected = (x * cos[:, None] + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin[:, None] for x in (query, key))
    return all(torch.allclose(result, other, atol=1e-5) for result, other in zip(results, expected, strict=True))


def _rotary(original: Rotary) -> Rotary:
    def rotate(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        is_ours = (
            not args
            and not kwargs
            and q.ndim == k.ndim == 4
            and cos.ndim == sin.ndim == 3
            and q.shape[0] == cos.shape[0] == 1
            and cos.shape[1:] == sin.shape[1:] == (q.shape[2], q.shape[3])
            and q.shape[3] % 2 == 0
            and q.stride(3) == k.stride(3) == cos.stride(2) == sin.stride(2) == 1
        )
        if not is_ours:
            return original(q, k, cos, sin, *args, **kwargs)
        layers.rotate_in_place(q, k, cos, sin)
        return q, k

    return rotate


def _sum_changes(module: PreTrainedModel) -> Iterator[_Change]:
    """Decoder layers that norm, attend, add, norm, transform, add, and nothing else."""
    for layer in list(module.modules()):
        parts = dict(layer.named_children())
        if parts.keys() != _LAYER or not isinstance(parts["mlp"], GatedLayer):
            continue
        attention, mlp = parts["self_attn"], parts["mlp"]
        for owner, name in ((attention, "o_proj"), (mlp, "down_proj")):
            end = getattr(owner, name, None)
            if not _is_linear(end) or end.bias is not None:
                break
            yield _Change(owner, name, AddingLinear(end))
        else:
            yield _Change(layer, "forward", types.MethodType(_adding_forward, layer))


def _adding_forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
    """A decoder layer's forward that adds both results into its input, which nobody else reads afterwards."""
    product = _norming_product(self, is_alone=hidden_states.numel() == hidden_states.shape[-1])
    self.self_attn.o_proj.into = hidden_states
    if product is None:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        self.mlp.down_proj.into = attended
        return self.mlp(self.post_attention_layernorm(attended))
    product.norm = self.input_layernorm
    attended, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
    self.mlp.down_proj.into, self.mlp.norm = attended, self.post_attention_layernorm
    return self.mlp(attended)


def _norming_product(layer: Any, *, is_alone: bool) -> NormingLinear | None:
    """The product of a decoder layer's projections, if both its norms can be part of the products behind them: of any
    rows in fp8, else of one that `is_alone`.

    Hooks, as adapters have them, are to see what is normed already.
    """
    projections = [getattr(layer.self_attn, name) for name in _PROJECTIONS]
    product = projections[0].product if isinstance(projections[0], MergedPart) else None
    gate_up = layer.mlp.gate_up_proj
    if (
        isinstance(product, NormingLinear)
        and isinstance(layer.input_layernorm, KernelNorm)
        and isinstance(layer.post_attention_layernorm, KernelNorm)
        and all(_norms(linear, is_alone=is_alone) for linear in (product.linear, gate_up))
        and getattr(gate_up, "bias", None) is None
        and not any(module._forward_hooks for module in (*projections, product, product.linear, gate_up))
    ):
        return product
    return None


def _norms(linear: nn.Module, *, is_alone: bool) -> bool:
    """Whether a layer's product can have a norm before it."""
    if isinstance(linear, Fp8Linear):
        return True
    return is_alone and type(linear) is nn.Linear and vector.fits(linear.weight)


def _head_changes(module: PreTrainedModel) -> Iterator[_Change]:
    head = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    if _is_linear(head) and vector.fits(head.weight):
        yield _Change(head, "forward", types.MethodType(_head_forward, head))


def _head_forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if x.numel() == x.shape[-1] and vector.fits(self.weight):
        return vector.multiply(x.contiguous(), self.weight, addend=self.bias)
    return nn.functional.linear(x, self.weight, self.bias)


def _is_linear(layer: object) -> TypeGuard[nn.Linear]:
    return type(layer) is nn.Linear  # not a subclass: it may compute something else


def _mergeable(linears: Sequence[nn.Linear]) -> bool:
    return len({linear.in_features for linear in linears}) == len({linear.bias is None for linear in linears}) == 1


_CHANGES: Final[tuple[tuple[str, Callable[[PreTrainedModel], Iterator[_Change]]], ...]] = (
    ("merged projections", _merged_changes),
    ("gated layers", _gated_changes),
    ("norms", _norm_changes),
    ("rotary embedding", _rotary_changes),
    ("residual sums", _sum_changes),
    ("head", _head_changes),
)
