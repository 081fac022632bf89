"""Publishes a model: what a worker does before it takes jobs, and `torchrelay models register` does alone."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from common.errors import ServingError
from common.redis import Retry, connect
from common.registry import ModelCard, ModelRegistry
from common.settings import RedisSettings
from common.startup import read_settings
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from worker.engine.adapters.files import LinearShape
    from worker.registration import Publication

log = structlog.get_logger()

_RETRY_S: Final = 1.0


async def publish(registry: ModelRegistry, card: ModelCard, files: Mapping[str, bytes]) -> None:
    """Register a model, however long the server stays away. Raises ServingError where it refuses."""
    while True:
        try:
            await registry.publish(card, files)
            return
        except ServingError as error:
            if error.retry_after_ms is None:
                raise
            log.warning("registry.unavailable", reason=error.reason)
            await asyncio.sleep(_RETRY_S)


def register_model(*, as_json: bool, adapters: Sequence[str] = ()) -> int:
    """Publish the model of the environment's settings without its weights; return the exit status.

    `adapters` are NAME=DIR each, besides those of the settings' folder; one that cannot be served is refused. They are
    held to all linear layers of the model. A worker that starts publishes those of its own folder instead.
    """
    settings, redis_settings = read_settings(lambda: (WorkerSettings(), RedisSettings()), WorkerSettings)
    from worker.adapters import read_cards, whole_folders  # imports torch
    from worker.engine.adapters.files import AdapterError, AdapterLimits
    from worker.engine.model import ModelError

    try:
        (card, files), linear_layers = _describe(settings)
        if settings.adapters_dir:
            adapters = (*whole_folders(Path(settings.adapters_dir)), *adapters)
        if linear_layers is None and adapters:
            raise AdapterError("adapters are only for models that generate text")
        if linear_layers is not None:
            limits = AdapterLimits(settings.max_adapter_rank, settings.adapter_bytes)
            card = msgspec.structs.replace(card, adapters=read_cards(adapters, linear_layers, limits))
    except (ModelError, AdapterError) as error:
        log.error("model.refused", error=str(error))
        return 1

    async def run() -> None:
        redis = connect(redis_settings)
        try:
            await ModelRegistry(redis, retry=Retry.from_settings(redis_settings)).publish(card, files)
        finally:
            await redis.aclose()

    try:
        asyncio.run(run())
    except ServingError as error:
        log.error("registry.unavailable", reason=error.reason, url=redis_settings.url)
        return 1
    if as_json:
        names = [adapter.name for adapter in card.adapters]
        found = {"name": card.name, "revision": card.revision, "shard": card.shard, "adapters": names}
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        adapted = "".join(f" {card.name}:{adapter.name}" for adapter in card.adapters)
        sys.stderr.write(f"registered {card.name} {card.revision[:12]}{adapted}\n")
    return 0


def _describe(settings: WorkerSettings) -> tuple[Publication, Mapping[str, LinearShape] | None]:
    """Return what is published of a model, and its linear layers where it generates text. Raises ModelError."""
    from worker.assembly import default_name  # imports torch
    from worker.engine.device import choose_device, choose_dtype
    from worker.engine.model import load_model
    from worker.registration import make_card
    from worker.structured import make_compiler
    from worker.tasks.assembly import make_encoder_card
    from worker.tasks.loading import find_head, load_encoder

    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    name = settings.model_name or default_name(settings.model)
    head = find_head(settings.model, settings.revision)
    if head is not None:
        encoder = load_encoder(settings.model, head, dtype, device, settings.revision, with_weights=False)
        return make_encoder_card(encoder, name), None
    loaded = load_model(settings.model, dtype, device, settings.revision, with_weights=False)
    # How much a worker can hold is known once one has started; until then the model's own limit holds.
    limit = loaded.context_length
    grammars = make_compiler(loaded.text.tokenizer_json, loaded.vocab_size, loaded.eos_token_ids)
    publication = make_card(
        loaded,
        name=name,
        context_tokens=limit,
        block_tokens=16,
        kv_tokens=limit + -(-loaded.max_source_tokens // 16) * 16,
        tool_format=settings.tool_format,
        reasoning_format=settings.reasoning_format,
        structured_output=grammars is not None,
        tasks=settings.tasks,
    )
    return publication, loaded.linear_layers
