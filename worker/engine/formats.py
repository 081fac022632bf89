"""Quantized checkpoints: their format by name, and what it takes to load them.

transformers does not fail on every checkpoint whose weights it cannot undo. A method that it does not know is warned of
and skipped, and scales that belong to no parameter are left behind: the model then answers nonsense. So a format is
loaded only if it is known here, all of its tensors must find their place, and a checkpoint that names no format may not
hold weights in fewer than 16 bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from worker.engine.model_dir import ModelError
from worker.engine.safetensors_header import Header


@dataclass(frozen=True, slots=True)
class Quantization:
    """A format that transformers loads."""

    name: str  # quant_method of config.json
    packages: tuple[str, ...]  # as pip installs them
    # Whether the weights become plain ones when they are loaded. Kernels for the rest of these formats are downloaded
    # when the model first runs, and ours compute with plain weights.
    is_undone: bool


_SERVED: Final[Mapping[str, Quantization]] = {
    entry.name: entry
    for entry in (
        Quantization("awq", ("gptqmodel", "accelerate"), is_undone=False),
        Quantization("bitsandbytes", ("bitsandbytes", "accelerate"), is_undone=False),
        Quantization("compressed-tensors", ("compressed-tensors", "accelerate"), is_undone=True),
        Quantization("fp8", ("accelerate",), is_undone=True),
        Quantization("gptq", ("gptqmodel", "optimum", "accelerate"), is_undone=False),
        Quantization("mxfp4", ("accelerate",), is_undone=True),
    )
}

# Where tools write their format besides or instead of config.json; transformers does not look there.
_SIDECARS: Final = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def read_quantization(folder: Path, config: Mapping[str, Any]) -> Quantization | None:
    """Return the format of a checkpoint by its config.json; None for plain weights.

    Raises ModelError for a format that is not served, by its name.
    """
    section = config.get("quantization_config") or config.get("compression_config")
    if not section:
        for file, name in _SIDECARS.items():
            if (folder / file).exists():
                raise ModelError(
                    f"{folder} is quantized ({name}, says {file}), but its config.json has no quantization_config; "
                    "transformers would load the numbers as they are"
                )
        return None
    name = _method(section)
    if name not in _SERVED or "quantization_config" not in config:
        raise ModelError(
            f"{folder} is quantized ({name}), and this format is not served; those that are: "
            f"{', '.join(sorted(_SERVED))}, and plain float32, float16 and bfloat16"
        )
    return _SERVED[name]


def _method(section: object) -> str:
    if not isinstance(section, Mapping):
        return "unknown"
    method = section.get("quant_method")
    if method is None and (section.get("load_in_4bit") or section.get("load_in_8bit")):
        return "bitsandbytes"  # older files of it name no method
    return str(method or "unknown")


def check_packages(folder: Path, quantization: Quantization) -> None:
    """Raise ModelError where a package is missing that the format needs."""
    missing = [name for name in quantization.packages if not _is_installed(name)]
    if missing:
        raise ModelError(
            f"{folder} is quantized ({quantization.name}); to load it takes {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_plain(headers: Mapping[Path, Header]) -> None:
    """Raise ModelError where a file holds weights in fewer than 16 bits, though the model names no format."""
    for file, header in headers.items():
        for name, entry in header.tensors.items():
            kind = entry.dtype
            # Buffers may be integers: GPT-2 files hold their causal mask.
            is_narrow = kind.startswith(("F8", "F6", "F4")) or (not _is_float(kind) and name.endswith("weight"))
            if is_narrow:
                raise ModelError(
                    f"{file} holds {name} as {kind}, but config.json has no quantization_config that says how to "
                    "read it"
                )


def _is_float(kind: str) -> bool:
    return kind.startswith(("F", "BF"))


def loading_arguments(quantization: Quantization, device: torch.device) -> dict[str, Any]:
    """Return what `from_pretrained` must be told besides what it is told for plain weights."""
    # Packed weights cannot be moved between devices in every format, so they are loaded to where they will stay.
    arguments: dict[str, Any] = {"device_map": {"": str(device)}}
    if quantization.is_undone:
        arguments["quantization_config"] = _undoing_config(quantization.name)
    return arguments


def _undoing_config(name: str) -> Any:
    import transformers

    classes = {"compressed-tensors": "CompressedTensorsConfig", "fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
    make: Any = getattr(transformers, classes[name])
    if "dequantize" in inspect.signature(make.__init__).parameters:
        return make(dequantize=True)
    return make(run_compressed=False)  # compressed-tensors in transformers before 5.20


def check_loaded(module: PreTrainedModel, quantization: Quantization, dtype: torch.dtype) -> None:
    """Check that the weights are what the format promises, and compute in `dtype`. Raises ModelError."""
    for name, tensor in module.named_parameters():
        if quantization.is_undone and tensor.element_size() < 2:
            raise ModelError(f"transformers did not undo the quantization ({quantization.name}) of {name}")
    if module.dtype != dtype:
        found, wanted = (str(kind).removeprefix("torch.") for kind in (module.dtype, dtype))
        raise ModelError(f"a model quantized with {quantization.name} computes in {found} here, not in {wanted}")
