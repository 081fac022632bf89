"""Refuses models that would run and answer wrongly.

With an attention function that is not their own, many families neither fail nor warn: they ignore it, or keep layers
of another kind, and mix the requests that are packed into one batch. A flag in the class does not tell them apart. So
a model is served only if (a) its configuration names nothing but full and sliding attention, (b) each layer calls our
attention exactly once, and (c) sequences packed, paged and cut into chunks give the logits that the plain model gives
to each alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from worker.cache import cache_dir, write_atomically
from worker.engine import closeness
from worker.engine.attention import call_sites, hf
from worker.engine.attention.hf import LayerProbe
from worker.engine.attention.interface import AttentionBackend, AttentionBatch, AttentionOptions, LayerCache, LayerShape
from worker.engine.batch import StepBatch
from worker.engine.closeness import FP8_TOLERANCE, TOLERANCE, relative_error
from worker.engine.seq2seq import bridge, families
from worker.engine.seq2seq import check as seq2seq_check
from worker.engine.seq2seq import model as seq2seq_model

if TYPE_CHECKING:
    from worker.engine.model import LoadedModel

_log = structlog.get_logger(__name__)

_LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})

# RoPE whose frequencies switch at a length, taken over the whole batch: one long request would change its neighbours.
# Up to that length they are constant, so the model is exact with its context limited to it.
_ROPE_BY_LENGTH: Final = frozenset({"dynamic", "longrope"})

_TEST_LENGTHS: Final = (23, 6, 17)
LONGEST_TEST: Final = max(_TEST_LENGTHS)
_FIRST_CHUNKS: Final = (10, 5, 0)  # tokens of each sequence in the first step; the rest in the second


class UnsupportedFamilyError(Exception):
    """The model would answer wrongly; the message names its family and the reason."""


def check_config(config: PretrainedConfig) -> None:
    """Refuse what the configuration alone shows to be unsupported. Raises UnsupportedFamilyError."""
    text = config.get_text_config()
    family = config.model_type
    if families.has_encoder(config) and family not in families.FAMILIES:
        served = ", ".join(sorted(families.FAMILIES))
        raise UnsupportedFamilyError(f"the family {family} has an encoder; of such, {served} are served")
    unknown = sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES)
    if unknown:
        raise UnsupportedFamilyError(
            f"the family {family} has layers of type {', '.join(unknown)}; only full and sliding attention is served"
        )


@dataclass(frozen=True, slots=True)
class ContextLimit:
    """The most tokens of a sequence for which a model is exact in any batch."""

    tokens: int
    reason: str | None = None  # why these are fewer than the configuration names


def context_limit(config: PretrainedConfig) -> ContextLimit:
    """Read the limit from the configuration. Raises UnsupportedFamilyError."""
    text = config.get_text_config()
    limit = families.most_tokens(text)
    if limit is None:
        raise UnsupportedFamilyError(
            f"the family {config.model_type} names no context length (max_position_embeddings)"
        )
    result = ContextLimit(limit)
    for rope in _rope_parameters(text):
        kind = rope.get("rope_type")
        if kind not in _ROPE_BY_LENGTH:
            continue
        original = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        if isinstance(original, int) and 0 < original < result.tokens:
            reason = f"RoPE of type {kind} changes beyond {original} tokens, and {limit} are named"
            result = ContextLimit(original, reason)
    return result


def context_length(config: PretrainedConfig) -> int:
    """Return the most tokens of a sequence for which the model is exact in any batch. Raises UnsupportedFamilyError."""
    limit = context_limit(config)
    if limit.reason is not None:
        _log.warning("model.context_limited", to=limit.tokens, reason=limit.reason)
    return limit.tokens


def _rope_parameters(text: PretrainedConfig) -> list[Mapping[str, Any]]:
    """The configuration's RoPE parameters: one set, or one per layer type."""
    parameters = getattr(text, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [entry for entry in parameters.values() if isinstance(entry, Mapping)]


def probe_attention(module: PreTrainedModel) -> dict[int, LayerProbe]:
    """Make the model call our attention and return what its layers ask of it. Raises UnsupportedFamilyError."""
    try:
        if families.has_encoder(module.config):
            return seq2seq_model.install(module)
        hf.install(module)
        return hf.probe_layers(module, module.device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UnsupportedFamilyError(f"the family {module.config.model_type} cannot be served: {error}") from error


def install_attention(module: PreTrainedModel) -> dict[int, LayerShape]:
    """Make the model call our attention and return the shapes of its keys and values. Raises UnsupportedFamilyError."""
    return {layer: probe.shape for layer, probe in probe_attention(module).items()}


def check_model(loaded: LoadedModel, backend: AttentionBackend, cache_root: Path | None = None) -> None:
    """Refuse a model that answers wrongly on this back-end. Raises UnsupportedFamilyError.

    A passed check is remembered for the same revision, number formats, back-end and versions. Ends with our attention
    installed in the model.
    """
    parts = (loaded.revision, str(loaded.dtype), loaded.weight_format, loaded.device.type, backend.name)
    key = json.dumps([*parts, torch.__version__, transformers.__version__, _source_digest()])
    verdict = cache_dir("verdicts", root=cache_root) / hashlib.sha256(key.encode()).hexdigest()
    if verdict.exists():
        return
    started = time.monotonic()
    error = check_module(loaded.module, backend, FP8_TOLERANCE if loaded.weight_format == "fp8" else None)
    _log.info("model.checked", family=loaded.family, error=error, ms=round((time.monotonic() - started) * 1000))
    write_atomically(verdict, key.encode())


def _source_digest() -> str:
    """The check itself, and the bridges that it checks, may change."""
    digest = hashlib.sha256()
    for source in (sys.modules[__name__], closeness, hf, call_sites, seq2seq_check, bridge, seq2seq_model):
        digest.update(Path(str(source.__file__)).read_bytes())
    return digest.hexdigest()


@torch.inference_mode()
def check_module(module: PreTrainedModel, backend: AttentionBackend, tolerance: float | None = None) -> float:
    """Compare packed logits with the plain model's; return the largest error. Raises UnsupportedFamilyError.

    By default the tolerance is that of the model's dtype.
    """
    check_config(module.config)
    tolerance = TOLERANCE[module.dtype] if tolerance is None else tolerance
    if families.has_encoder(module.config):
        return _accept(module, seq2seq_check.packed_error(module, backend), tolerance)
    expected = plain_logits(module)
    shapes = install_attention(module)
    calls: Counter[int] = Counter()

    def bind(caches: Mapping[int, LayerCache]) -> Callable[[StepBatch], torch.Tensor]:
        paged = hf.PagedAttention(backend, dict(caches))

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
        ) -> torch.Tensor:
            calls[layer] += 1
            return paged(layer, query, key, value, options)

        def forward(batch: StepBatch) -> torch.Tensor:
            paged.batch = batch.attention
            calls.clear()
            with hf.attention(attend):
                output = module(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
            _check_calls(module, calls)
            logits: torch.Tensor = output.logits[0].float()
            return logits

        return forward

    return _accept(module, packed_error(bind, shapes, module.dtype, backend, expected), tolerance)


def _accept(module: PreTrainedModel, error: float, tolerance: float) -> float:
    if not error <= tolerance:
        raise UnsupportedFamilyError(
            f"the family {module.config.model_type} cannot be served: sequences packed into one batch give other "
            f"logits than alone (relative error {error:.2g}, allowed {tolerance:.2g})"
        )
    return error


def plain_logits(module: PreTrainedModel, first_position: int = 0) -> list[torch.Tensor]:
    """The model's own logits for each test sequence alone, with its own attention; float32."""
    sequences = _test_sequences(module.config.get_text_config().vocab_size, module.device)
    module.set_attn_implementation("eager")
    logits = []
    for tokens in sequences:
        positions = torch.arange(first_position, first_position + len(tokens), device=module.device)[None]
        output = module(input_ids=tokens[None], position_ids=positions, use_cache=False)
        logits.append(output.logits[0].float())
    return logits


def packed_error(
    bind: Callable[[Mapping[int, LayerCache]], Callable[[StepBatch], torch.Tensor]],
    shapes: Mapping[int, LayerShape],
    dtype: torch.dtype,
    backend: AttentionBackend,
    expected: Sequence[torch.Tensor],
    first_position: int = 0,
) -> float:
    """Run the test sequences packed, paged and cut into chunks; return how far the logits are from the expected ones.

    `bind` gets the caches of all layers and returns what computes a step's logits for all its rows. The sequences may
    begin at a later position than 0. The error is their largest `relative_error`; NaN if any is.
    """
    device = expected[0].device
    sequences = _test_sequences(expected[0].shape[-1], device)
    lengths = [len(tokens) for tokens in sequences]
    layout = _Layout(lengths, backend.block_size)
    forward = bind(
        {layer: backend.allocate(shape, layout.num_blocks, dtype, device) for layer, shape in shapes.items()}
    )
    rows: list[list[torch.Tensor]] = [[] for _ in sequences]
    firsts = list(_FIRST_CHUNKS)
    for starts, ends in (([0] * len(firsts), firsts), (firsts, lengths)):
        members = [i for i, (start, end) in enumerate(zip(starts, ends, strict=True)) if end > start]
        spans = [(i, starts[i], ends[i]) for i in members]
        positions = torch.cat([torch.arange(start, end, device=device) for _, start, end in spans])[None]
        positions += first_position
        logits = forward(
            StepBatch(
                input_ids=torch.cat([sequences[i][start:end] for i, start, end in spans])[None],
                position_ids=positions,
                logit_rows=torch.arange(positions.shape[1], device=device),
                attention=layout.batch(spans, device),
            )
        )
        for (i, _, _), part in zip(spans, torch.split(logits, [end - start for _, start, end in spans]), strict=True):
            rows[i].append(part.clone())  # a step's logits need not outlive the next step
    worst = 0.0
    for parts, plain in zip(rows, expected, strict=True):
        error = relative_error(torch.cat(parts), plain, dtype)
        # A NaN compares false with everything, so it is asked for.
        worst = float("nan") if math.isnan(error) or math.isnan(worst) else max(worst, error)
    return worst


def _test_sequences(vocab_size: int, device: torch.device) -> list[torch.Tensor]:
    """Different random tokens in each, the same in every run."""
    generator = torch.Generator().manual_seed(20240229)
    return [torch.randint(vocab_size, (n,), generator=generator).to(device) for n in _TEST_LENGTHS]


def _check_calls(module: PreTrainedModel, calls: Counter[int]) -> None:
    num_layers = module.config.get_text_config().num_hidden_layers
    if calls != Counter(range(num_layers)):
        raise UnsupportedFamilyError(
            f"the family {module.config.model_type} cannot be served: {len(calls)} of {num_layers} layers call "
            f"attention, {sum(calls.values())} times in all; every layer must call it exactly once"
        )


class _Layout:
    """Blocks for the test sequences, scattered so that a back-end or model that ignores the block table is noticed."""

    def __init__(self, lengths: Sequence[int], block_size: int) -> None:
        self._block_size = block_size
        counts = [-(-length // block_size) for length in lengths]
        self.num_blocks = sum(counts) + 1  # block 0 is scratch
        free = list(range(1, self.num_blocks))
        order = free[1::2] + free[0::2]
        self._tables = [[order.pop() for _ in range(count)] for count in counts]

    def batch(self, spans: Sequence[tuple[int, int, int]], device: torch.device) -> AttentionBatch:
        """The batch of a step that computes tokens start:end of the sequences (index, start, end)."""
        size = self._block_size
        width = max(len(table) for table in self._tables)
        tables = [self._tables[i] + [0] * (width - len(self._tables[i])) for i, _, _ in spans]
        slots = [self._tables[i][p // size] * size + p % size for i, start, end in spans for p in range(start, end)]
        starts = [0]
        for _, start, end in spans:
            starts.append(starts[-1] + end - start)

        def tensor(values: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        return AttentionBatch(
            slots=tensor(slots),
            block_tables=tensor(tables),
            query_starts=tensor(starts),
            context_lens=tensor([end for _, _, end in spans]),
            max_query_len=max(end - start for _, start, end in spans),
            max_context_len=max(end for _, _, end in spans),
        )
