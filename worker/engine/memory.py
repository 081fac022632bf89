"""How much memory the KV cache may take."""

from __future__ import annotations

import inspect
from typing import Any, Final

import structlog
import torch
from transformers import PreTrainedModel

from worker.engine.attention import hf
from worker.engine.attention.interface import AttentionOptions
from worker.engine.seq2seq import families
from worker.engine.seq2seq.model import compute_largest
from worker.engine.settings import EngineSettings

_log = structlog.get_logger(__name__)

CPU_CACHE_BYTES: Final = 1 << 30
_MARGIN: Final = 50  # of a GPU's memory one part in so many stays free
# The sampler's work per row of logits: the row in float32, a copy of it with penalties, and noise in float64.
_SAMPLER_BYTES_PER_LOGIT: Final = 4 + 4 + 8


class NoRoomForCache(ValueError):
    """Weights and steps leave nothing of the memory that the engine may take."""


def cache_bytes(model: PreTrainedModel, settings: EngineSettings) -> int:
    """Return what settings give the KV cache, or else what there is: on a GPU, after a warm-up with the largest step.

    Raises NoRoomForCache.
    """
    if settings.kv_cache_bytes is not None:
        return settings.kv_cache_bytes
    if model.device.type != "cuda":
        return CPU_CACHE_BYTES
    step_bytes = _warm_up(model, settings)
    free_bytes, total_bytes = torch.cuda.mem_get_info(model.device)
    num_logits = settings.max_num_seqs * model.config.get_text_config().vocab_size
    recorded_bytes = step_bytes * settings.most_recorded_tokens // settings.most_step_tokens  # graphs' memory is theirs
    reserved_bytes = step_bytes + recorded_bytes + num_logits * _SAMPLER_BYTES_PER_LOGIT
    own_bytes = torch.cuda.memory_reserved(model.device)
    size = remaining_bytes(total_bytes, free_bytes, own_bytes, reserved_bytes, settings.gpu_memory_fraction)
    _log.info(
        "memory.measured",
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        own_bytes=own_bytes,
        step_bytes=step_bytes,
        cache_bytes=size,
    )
    return size


def limit_memory(device: torch.device, settings: EngineSettings) -> None:
    """Keep this process within its share of a GPU, for engines that take memory as they need it."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(settings.gpu_memory_fraction, device)


def remaining_bytes(total_bytes: int, free_bytes: int, own_bytes: int, reserved_bytes: int, fraction: float) -> int:
    """Return what is left of a share of the device, `own_bytes` of which are used, and this much needed by steps.

    Workers on one device have a share each: what others use is not taken from it, but what is free is all there is.
    Raises NoRoomForCache.
    """
    allowed = int(total_bytes * fraction)
    margin = total_bytes // _MARGIN  # of what the device itself and other processes may want yet
    size = min(allowed - own_bytes, free_bytes - margin) - reserved_bytes
    if size <= 0:
        raise NoRoomForCache(
            f"no memory is left for the KV cache: {allowed >> 20} MiB may be used (gpu_memory_fraction {fraction}), "
            f"{own_bytes >> 20} MiB are, {free_bytes >> 20} MiB of the device are free, and a step needs "
            f"{reserved_bytes >> 20} MiB"
        )
    return size


@torch.inference_mode()
def _warm_up(model: PreTrainedModel, settings: EngineSettings) -> int:
    """Run the largest step, without a cache, and return the most memory that it took at once."""
    device = model.device

    def attend(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])

    tokens = torch.zeros((1, settings.most_step_tokens), dtype=torch.int64, device=device)
    rows = torch.arange(min(settings.max_num_seqs, settings.most_step_tokens), device=device)
    extra: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        extra["logits_to_keep"] = rows
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    if families.has_encoder(model.config):
        compute_largest(model, settings.most_step_tokens, len(rows))
    else:
        with hf.attention(attend):
            model(input_ids=tokens, position_ids=tokens, use_cache=False, **extra)
    torch.cuda.synchronize(device)
    peak: int = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak
