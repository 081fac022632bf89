"""A model directory is foreign input: which of its files are read, how much of each, and what none of them may ask for.

Every file that we, or a library on our behalf, could open is checked before any is opened: it is a regular file of a
bounded size that lies in the directory. Weights have no bound of their own; see `safetensors_header`.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from common.registry import MAX_FILE_BYTES, MAX_TEMPLATE_BYTES

_MIB: Final = 1 << 20

SLOW_TOKENIZERS: Final = (
    *("*.model", "vocab.json", "target_vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "*.tiktoken", "*.spm"),
)
WEIGHTS: Final = "*.safetensors"
WEIGHTS_INDEX: Final = "model.safetensors.index.json"

# Most bytes of each file; the largest public ones are about half of that or less. The first pattern that fits counts.
_MAX_BYTES: Final[Mapping[str, int]] = {
    "*.safetensors.index.json": 64 * _MIB,
    "tokenizer.json": MAX_FILE_BYTES,
    "tokenizer_config.json": 16 * _MIB,
    "added_tokens.json": 16 * _MIB,
    "special_tokens_map.json": 4 * _MIB,
    "config.json": 4 * _MIB,
    "generation_config.json": 1 * _MIB,
    "modules.json": 1 * _MIB,
    "sentence_bert_config.json": 1 * _MIB,
    "adapter_config.json": 1 * _MIB,
    "quantize_config.json": 4 * _MIB,
    "quant_config.json": 4 * _MIB,
    "hf_quant_config.json": 4 * _MIB,
    "chat_template.jinja": MAX_TEMPLATE_BYTES,
    "chat_template.json": 2 * MAX_TEMPLATE_BYTES,  # its text is escaped there
    **dict.fromkeys(SLOW_TOKENIZERS, MAX_FILE_BYTES),
}
_MAX_DEPTH: Final = 32
_MAX_EXPERTS: Final = 1 << 16
_LAYER_COUNTS: Final = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "attention_types")
_EXPERT_COUNTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "moe_num_experts")


class ModelError(Exception):
    """A model cannot be served; the message names it, says why, and what to do."""


def check_files(folder: Path, within: Path | None = None) -> None:
    """Check every file of a directory that loading could open.

    Raises ModelError for one that is no regular file, is too large, or is a link that leaves the directory, or the one
    `within` which that lies. Links of the Hub's cache lead from snapshots/COMMIT to blobs/, which belongs to the same
    model.
    """
    roots = [(within or folder).resolve()]
    if within is not None and not folder.resolve().is_relative_to(roots[0]):
        raise ModelError(f"{folder} is a link to outside of the model's directory; put the directory itself there")
    if roots[0].parent.name == "snapshots":
        roots.append((roots[0].parent.parent / "blobs").resolve())
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error}") from error
    for name in names:
        if fnmatchcase(name, WEIGHTS) or limit_of(name) is not None:
            _check_file(folder / name, roots)


def limit_of(name: str) -> int | None:
    """Return the most bytes of a file by its name; None for one that is not read."""
    return next((limit for pattern, limit in _MAX_BYTES.items() if fnmatchcase(name, pattern)), None)


def _check_file(path: Path, roots: list[Path]) -> None:
    try:
        target = path.resolve(strict=True)
        status = target.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise ModelError(f"{path} cannot be read: {error}; the download may be incomplete") from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{path} is not a regular file")
    if not any(target.is_relative_to(root) for root in roots):
        raise ModelError(f"{path} is a link to {target}, outside of the model's directory; put the file itself there")
    limit = limit_of(path.name)
    if limit is not None and status.st_size > limit:
        raise ModelError(f"{path} has {status.st_size} bytes; at most {limit} are read of such a file")


def read_limited(path: Path) -> bytes:
    """Return a file's content. Raises ModelError for one over its limit, OSError."""
    limit = limit_of(path.name)
    assert limit is not None, f"{path.name} is not among the files that are read"
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ModelError(f"{path} has over {limit} bytes; no more are read of such a file")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file, or {} if the file does not exist. Raises ModelError for anything else."""
    try:
        value = json.loads(read_limited(path))
    except FileNotFoundError:
        return {}
    except RecursionError:
        raise ModelError(f"{path} is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    if any(depth > _MAX_DEPTH for depth, _, _ in _walk(value)):
        raise ModelError(f"{path} is nested over {_MAX_DEPTH} deep")
    return value


def _walk(value: object) -> Iterator[tuple[int, str, Any]]:
    """Yield (depth, key, value) of all that stands in a JSON value; what stands in a list has the list's key."""
    waiting: list[tuple[int, str, Any]] = [(1, "", value)]
    while waiting:
        depth, key, item = waiting.pop()
        yield depth, key, item
        if isinstance(item, dict):
            waiting += [(depth + 1, name, entry) for name, entry in item.items()]
        elif isinstance(item, list):
            waiting += [(depth + 1, key, entry) for entry in item]


def refuse_remote_code(path: Path, value: Mapping[str, Any], *, has_own: bool) -> None:
    """Raise ModelError where a configuration needs code that comes with the model, or asks to trust it.

    Such code never runs. With `has_own`, what it would do is there without it, and naming it at the top is harmless: as
    many models of the Hub do, since they are older than their family in transformers.
    """
    for depth, key, entry in _walk(value):
        if not entry or key not in ("auto_map", "trust_remote_code"):
            continue
        if key == "auto_map" and depth == 2 and has_own:
            continue
        raise ModelError(
            f"{path} asks for code that comes with the model (the key {key}), and such code is never run; where "
            "transformers has the family itself, remove the key from a copy of the directory and name the copy"
        )


def refuse_other_files(path: Path, value: Mapping[str, Any]) -> None:
    """Raise ModelError where a configuration names files to be read in the place of those that were checked."""
    for key in ("configuration_files", "transformers_weights"):
        if value.get(key):
            raise ModelError(f"{path} names other files to load (the key {key}); remove the key, and rename the files")


def check_counts(path: Path, config: Mapping[str, Any], num_tensors: int) -> None:
    """Raise ModelError for numbers by which building the model would never end: each layer has tensors in the files."""
    for _, key, entry in _walk(config):
        if not isinstance(entry, int) or isinstance(entry, bool):
            continue
        if key in _LAYER_COUNTS and entry > num_tensors:
            raise ModelError(f"{path} names {entry} layers ({key}), but the files hold {num_tensors} tensors")
        if key in _EXPERT_COUNTS and entry > _MAX_EXPERTS:
            raise ModelError(f"{path} names {entry} experts ({key}); at most {_MAX_EXPERTS} are taken")
