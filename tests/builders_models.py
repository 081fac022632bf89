"""Tiny random models of many families, as modules and as directories that load like downloaded ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB_SIZE = 288  # 256 bytes, three control tokens, and some ids that no text gives

_SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2_LIKE = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}
_SLIDING = {"sliding_window": 8, "head_dim": 16}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_DEEPSEEK = {
    **_MLA,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}

RIGHT_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": _GPT2_LIKE,
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": _SLIDING,
    "gemma": {"head_dim": 16},
    "gemma2": {**_SLIDING, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 16},
    "phi": {},
    "phi3": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {},
    "starcoder2": {},
    "cohere": {},
    "cohere2": _SLIDING,
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "granite": {},
    "smollm3": {},
    "stablelm": {},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "ministral3": {},
    "exaone4": {},
    "mixtral": {"num_local_experts": 4, "head_dim": 16},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_MOE, "head_dim": 16},
    "gpt_oss": {**_SLIDING, "num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt_bigcode": _GPT2_LIKE,
    "nemotron": {},
    "persimmon": {},
    "seed_oss": {},
    "biogpt": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "minicpm3": {**_MLA, "v_head_dim": 16},
    "helium": {"head_dim": 16},
    # They have a call site of ours instead of their own attention.
    "falcon": {},
    "gptj": {**_GPT2_LIKE, "rotary_dim": 8},
    "codegen": {**_GPT2_LIKE, "rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4, "window_size": 8},
}
"""Families that a packed, paged batch answers exactly, with what their tiny form needs besides the common sizes."""

WRONG_FAMILIES: dict[str, dict[str, Any]] = {
    # They call the attention interface, and still remember tokens in another way.
    "llama4_text": {
        "num_local_experts": 2,
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "attention_chunk_size": 16,
    },
    "qwen3_next": {**_MOE, "head_dim": 16, "shared_expert_intermediate_size": 32},
    # They never call it.
    "bloom": {"n_layer": 4, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 4},
    "xglm": {"d_model": 64, "attention_heads": 4, "num_layers": 4, "ffn_dim": 96},
    "mamba": {},
    "jamba": {},
}
"""Families that would run without an error and mix the requests of a batch."""


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """The family's configuration at 4 layers and 64 dimensions."""
    special = {**RIGHT_FAMILIES, **WRONG_FAMILIES}[family]
    return AutoConfig.for_model(family, **{**_SMALL, **special, **changes})


def tiny_module(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model whose logits differ clearly from token to token (the usual initialisation is nearly flat)."""
    torch.manual_seed(seed)
    module: PreTrainedModel = AutoModelForCausalLM.from_config(
        tiny_config(family, **changes), attn_implementation="eager", dtype=dtype
    )
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return module.eval()


def write_tokenizer(
    folder: Path, *, chat_template: str | None = "{{ messages[0].content }}", ends: bool = True
) -> None:
    """Byte-level: every byte is a token (ids 3 to 258) behind <pad> 0, <bos> 1 and <eos> 2."""
    control = ["<pad>", "<bos>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*control, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(control)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "pad_token": "<pad>",
    }
    if ends:
        settings["eos_token"] = {"content": "<eos>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)


def write_tiny_model(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny model with its tokenizer, as `load_model` takes it; return the folder.

    With `eos_token_id=None` every output runs to its length: the tokenizer names no end either.
    """
    tiny_module(family, seed=seed, **changes).save_pretrained(folder)
    write_tokenizer(folder, ends=changes.get("eos_token_id", 2) is not None)
    return folder
