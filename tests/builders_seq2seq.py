"""Tiny random encoder-decoder models of each family that is served, and transformers' own answers of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

from tests.builders_models import VOCAB_SIZE, write_tokenizer

PAD: Final = 0
BOS: Final = 1
EOS: Final = 2
START: Final = 3  # what the decoder begins with

_COMMON: Final = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "decoder_start_token_id": START,
    "forced_eos_token_id": None,
}
_BART_LIKE: Final = {
    **_COMMON,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,  # or the decoder says its last token again
}
FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "t5": {
        **_COMMON,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 3,
        "num_decoder_layers": 2,  # transformers cannot generate where these are more
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,  # so that tests reach beyond it
    },
    "bart": _BART_LIKE,
    "marian": {**_BART_LIKE, "scale_embedding": True},
    "mbart": _BART_LIKE,
    "m2m_100": {**_BART_LIKE, "scale_embedding": True},
}


# Attention is to look at single tokens, or outputs would hardly depend on where they stand.
_STD: Final = {
    "relative_attention_bias": 0.6,
    ".q.": 0.1,
    ".k.": 0.1,  # T5 does not scale scores
    "q_proj": 0.3,
    "k_proj": 0.3,
    "v_proj": 0.15,
    "out_proj": 0.15,
}


_SEEDS: Final = {"t5": 1, "marian": 2}  # of models that do not say the same again and again


def tiny_seq2seq_config(family: str, **changes: Any) -> PretrainedConfig:
    """The family's configuration at 64 dimensions, 2 encoder and 3 decoder layers."""
    return AutoConfig.for_model(family, **{**FAMILIES[family], **changes})


@torch.no_grad()
def tiny_seq2seq(
    family: str, *, seed: int | None = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A random model whose outputs depend on the source and on every position, and end here and there."""
    torch.manual_seed(_SEEDS.get(family, 0) if seed is None else seed)
    config = tiny_seq2seq_config(family, **changes)
    module: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager", dtype=dtype)
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2 and parameter.requires_grad:
            std = next((std for part, std in _STD.items() if part in name), 0.2)
            torch.nn.init.normal_(parameter, std=std)
            if name in ("lm_head.weight", "shared.weight"):
                parameter[EOS] *= 1.8
    bias = getattr(module, "final_logits_bias", None)
    if bias is not None:
        bias.normal_(std=0.3)
    return module.eval()


def write_tiny_seq2seq(folder: Path, family: str, *, seed: int | None = None, **changes: Any) -> Path:
    """Save a tiny model with its tokenizer, as `load_model` takes it; return the folder."""
    tiny_seq2seq(family, seed=seed, **changes).save_pretrained(folder)
    write_tokenizer(folder, chat_template=None)
    return folder


@torch.inference_mode()
def generate(
    model: PreTrainedModel, source: Sequence[int], max_tokens: int, *, prompt: Sequence[int] = (START,), **options: Any
) -> list[list[int]]:
    """transformers' outputs for one source, without what the decoder begins with and the padding behind ends."""
    ids = torch.tensor([list(source)])
    outputs = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        decoder_input_ids=torch.tensor([list(prompt)]),
        max_new_tokens=max_tokens,
        **{"do_sample": False, "num_beams": 1, **options},
    )
    found = []
    for output in outputs.tolist():
        tokens = output[len(prompt) :]
        found.append(tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens)
    return found
