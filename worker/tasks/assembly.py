"""Builds the engine of an encoder model, and the card that tells others of it."""

from __future__ import annotations

from typing import Final

import torch

from common import keys
from common.registry import EncoderCard, GenerationDefaults, ModelCard
from worker.engine.settings import EngineSettings
from worker.registration import Publication, check_name, digests_of, published_files
from worker.tasks.engine import TaskEngine
from worker.tasks.facts import Head
from worker.tasks.loading import LoadedEncoder

_CAPACITY: Final = 1 << 20  # tokens of all requests that a worker holds: 2,048 texts of 512
_GPU_FACTOR: Final = 8  # a GPU takes larger batches than a CPU before it is busy


def make_engine(loaded: LoadedEncoder, settings: EngineSettings, device: torch.device) -> TaskEngine:
    """Return what answers requests with a loaded model."""
    budget = settings.token_budget or settings.max_step_tokens * (_GPU_FACTOR if device.type == "cuda" else 1)
    return TaskEngine(
        loaded.module,
        loaded.facts,
        vocab_size=loaded.vocab_size,
        max_tokens=loaded.max_tokens,
        token_budget=budget,
        capacity=_CAPACITY,
    )


def make_encoder_card(loaded: LoadedEncoder, name: str, max_sequences: int = 0) -> Publication:
    """Return what to publish of `loaded` under `name`. Raises ModelError for what nobody could use."""
    check_name(name)
    files = published_files(name, loaded.text)
    facts = loaded.facts
    card = ModelCard(
        name=name,
        revision=loaded.revision,
        shard=keys.shard_name(name, loaded.revision),
        tasks=tuple(map(str, facts.tasks)),
        family=loaded.family,
        num_parameters=loaded.num_parameters,
        dtype=str(loaded.dtype).removeprefix("torch."),
        weight_format=str(loaded.dtype).removeprefix("torch."),
        weight_bytes=loaded.weight_bytes,
        vocab_size=loaded.vocab_size,
        context_tokens=loaded.max_tokens,
        max_output_tokens=0,
        defaults=GenerationDefaults(),
        block_tokens=1,
        kv_tokens=_CAPACITY,
        max_sequences=max_sequences,
        tokenizer_files=digests_of(files),
        encoder=EncoderCard(
            labels=facts.labels,
            embedding_dimensions=facts.dimensions if facts.head is Head.VECTOR else 0,
        ),
    )
    return Publication(card, files)
