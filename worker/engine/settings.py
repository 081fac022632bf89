"""Limits of the engine: what one step may compute and how much memory keys and values may take."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class EngineSettings(BaseSettings):
    """Read from TORCHRELAY_ENGINE_* variables."""

    model_config = SettingsConfigDict(env_prefix="TORCHRELAY_ENGINE_", frozen=True)

    token_budget: int = Field(default=512, gt=0, description="Most tokens computed in one step.")
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
        description="Share of a GPU's memory that weights, steps and KV cache may take together.",
    )
    num_blocks: int | None = Field(default=None, gt=0, description="KV blocks; overrides kv_cache_bytes.")
    max_model_len: int | None = Field(
        default=None, gt=1, description="Most tokens of one sequence, prompt included; at most what the model takes."
    )
    enable_prefix_cache: bool = Field(default=True, description="Reuse the blocks of equal prefixes.")

    @model_validator(mode="after")
    def _every_decode_fits(self) -> Self:
        if self.token_budget < self.max_num_seqs:
            raise ValueError(
                f"token_budget ({self.token_budget}) must be at least max_num_seqs ({self.max_num_seqs}), "
                "or decodes would starve"
            )
        return self
