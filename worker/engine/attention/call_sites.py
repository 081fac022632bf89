"""Attention call sites for families that compute attention themselves instead of asking transformers' interface.

GPT-J, CodeGen and GPT-Neo do so in one method of their attention, which is replaced; Falcon does so in the middle of
its forward, which is written anew. Where no step is in progress the module's own code runs, so that the load check can
compare both. Falcon with ALiBi is left alone: a back-end knows no bias by distance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import torch
from transformers import PreTrainedModel

# `_attention_forward` of hf.py: (module, query, key, value, mask, scaling=..., sliding_window=...), as transformers'
# interface has it; None outside of a step.
AttentionFunction = Callable[..., tuple[torch.Tensor, None]]
CurrentAttention = Callable[[], AttentionFunction | None]


def adapt(model: PreTrainedModel, current: CurrentAttention) -> bool:
    """Let a model of these families call `current()`; return whether it is one. May be repeated."""
    adapter = _ADAPTERS.get(model.config.model_type)
    if adapter is None or getattr(model.config, "alibi", False):
        return False
    class_name, adapt_module = adapter
    for module in model.modules():
        if type(module).__name__ == class_name:
            adapt_module(module, current)
    return True


def _adapt_method(attention: Any, current: CurrentAttention) -> None:
    attention._attn = partial(_method, attention, current)


def _adapt_gpt_neo(attention: Any, current: CurrentAttention) -> None:
    attention.layer_idx = attention.layer_id
    _adapt_method(attention, current)


def _adapt_falcon(attention: Any, current: CurrentAttention) -> None:
    attention.forward = partial(_falcon, attention, current)


def _method(
    attention: Any,
    current: CurrentAttention,
    query: torch.Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`_attn` of GPT-J, CodeGen and GPT-Neo; returns [1, num_heads, num_tokens, head_dim]."""
    attend = current()
    if attend is None:
        result: tuple[torch.Tensor, torch.Tensor] = type(attention)._attn(attention, query, key, value, attention_mask)
        return result
    is_local = getattr(attention, "attention_type", None) == "local"
    output, _ = attend(
        attention,
        query.to(value.dtype),  # CodeGen turns queries and keys in float32
        key.to(value.dtype),
        value,
        None,
        scaling=1.0 / getattr(attention, "scale_attn", 1.0),  # GPT-Neo does not scale
        sliding_window=attention.config.window_size if is_local else None,
    )
    return output.transpose(1, 2), None


def _falcon(
    attention: Any,
    current: CurrentAttention,
    hidden_states: torch.Tensor,  # [1, num_tokens, hidden_size]
    alibi: torch.Tensor | None,
    *args: Any,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`FalconAttention.forward`, with keys and values of their own heads where that repeats them for each query's."""
    attend = current()
    if attend is None:
        result: tuple[torch.Tensor, torch.Tensor] = type(attention).forward(
            attention, hidden_states, alibi, *args, position_embeddings=position_embeddings, **kwargs
        )
        return result
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    fused = attention.query_key_value(hidden_states)
    if attention.new_decoder_architecture:
        group = attention.num_heads // attention.num_kv_heads
        fused = fused.view(*fused.shape[:2], -1, group + 2, attention.head_dim)
        query, key, value = fused[:, :, :, :-2].flatten(2, 3), fused[:, :, :, -2], fused[:, :, :, -1]
    else:
        query, key, value = attention._split_heads(fused)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    assert position_embeddings is not None, "without ALiBi the positions are rotary"
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)  # type: ignore[no-untyped-call]
    output, _ = attend(attention, query, key, value, None, scaling=attention.head_dim**-0.5)
    return attention.dense(output.flatten(2)), None


_ADAPTERS: Final[Mapping[str, tuple[str, Callable[[Any, CurrentAttention], None]]]] = {
    "codegen": ("CodeGenAttention", _adapt_method),
    "falcon": ("FalconAttention", _adapt_falcon),
    "gpt_neo": ("GPTNeoSelfAttention", _adapt_gpt_neo),
    "gptj": ("GPTJAttention", _adapt_method),
}
