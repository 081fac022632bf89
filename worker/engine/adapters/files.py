"""Reads adapters in PEFT's format: a folder of adapter_config.json and adapter_model.safetensors.

    y = W x + scale * B (A x)      A [rank, inputs], B [outputs, rank]; scale is alpha / rank, or alpha / sqrt(rank)

What an adapter asks for beyond that is refused by its name: an adapter that is served half would answer like none that
was trained. Nothing but safetensors is read, and its header is held against the file first.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from worker.engine.safetensors_header import LENGTH_BYTES, Header, HeaderError, header_length, parse_header

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"

_MAX_CONFIG_BYTES: Final = 1 << 20
_TENSOR: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# Of an expression that an adapter brings along: what takes time to match is left out.
_PATTERN: Final = re.compile(r"\^?(?:[\w.]|\\\.|\\d\+){1,200}(?:\*[\w.]{0,200})?\$?", re.ASCII)
_DTYPES: Final[Mapping[str, torch.dtype]] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# What the config may say without a change to what the adapter computes.
_IGNORED: Final = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type"),
        *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("megatron_core", "loftq_config", "eva_config", "qalora_group_size", "runtime_config", "fan_in_fan_out"),
    }
)
_READ: Final = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
)
# Starting points that take nothing away from the base; others leave an adapter of another base than the one served.
_INITS: Final = (None, True, False, "gaussian", "orthogonal", "eva")


class LinearShape(NamedTuple):
    """A linear layer that an adapter may add to."""

    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """What one adapter may take."""

    max_rank: int
    max_bytes: int  # of its files, and of its weights in float32


class AdapterError(Exception):
    """The folder holds no adapter that can be served with this model; the text says why."""


class LowRankWeights(NamedTuple):
    """What is added to one layer, in float32: up @ (down @ x)."""

    down: torch.Tensor  # [rank, inputs]
    up: torch.Tensor  # [outputs, rank], the scale included


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter that was read and checked."""

    revision: str  # SHA-256 of both files, hex
    rank: int  # the largest of its layers
    layers: Mapping[str, LowRankWeights]  # by the path of the layer in the model

    @property
    def num_bytes(self) -> int:
        return sum(4 * (layer.down.numel() + layer.up.numel()) for layer in self.layers.values())


def read_adapter(folder: Path, shapes: Mapping[str, LinearShape], limits: AdapterLimits) -> AdapterWeights:
    """Read the adapter of a folder for a model of these linear layers. Raises AdapterError and OSError."""
    config_bytes = _read_file(folder / CONFIG_FILE, _MAX_CONFIG_BYTES)
    content = _read_file(folder / WEIGHTS_FILE, limits.max_bytes)
    config = _parse_config(bytes(config_bytes))
    _check_config(config)
    try:
        length = header_length(bytes(content[:LENGTH_BYTES]), len(content))
        header = parse_header(bytes(content[LENGTH_BYTES : LENGTH_BYTES + length]), len(content))
    except HeaderError as error:
        raise AdapterError(f"{WEIGHTS_FILE}: {error}") from error
    ranks = _check_tensors(header, shapes, limits)
    _check_targets(config, ranks)
    scales = {module: _scale(config, module, rank) for module, rank in ranks.items()}
    layers = {
        module: LowRankWeights(
            down=_tensor(content, header, f"base_model.model.{module}.lora_A.weight"),
            up=_tensor(content, header, f"base_model.model.{module}.lora_B.weight") * scale,
        )
        for module, scale in scales.items()
    }
    digest = hashlib.sha256(len(config_bytes).to_bytes(8, "little"))
    digest.update(config_bytes)
    digest.update(content)
    return AdapterWeights(digest.hexdigest(), max(ranks.values()), layers)


def _read_file(path: Path, max_bytes: int) -> bytearray:
    with path.open("rb") as file:
        content = bytearray(file.read(max_bytes + 1))
    if len(content) > max_bytes:
        raise AdapterError(f"{path.name} has more than {max_bytes} bytes")
    return content


def _parse_config(content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{CONFIG_FILE} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{CONFIG_FILE} is not a JSON object")
    return config


def _check_config(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"peft_type is {kind!r}; LORA is served")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"bias is {config['bias']!r}: biases are the base's, or bias is none")
    if config.get("init_lora_weights") not in _INITS:
        raise AdapterError(
            f"init_lora_weights is {config['init_lora_weights']!r:.40}: its base is another; convert it to plain LoRA"
        )
    for name, value in config.items():
        if name not in _IGNORED | _READ and (value not in (None, False) and value not in ([], {})):
            raise AdapterError(f"{name} is {json.dumps(value):.100}, which is not served")
    for name in ("r", "lora_alpha"):
        if not _is_number(config.get(name)):
            raise AdapterError(f"{name} is not a number above 0")
    if not isinstance(config.get("use_rslora") or False, bool):
        raise AdapterError("use_rslora is neither true nor false")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(map(_is_number, pattern.values())):
            raise AdapterError(f"{name} is not a map of numbers above 0")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _check_tensors(header: Header, shapes: Mapping[str, LinearShape], limits: AdapterLimits) -> dict[str, int]:
    """Return the rank of each layer that the adapter adds to."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    num_elements = 0
    for name, entry in header.tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise AdapterError(f"{name:.200} is no factor of a linear layer")
        if match["module"] not in shapes:
            raise AdapterError(f"the model has no linear layer {match['module']:.200} that adapters may add to")
        if entry.dtype not in _DTYPES:
            raise AdapterError(f"{name} is of {entry.dtype}; F32, BF16 and F16 are read")
        if len(entry.shape) != 2:
            raise AdapterError(f"{name} has the shape {list(entry.shape)}, which is no matrix")
        found.setdefault(match["module"], {})[match["factor"]] = entry.shape
        num_elements += entry.num_elements
    if not found:
        raise AdapterError(f"{WEIGHTS_FILE} holds no tensors")
    if 4 * num_elements > limits.max_bytes:
        raise AdapterError(f"its weights take {4 * num_elements} bytes; at most {limits.max_bytes} are allowed")
    ranks: dict[str, int] = {}
    for module, factors in found.items():
        if factors.keys() != {"A", "B"}:
            raise AdapterError(f"{module} has only one of lora_A and lora_B")
        (rank, inputs), (outputs, other_rank) = factors["A"], factors["B"]
        if (inputs, outputs) != shapes[module] or rank != other_rank or not rank:
            expected = shapes[module]
            raise AdapterError(
                f"{module}: lora_A is {[rank, inputs]} and lora_B {[outputs, other_rank]}; the layer has "
                f"{expected.inputs} inputs and {expected.outputs} outputs"
            )
        if rank > limits.max_rank:
            raise AdapterError(f"{module} has rank {rank}; at most {limits.max_rank} is allowed")
        ranks[module] = rank
    return ranks


def _check_targets(config: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    """Where the config says which layers there are and of which rank, the weights must agree."""
    for module, rank in ranks.items():
        expected = _by_pattern(config.get("rank_pattern") or {}, module, config["r"])
        if rank != expected:
            raise AdapterError(f"{module} has rank {rank}; {CONFIG_FILE} says {expected}")
    targets = config.get("target_modules")
    for target in targets if isinstance(targets, list) else ():
        if not isinstance(target, str) or not any(m == target or m.endswith(f".{target}") for m in ranks):
            raise AdapterError(f"target_modules names {target!r:.100}, which has no weights in {WEIGHTS_FILE}")


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = float(_by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """As PEFT: the first key that is, as an expression, the module's path or its end."""
    for key, value in patterns.items():
        if not _PATTERN.fullmatch(key):
            raise AdapterError(f"{key!r:.100} is no name of layers, or too much of an expression to be tried")
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise


def _tensor(content: bytearray, header: Header, name: str) -> torch.Tensor:
    entry = header.tensors[name]
    dtype = _DTYPES[entry.dtype]
    start = header.num_bytes + entry.begin
    # Of a slice, which is a copy: the file's bytes need not stay.
    tensor = torch.frombuffer(content[start : header.num_bytes + entry.end], dtype=dtype).view(entry.shape).float()
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{name} holds numbers that are not finite")
    return tensor
