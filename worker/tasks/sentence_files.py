"""What the files of sentence-transformers beside a model say: how its vectors are made of its tokens'.

modules.json                    the parts, in order: Transformer, Pooling, Dense, Normalize
sentence_bert_config.json       the most tokens of a text
1_Pooling/config.json           how tokens become one vector
2_Dense/config.json and .safetensors   a layer behind that
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from worker.engine import model_dir
from worker.engine.model_files import ModelError, read_json, read_weights
from worker.tasks.pooling import Pooling

_MODULES: Final = "modules.json"
_LIMITS: Final = "sentence_bert_config.json"
_KINDS: Final = ("Transformer", "Pooling", "Dense", "Normalize")
_FOLDER: Final = re.compile(r"\d{1,2}_[A-Za-z]+")
_POOLINGS: Final[Mapping[str, Pooling]] = {
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_lasttoken": Pooling.LAST,
    "pooling_mode_mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LEN,
}
_ACTIVATIONS: Final[Mapping[str, str]] = {
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.linear.Identity": "identity",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A linear layer behind the pooling."""

    weights: Path  # linear.weight and maybe linear.bias
    in_features: int
    out_features: int
    has_bias: bool
    activation: str  # tanh or identity


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceFiles:
    """How vectors are made. Without such files: the mean of all tokens, as it is."""

    pooling: Pooling = Pooling.MEAN
    dense: tuple[Dense, ...] = ()
    normalizes: bool = False
    max_tokens: int | None = None
    contents: Mapping[str, bytes] = field(default_factory=dict)  # what else decides the answers, by file name


def has_sentence_files(folder: Path) -> bool:
    """Whether the model is one of sentence-transformers'."""
    return (folder / _MODULES).is_file()


def read_sentence_files(folder: Path) -> SentenceFiles:
    """Read them, where there are any. Raises ModelError for a part that cannot be had here."""
    if not has_sentence_files(folder):
        return SentenceFiles()
    pooling, normalizes = Pooling.MEAN, False
    dense: list[Dense] = []
    contents = {_MODULES: _read(folder / _MODULES)}
    for kind, part in _parts(folder):
        match kind:
            case "Transformer":
                if part != folder:
                    raise ModelError(
                        f"{part} holds the transformer; name that directory, or put its files into {folder}"
                    )
            case "Pooling":
                pooling = _pooling(part)
                contents[f"{part.name}/config.json"] = _read(part / "config.json")
            case "Dense":
                dense.append(_dense(part))
                contents[f"{part.name}/config.json"] = _read(part / "config.json")
                contents |= {f"{part.name}/{file.name}": file.read_bytes() for file in [dense[-1].weights]}
            case "Normalize":
                normalizes = True
    limits = read_json(folder / _LIMITS)
    max_tokens = limits.get("max_seq_length")
    return SentenceFiles(
        pooling=pooling,
        dense=tuple(dense),
        normalizes=normalizes,
        max_tokens=max_tokens if isinstance(max_tokens, int) and max_tokens > 0 else None,
        contents=contents,
    )


def _read(path: Path) -> bytes:
    try:
        return model_dir.read_limited(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _parts(folder: Path) -> list[tuple[str, Path]]:
    """Return the kind and the directory of each part, in order; each directory's files are checked."""
    path = folder / _MODULES
    try:
        entries = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or len(entries) > 16:
        raise ModelError(f"{path} does not hold a short list of parts")
    parts = []
    for entry in entries:
        kind, name = str(entry.get("type", "")).rpartition(".")[2], entry.get("path", "")
        if kind not in _KINDS:
            raise ModelError(f"{path} names a part {kind!r}; served are {', '.join(_KINDS)}")
        if name and not (isinstance(name, str) and _FOLDER.fullmatch(name)):
            raise ModelError(f"{path} names the directory {name!r}; parts lie in directories such as 1_Pooling")
        if name and kind != "Normalize":
            model_dir.check_files(folder / name, within=folder)
        parts.append((kind, folder / name if name else folder))
    return parts


def _pooling(part: Path) -> Pooling:
    config = read_json(part / "config.json")
    mode = config.get("pooling_mode")  # newer versions name one
    if isinstance(mode, str):
        names = {"lasttoken": Pooling.LAST, "mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LEN}
        chosen = [names.get(mode) or Pooling(mode)] if mode in names or mode in set(Pooling) else []
    else:
        unknown = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
        chosen = [_POOLINGS[key] for key in unknown if key in _POOLINGS] if set(unknown) <= set(_POOLINGS) else []
    if len(chosen) != 1:
        raise ModelError(f"{part / 'config.json'} must choose one of {', '.join(Pooling)}; several are not joined here")
    if config.get("include_prompt") is False:
        raise ModelError(f"{part / 'config.json'} leaves prompts out of the pooling, which is not served")
    return chosen[0]


def _dense(part: Path) -> Dense:
    config: dict[str, Any] = read_json(part / "config.json")
    activation = _ACTIVATIONS.get(str(config.get("activation_function")))
    sizes = config.get("in_features"), config.get("out_features")
    if activation is None:
        raise ModelError(f"{part / 'config.json'}: the activation must be one of {', '.join(_ACTIVATIONS)}")
    if not all(isinstance(size, int) and 0 < size <= 1 << 16 for size in sizes):
        raise ModelError(f"{part / 'config.json'} must have in_features and out_features")
    files = read_weights(part).files
    if len(files) != 1:
        raise ModelError(f"{part} must hold one model.safetensors")
    return Dense(
        weights=files[0],
        in_features=int(config["in_features"]),
        out_features=int(config["out_features"]),
        has_bias=config.get("bias", True) is not False,
        activation=activation,
    )
