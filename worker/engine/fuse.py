"""Makes a loaded model faster on CPUs without touching its class: packed and merged linear layers, one-call norms.

Linear layers keep their weights in the layout that oneDNN computes in, packed once instead of at every call; the layers
that read the same input (query, key and value; gate and up) become one product. RMS norms become one call.

Nothing here knows a family. A change is made, the model's logits are compared with those before it, and a change that
moves them beyond rounding, or that the model's class does not bear, is taken back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeGuard

import structlog
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from worker.engine.closeness import TOLERANCE, relative_error
from worker.engine.merged import MergedPart, MergedProduct

_log = structlog.get_logger(__name__)

# Layers of one module that read one input, in the order in which forward calls them.
_SIBLINGS: Final = (("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("gate_proj", "up_proj"), ("wi_0", "wi_1"))
# Attention over what an encoder read: its query has another input than key and value.
_ACROSS: Final = ("encoder_attn", "EncDecAttention")

_TEST_TOKENS: Final = 24
_ROWS_HINT: Final = 32  # rows that oneDNN is to pack for: decode batches


class PackedLinear(nn.Module):
    """A linear layer, or several on one input, with the weight in oneDNN's own layout. For inference only."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """All or none of the layers have a bias."""
        super().__init__()
        weight = torch.cat([_width_and_weight(layer)[1] for layer in layers])
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        self._bias: torch.Tensor | None = None
        self.weight = None  # for classes that look at its dtype before they call it (T5)
        if layers[0].bias is not None:
            self._bias = torch.cat([layer.get_parameter("bias").detach() for layer in layers])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., sum of the layers' widths]."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return output


class OneCallNorm(nn.Module):
    """RMS norm (arXiv:1910.07467) as one call instead of six."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self._weight = weight.detach()
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self._weight.shape, self._weight, self._eps)


@dataclass(frozen=True, slots=True)
class _Change:
    """A submodule and what takes its place."""

    parent: nn.Module
    name: str
    old: nn.Module
    new: nn.Module


@torch.inference_mode()
def speed_up(module: PreTrainedModel) -> tuple[str, ...]:
    """Change a model on the CPU in place, as far as its logits stay; return the names of the changes that were kept.

    To be called before the model's attention is replaced. Needs the memory of the linear layers a second time while it
    works. Other devices are left alone.
    """
    if module.device.type != "cpu" or module.dtype not in TOLERANCE or not _has_onednn():
        return ()
    started = time.monotonic()
    generator = torch.Generator().manual_seed(20240229)
    tokens = torch.randint(module.config.get_text_config().vocab_size, (_TEST_TOKENS,), generator=generator)
    expected = _logits(module, tokens)
    kept: list[str] = []
    for name, propose in _CHANGES:
        changes: list[_Change] = []
        try:
            for change in propose(module):
                setattr(change.parent, change.name, change.new)
                changes.append(change)
            error = relative_error(_logits(module, tokens), expected, module.dtype)
            reason = None if error <= TOLERANCE[module.dtype] else f"logits moved by {error:.2g}"
        except Exception as failure:  # noqa: BLE001 - a class that does not bear the change may fail in any way
            reason = str(failure) or type(failure).__name__
        if reason is None and changes:
            kept.append(name)
        elif reason is not None:
            for change in changes:
                setattr(change.parent, change.name, change.old)
            _log.info("model.change_taken_back", change=name, family=module.config.model_type, reason=reason)
    _log.info("model.sped_up", changes=kept, seconds=round(time.monotonic() - started, 1))
    return tuple(kept)


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _logits(module: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    extra = {"decoder_input_ids": tokens[None]} if module.config.is_encoder_decoder else {}
    logits: torch.Tensor = module(input_ids=tokens[None], use_cache=False, **extra).logits[0]
    return logits.float()


def _merged_changes(module: nn.Module) -> Iterator[_Change]:
    for path, parent in list(module.named_modules()):
        for names in _SIBLINGS if not path.endswith(_ACROSS) else ():
            layers = [layer for name in names if _is_linear(layer := getattr(parent, name, None))]
            if len(layers) == len(names) and _mergeable(layers):
                merged = MergedProduct(PackedLinear(layers), [_width_and_weight(layer)[0] for layer in layers])
                for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
                    yield _Change(parent, name, layer, MergedPart(merged, index))


def _packed_changes(module: nn.Module) -> Iterator[_Change]:
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if _is_linear(layer):
                yield _Change(parent, name, layer, PackedLinear([layer]))


def _is_linear(layer: object) -> TypeGuard[nn.Module]:
    return type(layer) in (nn.Linear, Conv1D)  # not a subclass: it may compute something else


def _width_and_weight(layer: nn.Module) -> tuple[int, torch.Tensor]:
    """Outputs of a layer and its weight [outputs, inputs]; GPT-2's Conv1D is a linear layer that transposes it."""
    weight = layer.get_parameter("weight").detach()
    weight = weight.t() if isinstance(layer, Conv1D) else weight
    return weight.shape[0], weight


def _mergeable(layers: Sequence[nn.Module]) -> bool:
    inputs = {_width_and_weight(layer)[1].shape[1] for layer in layers}
    return len(inputs) == 1 and len({layer.bias is None for layer in layers}) == 1


def _norm_changes(module: nn.Module) -> Iterator[_Change]:
    for parent in list(module.modules()):
        for name, norm in list(parent.named_children()):
            eps = getattr(norm, "variance_epsilon", None)
            parameters = dict(norm.named_parameters())
            is_rms = type(norm).__name__.endswith(("RMSNorm", "T5LayerNorm"))
            if is_rms and isinstance(eps, float) and list(parameters) == ["weight"]:
                yield _Change(parent, name, norm, OneCallNorm(parameters["weight"], eps))


# In this order: what is merged is packed already, and where merging fails, packing alone may hold.
_CHANGES: Final[tuple[tuple[str, Callable[[nn.Module], Iterator[_Change]]], ...]] = (
    ("merged linear layers", _merged_changes),
    ("packed linear layers", _packed_changes),
    ("norms", _norm_changes),
)
