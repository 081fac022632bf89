"""What a worker publishes of its model: the card in the registry, and the files that gateways tokenize with."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from common import keys
from common.chat_formats import detect_reasoning_format, detect_tool_format
from common.registry import (
    MAX_FILE_BYTES,
    SOURCE_TOKENIZER_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    GenerationDefaults,
    ModelCard,
    Seq2SeqCard,
)
from common.tasks import TaskName
from worker.engine.model_files import ModelError, TextFiles
from worker.seq2seq import choose_tasks, read_seq2seq

if TYPE_CHECKING:
    from worker.engine.model import LoadedModel

_MAX_NAME_LENGTH: Final = 200
_NAME: Final = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)


class Publication(NamedTuple):
    """A card and the files that it names."""

    card: ModelCard
    files: dict[str, bytes]


def make_card(
    loaded: LoadedModel,
    *,
    name: str,
    context_tokens: int,
    block_tokens: int,
    kv_tokens: int,
    max_sequences: int = 0,
    attention_backend: str = "",
    tool_format: str = "auto",
    reasoning_format: str = "auto",
    structured_output: bool = False,
    tasks: str = "",
) -> Publication:
    """Return what to publish of `loaded` under `name`.

    `context_tokens` is the engine's limit on one sequence, `kv_tokens` the room of its KV cache; the card's context is
    the least of both and of what the model takes. `max_sequences` is how many it decodes together. The formats are
    names of `common.chat_formats`, "auto" what the chat template tells, "none" none. `tasks` are those of an
    encoder-decoder model, between commas; empty: what its files tell. Raises ModelError for a name or a file that
    nobody could use.
    """
    check_name(name)
    context_tokens = min(loaded.context_length, kv_tokens, context_tokens)
    if context_tokens < 2:
        raise ModelError(f"{name} could hold {context_tokens} tokens; prompt and answer need 2: enlarge the KV cache")
    seq2seq: Seq2SeqCard | None = None
    names: tuple[TaskName, ...] = (TaskName.GENERATE,)
    if loaded.is_encoder_decoder:
        room = (kv_tokens // block_tokens - 1) * block_tokens  # a block at least is the decoder's
        seq2seq, own = read_seq2seq(loaded, min(loaded.max_source_tokens, room))
        names = choose_tasks(tasks, own)
    elif tasks:
        raise ModelError(f"{name} is no encoder-decoder model, and only of one tasks can be set")
    files = published_files(name, loaded.text)
    max_output_tokens = context_tokens - 1  # a prompt has at least one token
    card = ModelCard(
        name=name,
        revision=loaded.revision,
        shard=keys.shard_name(name, loaded.revision),
        tasks=names,
        family=loaded.family,
        num_parameters=loaded.num_parameters,
        dtype=str(loaded.dtype).removeprefix("torch."),
        weight_format=loaded.weight_format,
        weight_bytes=loaded.weight_bytes,
        attention_backend=attention_backend,
        vocab_size=loaded.vocab_size,
        context_tokens=context_tokens,
        max_output_tokens=max_output_tokens,
        eos_token_ids=loaded.eos_token_ids,
        bos_token_id=_bos_token_id(loaded),
        defaults=_defaults(loaded.generation_defaults, max_output_tokens),
        has_chat_template=TEMPLATE_FILE in files,
        tool_format=_format(tool_format, loaded, detect_tool_format),
        reasoning_format=_format(reasoning_format, loaded, detect_reasoning_format),
        block_tokens=block_tokens,
        kv_tokens=kv_tokens,
        max_sequences=max_sequences,
        tokenizer_files=digests_of(files),
        structured_output=structured_output,
        seq2seq=seq2seq,
    )
    return Publication(card, files)


def check_name(name: str) -> None:
    """Raise ModelError for a name that cannot be a model's."""
    if not _NAME.fullmatch(name) or len(name) > _MAX_NAME_LENGTH:
        raise ModelError(
            f"{name!r} cannot be a model name: it takes up to {_MAX_NAME_LENGTH} of A-Z a-z 0-9 . _ / - and begins "
            "with a letter or digit"
        )


def published_files(name: str, text: TextFiles) -> dict[str, bytes]:
    """Return what gateways tokenize with, by the names of `common.registry`. Raises ModelError if it is too large."""
    files = {
        TOKENIZER_FILE: text.tokenizer_json,
        SPECIAL_TOKENS_FILE: msgspec.json.encode(dict(text.special_tokens), order="sorted"),
    }
    if text.source_tokenizer_json is not None:
        files[SOURCE_TOKENIZER_FILE] = text.source_tokenizer_json
    if text.chat_template is not None:
        files[TEMPLATE_FILE] = text.chat_template.encode()
    for file, content in files.items():
        if len(content) > MAX_FILE_BYTES:
            raise ModelError(f"{name}: {file} has {len(content)} bytes; the registry takes {MAX_FILE_BYTES}")
    return files


def digests_of(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the SHA-256 of each file, in hex, as a card names them."""
    return {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}


def _format(name: str, loaded: LoadedModel, detect: Callable[[str], str]) -> str:
    """Return the name of a format, empty for none; without a chat template there are no chats."""
    template = loaded.text.chat_template
    if name == "none" or template is None:
        return ""
    return detect(template) if name == "auto" else name


def _bos_token_id(loaded: LoadedModel) -> int | None:
    token = loaded.text.special_tokens.get("bos_token")
    return None if token is None else loaded.text.tokenizer.token_to_id(token)


def _defaults(own: Mapping[str, Any], max_output_tokens: int) -> GenerationDefaults:
    """The model's own defaults; a default for max_tokens beyond what fits would make every plain request fail."""
    defaults = msgspec.convert(dict(own), GenerationDefaults)
    if defaults.max_tokens is not None and defaults.max_tokens > max_output_tokens:
        defaults = msgspec.structs.replace(defaults, max_tokens=max_output_tokens)
    return defaults
