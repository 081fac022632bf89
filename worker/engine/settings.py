"""Limits of the engine: what one step may compute and how much memory keys and values may take."""

from __future__ import annotations

from typing import Final, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_MOST_RECORDED_TOKENS: Final = 2048  # a larger step takes a GPU longer than its launches take the host


class EngineSettings(BaseSettings):
    """Read from TORCHRELAY_ENGINE_* variables."""

    model_config = SettingsConfigDict(env_prefix="TORCHRELAY_ENGINE_", frozen=True)

    token_budget: int | None = Field(
        default=None, gt=0, description="Most tokens computed in one step; default: what a probe at start-up chooses."
    )
    itl_target_ms: float = Field(
        default=200, gt=0, description="How long the probe lets prefills make a step in which other sequences decode."
    )
    max_step_tokens: int = Field(default=2048, gt=0, description="Most tokens that the probe may choose.")
    max_num_seqs: int = Field(default=64, gt=0, description="Most sequences in one step.")
    block_size: int = Field(default=16, gt=0, description="Token slots per KV block.")
    kv_cache_bytes: int | None = Field(
        default=None,
        gt=0,
        description="Memory for keys and values, all layers together; by default 1 GiB on a CPU, on a GPU what a "
        "warm-up leaves of gpu_memory_fraction.",
    )
    gpu_memory_fraction: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of a GPU's memory that weights, steps and KV cache may take together. Several workers on "
        "one GPU have a share each, of at most about 0.95 in all.",
    )
    num_blocks: int | None = Field(default=None, gt=0, description="KV blocks; overrides kv_cache_bytes.")
    max_model_len: int | None = Field(
        default=None, gt=1, description="Most tokens of one sequence, prompt included; at most what the model takes."
    )
    speculation: bool = Field(
        default=True, description="Guess tokens from the text so far where it pays; the output is the same."
    )
    max_draft_tokens: int = Field(default=8, gt=0, description="Most tokens guessed for one sequence in one step.")
    min_draft_ngram: int = Field(default=1, gt=0, description="Fewest tokens whose repetition gives rise to a guess.")
    max_draft_ngram: int = Field(
        default=3, gt=0, description="Most tokens looked up for a guess; the longest match wins."
    )
    max_overtakings: int = Field(
        default=8, ge=0, description="How many younger sequences with a cached prefix one that waits lets pass."
    )
    enable_prefix_cache: bool = Field(default=True, description="Reuse the blocks of equal prefixes.")

    @model_validator(mode="after")
    def _every_decode_fits(self) -> Self:
        name = "max_step_tokens" if self.token_budget is None else "token_budget"
        if self.most_step_tokens < self.max_num_seqs:
            raise ValueError(
                f"{name} ({self.most_step_tokens}) must be at least max_num_seqs ({self.max_num_seqs}), "
                "or decodes would starve"
            )
        return self

    @model_validator(mode="after")
    def _some_ngram_is_looked_up(self) -> Self:
        if self.max_draft_ngram < self.min_draft_ngram:
            raise ValueError(
                f"max_draft_ngram ({self.max_draft_ngram}) must be at least min_draft_ngram ({self.min_draft_ngram})"
            )
        return self

    @property
    def most_step_tokens(self) -> int:
        """Tokens of the largest step there can be."""
        return self.max_step_tokens if self.token_budget is None else self.token_budget

    @property
    def most_recorded_tokens(self) -> int:
        """Tokens of the largest step that is recorded as a CUDA graph."""
        return min(self.most_step_tokens, _MOST_RECORDED_TOKENS)
