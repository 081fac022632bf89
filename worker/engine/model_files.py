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

from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING

from common.registry import MAX_TEMPLATE_BYTES
from worker.cache import cache_dir, write_atomically
from worker.engine import model_dir, sentencepiece_files
from worker.engine.demo import DemoModelError, demo_model_dir
from worker.engine.model_dir import SLOW_TOKENIZERS, WEIGHTS_INDEX, ModelError, read_json
from worker.engine.safetensors_header import Header, HeaderError, read_header

__all__ = ["DEMO", "ModelError", "TextFiles", "Weights", "find_model", "read_json"]

DEMO: Final = "demo"

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_FILES: Final = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", *SLOW_TOKENIZERS),
    *("modules.json", "sentence_bert_config.json", "[0-9]_*/config.json"),  # of sentence-transformers
)
_HUB_CONFIGS: Final = ("config.json", "tokenizer_config.json", "adapter_config.json")
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_OTHER_FORMATS: Final = ("*.h5", "*.msgpack", "*.onnx", "*.npz", "*.tflite")
_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TextFiles:
    """What turns text into token ids and back."""

    tokenizer: Tokenizer
    tokenizer_json: bytes  # complete: the tokenizer can be built from these bytes alone
    chat_template: str | None
    special_tokens: Mapping[str, str]  # by the names that chat templates use: bos_token, eos_token ...
    source_tokenizer_json: bytes | None = None  # of what an encoder reads, where it is not the one of what is written


@dataclass(frozen=True, slots=True)
class Weights:
    """The safetensors files of a model, each header checked."""

    headers: Mapping[Path, Header]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.headers)

    @property
    def num_tensors(self) -> int:
        return sum(len(header.tensors) for header in self.headers.values())

    @property
    def num_elements(self) -> int:
        return sum(entry.num_elements for header in self.headers.values() for entry in header.tensors.values())


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
        # What is refused by its configuration is refused before gigabytes are fetched.
        for patterns in (_HUB_CONFIGS, _HUB_FILES):
            folder = snapshot_download(
                hub_id, revision=revision, allow_patterns=list(patterns), ignore_patterns=["[!0-9]*/*", "consolidated*"]
            )
            check_config_file(Path(folder))
    except GatedRepoError as error:
        raise ModelError(f"{hub_id} is gated: accept its licence on the Hub, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"the Hub has no model {hub_id}, or it is private: check the name, or set HF_TOKEN") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{hub_id} is not on this machine and the Hub cannot be reached; name a directory") from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{hub_id} could not be downloaded: {error}") from error
    return Path(folder)


def read_weights(folder: Path) -> Weights:
    """Return the safetensors files of a model, each one's header checked.

    Raises ModelError for a model without them, for an index that leaves its directory, and for a file that is damaged.
    """
    index = folder / WEIGHTS_INDEX
    # In transformers' order: what is checked here must be what is loaded.
    if (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif index.is_file():
        names = _shard_names(index)
    else:
        _refuse_pickles(folder)
        _refuse_gguf(folder)
        raise ModelError(f"{folder} has neither model.safetensors nor {WEIGHTS_INDEX}")
    headers: dict[Path, Header] = {}
    for file in (folder / name for name in names):
        if not file.is_file():
            raise ModelError(f"{index} names {file.name}, which is missing; the download may be incomplete")
        try:
            headers[file] = read_header(file)
        except (HeaderError, OSError) as error:
            raise ModelError(f"{file} is not a sound safetensors file ({error}); download it again") from error
    return Weights(headers)


def _refuse_pickles(folder: Path) -> None:
    advice = "convert them with transformers' save_pretrained"
    for patterns, reason in (
        (_PICKLES, "loading a pickle can run code, so only safetensors are read"),
        (_OTHER_FORMATS, "only safetensors are read"),
    ):
        found = sorted(file.name for pattern in patterns for file in folder.glob(pattern))
        if found:
            raise ModelError(f"{folder} has its weights as {found[0]}: {reason}; {advice}")


def _shard_names(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise ModelError(f"{index} has no file name for {tensor}")
        if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names {name!r}; shards must be safetensors files in the same directory")
    return sorted(set(weight_map.values()))


def check_config_file(folder: Path) -> dict[str, Any]:
    """Return config.json of a directory that holds a whole model, whose files may be opened. Raises ModelError."""
    model_dir.check_files(folder)
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds an adapter (adapter_config.json), not a model; merge it into its base model")
    config = read_json(folder / "config.json")
    if "model_type" not in config:
        _refuse_gguf(folder)
        raise ModelError(f"{folder} has no config.json with a model_type, so it is not a transformers model")
    if not isinstance(config["model_type"], str):
        raise ModelError(f"{folder / 'config.json'}: model_type is not a text")
    has_own = config["model_type"] in CONFIG_MAPPING
    model_dir.refuse_remote_code(folder / "config.json", config, has_own=has_own)
    model_dir.refuse_other_files(folder / "config.json", config)
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
    model_dir.refuse_remote_code(folder / "tokenizer_config.json", settings, has_own=path.is_file())
    source: bytes | None = None
    if path.is_file():
        content = model_dir.read_limited(path)
    else:
        content, source = _converted_tokenizer(folder, settings)
    tokenizer = _parse_tokenizer(path, content)
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        # Left over from training; a prompt must arrive whole and alone.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        content = tokenizer.to_str().encode()
    named = {**read_json(folder / "special_tokens_map.json"), **settings}
    special = {name: _token_text(folder, name, named[name]) for name in _SPECIAL_TOKENS if named.get(name)}
    return TextFiles(tokenizer, content, _chat_template(folder, settings), special, source)


def _parse_tokenizer(path: Path, content: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(content)
    except BaseException as error:
        # A panic in the library is no Exception; its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{path} cannot be loaded: {error}") from error


def _converted_tokenizer(folder: Path, settings: Mapping[str, Any]) -> tuple[bytes, bytes | None]:
    """Return a tokenizer made of other files, and the one of what an encoder reads where that is another."""
    from transformers import AutoTokenizer

    for key, value in settings.items():
        if key.endswith("_file") and isinstance(value, str) and Path(value).name != value:
            raise ModelError(
                f"{folder / 'tokenizer_config.json'} names a file elsewhere, {value!r}; remove the key {key}"
            )
    advice = "save a fast tokenizer into it with transformers' save_pretrained"
    if not any(file for pattern in SLOW_TOKENIZERS for file in folder.glob(pattern)):
        # transformers would make an empty tokenizer of nothing for some families.
        raise ModelError(f"{folder} has no tokenizer.json, nor files to make one of; {advice}")
    made = sentencepiece_files.convert(folder, settings, str(read_json(folder / "config.json").get("model_type")))
    if made is not None:
        return made.tokenizer.to_str().encode(), None if made.source is None else made.source.to_str().encode()
    try:
        slow = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{folder} has no tokenizer.json and none can be made: {error}; {advice}") from error
    backend = getattr(slow, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{folder} has no tokenizer.json and {type(slow).__name__} has no fast form; {advice}")
    content: str = backend.to_str()
    return content.encode(), None


def _token_text(folder: Path, name: str, token: object) -> str:
    """Special tokens stand as text or as {"content": text, ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ModelError(f"{folder}: {name} of the tokenizer's configuration is not a text")
    if not _is_unicode(text):
        raise ModelError(f"{folder}: {name} of the tokenizer's configuration holds half a character (a lone surrogate)")
    return text


def _is_unicode(text: str) -> bool:
    """JSON can write halves of a surrogate pair, which no encoding takes."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    template: Any = None
    if file.is_file():
        try:
            template = model_dir.read_limited(file).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file} cannot be read as UTF-8: {error}") from error
    else:
        template = read_json(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if template is None:
        return None
    if not isinstance(template, str):
        raise ModelError(f"{folder}: the chat template is not a text")
    if not _is_unicode(template):
        raise ModelError(f"{folder}: the chat template holds half a character (a lone surrogate)")
    if len(template.encode()) > MAX_TEMPLATE_BYTES:
        raise ModelError(f"{folder}: the chat template has over {MAX_TEMPLATE_BYTES} bytes")
    return template


def revision_of(folder: Path, weights: tuple[Path, ...], text: TextFiles, cache_root: Path | None = None) -> str:
    """Return the SHA-256, in hex, of what decides the model's answers: weights, tokenizer, configurations."""
    digest = hashlib.sha256()
    for file in (*weights, folder / "config.json", folder / "generation_config.json"):
        if file.is_file():
            digest.update(f"{file.name} {file_digest(file, cache_root)}\n".encode())
    for name, content in (("tokenizer", text.tokenizer_json), ("template", (text.chat_template or "").encode())):
        digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    if text.source_tokenizer_json is not None:
        digest.update(f"source {hashlib.sha256(text.source_tokenizer_json).hexdigest()}\n".encode())
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
