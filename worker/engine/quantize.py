"""Narrow weights on a GPU: the linear layers in fp8 (`fp8.py`), or in int8 or int4 through torchao.

    fp8    weights with a scale per output; inputs rounded to 8 bits too, with a scale per row
    int8   weights alone, with a scale per output
    int4   weights alone, in groups of 128 inputs, with scales and zero points fitted by HQQ

Embeddings, norms and the head stay as they are. Layers are merged first: quantized before, each would have to be
merged in its format; quantized after, a merged product is one layer like any other.

int8 leaves the inputs alone for two reasons. Rounded as well, with a scale per row, they moved SmolLM2's logits three
times as far (0.51 of their spread against 0.17); and torchao's product of bytes, where torch.compile has not replaced
it, asks for the repr of its input, which waits for the device and cannot be recorded into a CUDA graph. The price: it
widens a weight before each product, so that int8 saves memory and no time. int4 is packed for the kernel that torch
brings along; torchao's default packing takes a package more.

On an H200 a random model of 512 hidden dimensions moved by 0.44 in fp8, 0.12 in int8 and 0.78 in int4.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final, Literal

import structlog
import torch
from torch import nn
from transformers import PreTrainedModel

from worker.engine import loadcheck
from worker.engine.closeness import Closeness, relative_error
from worker.engine.device import DeviceError
from worker.engine.model_files import ModelError

_log = structlog.get_logger(__name__)

Narrow = Literal["fp8", "int8", "int4"]

_TORCHAO: Final = (0, 18)  # the names below are this release's, the first with int8 weights as they are used here
_GROUP: Final = 128
_FP8_MULTIPLE: Final = 16  # of outputs and inputs that torch's product takes
_CAPABILITY: Final[Mapping[Narrow, tuple[int, int]]] = {"fp8": (8, 9), "int4": (8, 0)}  # of the products' kernels
_BFLOAT16_ONLY: Final = ("fp8", "int4")

# How far logits may move, relative to their spread, median over the tokens; a fault moves them by about the whole of
# it. SmolLM2-135M's move by 0.17 in int8, 0.38 in fp8 and 0.78 in int4 (groups of 64); larger models bear more.
NARROW_TOLERANCE: Final[Mapping[Narrow, float]] = {"fp8": 0.5, "int8": 0.5, "int4": 0.8}


@dataclass(frozen=True, slots=True)
class Quantized:
    """Which layers were quantized, and which have a shape that the format does not take; names in the module."""

    layers: tuple[str, ...]
    left: tuple[str, ...]


def check_device(narrow: Narrow, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what this device, number format or installation rules out, before a model is loaded. Raises DeviceError.

    On a CPU int8 is the compiled decoder's own.
    """
    if device.type != "cuda":
        if narrow != "int8":
            raise DeviceError(f"{narrow} weights need an NVIDIA GPU; on a CPU there are int8 and none")
        return
    if narrow in _BFLOAT16_ONLY and dtype != torch.bfloat16:
        raise DeviceError(f"{narrow} weights go with bfloat16, not {str(dtype).removeprefix('torch.')}")
    least, found = _CAPABILITY.get(narrow, (0, 0)), torch.cuda.get_device_capability(device)
    if found < least:
        needed, has = (".".join(map(str, version)) for version in (least, found))
        name = torch.cuda.get_device_name(device)
        raise DeviceError(f"{narrow} weights need a GPU of compute capability {needed} or higher; {name} has {has}")
    reason = missing_package(narrow)
    if reason is not None:
        raise DeviceError(f"{narrow} weights on a GPU need torchao, and {reason}: pip install 'torchrelay[torchao]'")


def missing_package(narrow: Narrow) -> str | None:
    """Return why there is no torchao to quantize with; None where there is one, or none is needed."""
    if narrow == "fp8":
        return None
    try:
        version = metadata.version("torchao")
    except metadata.PackageNotFoundError:
        return "torchao is not installed"
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) < _TORCHAO:
        return f"torchao {version} is not {'.'.join(map(str, _TORCHAO))}"
    return None


def narrow_weights(module: PreTrainedModel, narrow: Narrow, source: str) -> Closeness:
    """Quantize a model in place and compare its logits with those before. Leaves the model's own attention installed.

    Raises ModelError where no layer can be quantized, or where the logits are others afterwards.
    """
    started = time.monotonic()
    with torch.inference_mode():
        expected = loadcheck.plain_logits(module)
    try:
        done = quantize(module, narrow)
        with torch.inference_mode():
            actual = loadcheck.plain_logits(module)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(f"{source}: {narrow} weights are not for this model: {error}") from error
    if not done.layers:
        raise ModelError(f"{source}: {narrow} weights are not for this model: none of its layers takes them")
    errors = [relative_error(after, before, torch.bfloat16) for after, before in zip(actual, expected, strict=True)]
    tolerance = NARROW_TOLERANCE[narrow]
    if not all(error <= tolerance for error in errors):  # a NaN is not
        raise ModelError(
            f"{source}: {narrow} weights are not for this model: they move its logits by {max(errors):.2g} of their "
            f"spread, allowed {tolerance:.2g}"
        )
    closeness = Closeness(max(errors), tolerance)
    _log.info(
        "model.quantized",
        narrow=narrow,
        error=closeness.error,
        layers=len(done.layers),
        left=done.left[:3],
        num_left=len(done.left),
        seconds=round(time.monotonic() - started, 1),
    )
    return closeness


def quantize(module: PreTrainedModel, narrow: Narrow) -> Quantized:
    """Quantize the linear layers of a model in place, but for its head, on whichever device it is.

    Each layer's wide weight is let go of before the next one's turn.
    """
    chosen: list[str] = []
    left: list[str] = []
    for name, layer in _linear_layers(module):
        (chosen if _fits(layer, narrow) else left).append(name)
    with torch.inference_mode():
        if narrow == "fp8":
            _to_fp8(module, chosen)
        else:
            quantize_: Callable[..., None] = importlib.import_module("torchao.quantization").quantize_
            names = frozenset(chosen)
            quantize_(module, _config(narrow), filter_fn=lambda _, name: name in names)
    return Quantized(tuple(chosen), tuple(left))


def _to_fp8(module: PreTrainedModel, names: Sequence[str]) -> None:
    from worker.engine.fp8 import Fp8Linear  # needs Triton

    for name in names:
        parent, _, child = name.rpartition(".")
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(module.get_submodule(parent), child, Fp8Linear.from_linear(layer))


def _linear_layers(module: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    """Linear layers except the head, by name. What is no `nn.Linear`, as fused experts are, is not among them."""
    head: object = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    table = module.get_input_embeddings().weight
    return [
        (name, layer)
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and layer is not head and layer.weight is not table
    ]


def _fits(layer: nn.Linear, narrow: Narrow) -> bool:
    """Whether a format's kernel takes this shape: torchao leaves other layers as they are, or fails when they run."""
    num_outputs, num_inputs = layer.weight.shape
    if narrow == "fp8":
        return num_outputs % _FP8_MULTIPLE == num_inputs % _FP8_MULTIPLE == 0
    if narrow == "int4":
        return num_outputs % 8 == num_inputs % _GROUP == 0
    return True


def _config(narrow: Narrow) -> Any:
    """torchao's settings, which are those of torch.compile too if they are not told otherwise."""
    ao: Any = importlib.import_module("torchao.quantization")
    if narrow == "int8":
        return ao.Int8WeightOnlyConfig(granularity=ao.PerRow(), set_inductor_config=False)
    return ao.Int4WeightOnlyConfig(
        group_size=_GROUP,
        int4_packing_format="tile_packed_to_4d",
        int4_choose_qparams_algorithm="hqq",
        set_inductor_config=False,
    )


def num_bytes(module: nn.Module) -> int:
    """Return the memory that a model's weights take: of quantized ones what they are packed into, and their scales."""
    return sum(_num_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _num_bytes(tensor: torch.Tensor) -> int:
    parts: Callable[[], tuple[list[str], object]] | None = getattr(tensor, "__tensor_flatten__", None)
    if parts is None:
        return tensor.nbytes
    return sum(_num_bytes(getattr(tensor, name)) for name in parts()[0])
