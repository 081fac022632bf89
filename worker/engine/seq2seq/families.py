"""Which encoder-decoder families are served, and how many tokens their two sides take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from transformers import PretrainedConfig

# By transformers' model_type; NLLB and M2M100 are of one class.
FAMILIES: Final = frozenset({"bart", "m2m_100", "marian", "mbart", "t5"})

# Tokens of either side where nothing names a limit: T5 was trained with so many, and computes with any number.
_UNNAMED_LENGTH: Final = 512


def has_encoder(config: PretrainedConfig) -> bool:
    """Whether the model is an encoder and a decoder, of a family that is served or not."""
    return bool(getattr(config, "is_encoder_decoder", False))


def is_unbounded(config: PretrainedConfig) -> bool:
    """Whether the model computes with more tokens than are named: its positions are distances."""
    return config.model_type == "t5"


def most_tokens(config: PretrainedConfig) -> int | None:
    """Return how many tokens each side takes: the source, and what the decoder begins with and adds.

    None where the configuration names none though its positions are a table.
    """
    if is_unbounded(config):
        named = getattr(config, "n_positions", None)
        return named if isinstance(named, int) and named > 0 else _UNNAMED_LENGTH
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def decoder_start(generation: Mapping[str, Any], config: PretrainedConfig) -> int | None:
    """Return what the decoder begins with: of generation_config.json, else of config.json, as transformers has it.

    Without one, that is the beginning of a sequence.
    """
    for name in ("decoder_start_token_id", "bos_token_id"):
        for value in (generation.get(name), getattr(config, name, None)):
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None
