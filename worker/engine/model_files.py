"""A model's files: where they come from, what may be loaded of them, and the revision that their content is.

Nothing here runs foreign code: weights are safetensors only, never pickles, and configurations are read as JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from worker.cache import cache_dir, write_atomically
from worker.engine.demo import DemoModelError, demo_model_dir

DEMO: Final = "demo"

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SLOW_TOKENIZERS: Final = ("*.model", "vocab.*", "merges.txt", "*.tiktoken", "*.spm")
_HUB_FILES: Final = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", *_SLOW_TOKENIZERS),
)
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_MAX_JSON_BYTES: Final = 64 << 20
_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ModelError(Exception):
    """A model cannot be served; the message names it, says why, and what to do."""


@dataclass(frozen=True, slots=True)
class TextFiles:
    """What turns text into token ids and back."""

    tokenizer: Tokenizer
    tokenizer_json: bytes  # complete: the tokenizer can be built from these bytes alone
    chat_template: str | None
    special_tokens: Mapping[str, str]  # by the names that chat templates use: bos_token, eos_token ...


def find_model(source: str, revision: str | None = None) -> Path:
    """Return the directory of `source`: a directory, "demo", or a Hub id, which is downloaded.

    `revision` is a branch or commit on the Hub. Raises ModelError.
    """
    if source == DEMO:
        try:
            return demo_model_dir()
        except DemoModelError as error:
            raise ModelError(str(error)) from error
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path.resolve()
    if path.is_file() and path.suffix == ".gguf":
        raise ModelError(f"{source} is a GGUF file, and this format is not served; use the model's safetensors files")
    if path.is_file():
        raise ModelError(f"{source} is a file; name the directory that holds config.json and the safetensors files")
    if source.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(source):
        raise ModelError(f"there is no directory {source}, and it cannot be a Hub id (owner/name)")
    return _download(source, revision)


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*", "consolidated*"]
        )
    except GatedRepoError as error:
        raise ModelError(f"{hub_id} is gated: accept its licence on the Hub, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"the Hub has no model {hub_id}, or it is private: check the name, or set HF_TOKEN") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{hub_id} is not on this machine and the Hub cannot be reached; name a directory") from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{hub_id} could not be downloaded: {error}") from error
    return Path(folder)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a model, each one's header checked.

    Raises ModelError for a model without them, for an index that leaves its directory, and for a file that is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _shard_names(index)
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{folder} has its weights as {pickles[0]}: loading a pickle can run code, so only safetensors are "
                "read; convert them with transformers' save_pretrained"
            )
        _refuse_gguf(folder)
        raise ModelError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    files = tuple(folder / name for name in names)
    for file in files:
        if not file.is_file():
            raise ModelError(f"{index} names {file.name}, which is missing; the download may be incomplete")
        try:
            # Opening checks lengths, offsets and types against the file's size.
            with safe_open(file, framework="pt") as content:
                content.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is not a sound safetensors file ({error}); download it again") from error
    return files


def _shard_names(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names {name!r}; shards must be safetensors files in the same directory")
    return names


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file, or {} if the file does not exist. Raises ModelError for anything else."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path} is over {_MAX_JSON_BYTES >> 20} MiB")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return value


def check_config_file(folder: Path) -> dict[str, Any]:
    """Return config.json of a directory that holds a whole, plain model. Raises ModelError."""
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds an adapter (adapter_config.json), not a model; merge it into its base model")
    config = read_json(folder / "config.json")
    if "model_type" not in config:
        _refuse_gguf(folder)
        raise ModelError(f"{folder} has no config.json with a model_type, so it is not a transformers model")
    return config


def _refuse_gguf(folder: Path) -> None:
    """transformers reads GGUF, but may make another tokenizer of it: SmolLM2's then splits "\n\n1" differently."""
    found = sorted(file.name for file in folder.glob("*.gguf"))
    if found:
        raise ModelError(
            f"{folder} has its weights as GGUF ({found[0]}), and this format is not served; use the model's "
            "safetensors files, or convert it: from_pretrained(..., gguf_file=...) and save_pretrained of transformers"
        )


def read_text_files(folder: Path) -> TextFiles:
    """Return the tokenizer, converted where there is no tokenizer.json, and the chat template. Raises ModelError."""
    settings = read_json(folder / "tokenizer_config.json")
    path = folder / "tokenizer.json"
    try:
        content = path.read_bytes() if path.is_file() else _converted_tokenizer(folder)
        tokenizer = Tokenizer.from_buffer(content)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path} cannot be loaded: {error}") from error
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        # Left over from training; a prompt must arrive whole and alone.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        content = tokenizer.to_str().encode()
    named = {**read_json(folder / "special_tokens_map.json"), **settings}
    special = {name: _token_text(named[name]) for name in _SPECIAL_TOKENS if named.get(name)}
    return TextFiles(tokenizer, content, _chat_template(folder, settings), special)


def _converted_tokenizer(folder: Path) -> bytes:
    from transformers import AutoTokenizer

    advice = "save a fast tokenizer into it with transformers' save_pretrained"
    if not any(file for pattern in _SLOW_TOKENIZERS for file in folder.glob(pattern)):
        # transformers would make an empty tokenizer of nothing for some families.
        raise ModelError(f"{folder} has no tokenizer.json, nor files to make one of; {advice}")
    try:
        slow = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{folder} has no tokenizer.json and none can be made: {error}; {advice}") from error
    backend = getattr(slow, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{folder} has no tokenizer.json and {type(slow).__name__} has no fast form; {advice}")
    content: str = backend.to_str()
    return content.encode()


def _token_text(token: Any) -> str:
    """Special tokens stand as text or as {"content": text, ...}."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_json(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template if template is None else str(template)


def revision_of(folder: Path, weights: tuple[Path, ...], text: TextFiles, cache_root: Path | None = None) -> str:
    """Return the SHA-256, in hex, of what decides the model's answers: weights, tokenizer, configurations."""
    digest = hashlib.sha256()
    for file in (*weights, folder / "config.json", folder / "generation_config.json"):
        if file.is_file():
            digest.update(f"{file.name} {file_digest(file, cache_root)}\n".encode())
    for name, content in (("tokenizer", text.tokenizer_json), ("template", (text.chat_template or "").encode())):
        digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    digest.update(json.dumps(dict(text.special_tokens), sort_keys=True).encode())
    return digest.hexdigest()


def file_digest(path: Path, cache_root: Path | None = None) -> str:
    """Return the SHA-256 of a file, in hex; remembered by path, size and time of change, since weights are large."""
    path = path.resolve()
    status = path.stat()
    key = hashlib.sha256(f"{path}\n{status.st_size}\n{status.st_mtime_ns}\n{status.st_ino}".encode()).hexdigest()
    remembered = cache_dir("digests", root=cache_root) / key
    try:
        known = remembered.read_text()
    except FileNotFoundError:
        known = ""
    if len(known) == hashlib.sha256().digest_size * 2:
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    write_atomically(remembered, digest.encode())
    return digest
