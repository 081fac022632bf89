"""The load check of encoder-decoder models: packed, paged and in chunks, each behind its own source, against alone.

As `worker/engine/loadcheck.py` for decoders: it finds positions or biases that count from the wrong place, sources
that were mixed up, and blocks that were read by number instead of by table.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from transformers import PreTrainedModel

from worker.engine.attention.interface import AttentionBackend, AttentionBatch, LayerShape
from worker.engine.closeness import relative_error
from worker.engine.seq2seq.batch import SourceBatch, across, source_rows
from worker.engine.seq2seq.families import most_tokens
from worker.engine.seq2seq.model import PagedSeq2Seq, install

_SOURCE_LENGTHS: Final = (21, 5, 16)
_TARGET_LENGTHS: Final = (7, 23, 18)
_FIRST_CHUNKS: Final = (3, 17, 0)  # target tokens of each in the first step; the rest in the second


@torch.inference_mode()
def packed_error(module: PreTrainedModel, backend: AttentionBackend) -> float:
    """Return how far the logits of a packed batch are from the plain model's, as `relative_error`; NaN if any is.

    Ends with the bridge installed.
    """
    limit = most_tokens(module.config) or 0
    sources, targets = (
        [_tokens(module, min(length, limit), seed) for length in lengths]
        for seed, lengths in ((20240229, _SOURCE_LENGTHS), (20240301, _TARGET_LENGTHS))
    )
    module.set_attn_implementation("eager")
    expected = [
        module(input_ids=source[None], decoder_input_ids=target[None], use_cache=False).logits[0].float()
        for source, target in zip(sources, targets, strict=True)
    ]
    probes = install(module)
    found = _packed(module, backend, sources, targets, {layer: probe.shape for layer, probe in probes.items()})
    errors = [relative_error(logits, plain, module.dtype) for logits, plain in zip(found, expected, strict=True)]
    # A NaN compares false with everything, so it is asked for.
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _tokens(module: PreTrainedModel, length: int, seed: int) -> torch.Tensor:
    """Different random tokens for each length, the same in every run; no padding, which a plain model leaves out."""
    generator = torch.Generator().manual_seed(seed + length)
    tokens = torch.randint(1, module.config.vocab_size, (length,), generator=generator)
    padding = module.config.pad_token_id
    return tokens.masked_fill(tokens == padding, 0 if padding else 1).to(module.device)


def _packed(
    module: PreTrainedModel,
    backend: AttentionBackend,
    sources: list[torch.Tensor],
    targets: list[torch.Tensor],
    shapes: dict[int, LayerShape],
) -> list[torch.Tensor]:
    device, size = module.device, backend.block_size
    counts = [-(-len(tokens) // size) for tokens in (*sources, *targets)]
    # Scattered, and sources and targets among each other.
    free = list(range(1, sum(counts) + 1))
    order = free[1::2] + free[0::2]
    tables = [np.array([order.pop() for _ in range(count)], dtype=np.int32) for count in counts]
    source_tables, target_tables = tables[: len(sources)], tables[len(sources) :]
    caches = {layer: backend.allocate(shape, len(free) + 1, module.dtype, device) for layer, shape in shapes.items()}
    paged = PagedSeq2Seq(module, backend, caches)
    firsts = [min(first, len(target)) for first, target in zip(_FIRST_CHUNKS, targets, strict=True)]
    lengths = [len(target) for target in targets]
    rows: list[list[torch.Tensor]] = [[] for _ in targets]
    known: set[int] = set()
    for starts, ends in (([0] * len(targets), firsts), (firsts, lengths)):
        spans = [(i, starts[i], ends[i]) for i in range(len(targets)) if ends[i] > starts[i]]
        new = [i for i, _, _ in spans if i not in known]
        known.update(new)
        counts = [end - start for _, start, end in spans]
        positions = np.concatenate([np.arange(start, end) for _, start, end in spans])
        logits = paged.forward(
            torch.cat([targets[i][start:end] for i, start, end in spans])[None],
            torch.from_numpy(positions).to(device)[None],
            torch.arange(len(positions), device=device),
            _within([target_tables[i] for i, _, _ in spans], spans, size, device),
            SourceBatch(
                across(
                    np.repeat(_padded([source_tables[i] for i, _, _ in spans]), counts, axis=0),
                    np.repeat([len(sources[i]) for i, _, _ in spans], counts),
                    size,
                    device,
                ),
                tuple(source_rows(sources[i].cpu().numpy(), source_tables[i], size, device) for i in new),
            ),
        )
        for (i, _, _), part in zip(spans, torch.split(logits, counts), strict=True):
            rows[i].append(part.float())
    return [torch.cat(parts) for parts in rows]


def _padded(tables: list[np.ndarray]) -> np.ndarray:
    width = max(map(len, tables))
    return np.stack([np.pad(table, (0, width - len(table))) for table in tables])


def _within(
    tables: list[np.ndarray], spans: list[tuple[int, int, int]], size: int, device: torch.device
) -> AttentionBatch:
    """The batch of a step that computes tokens start:end of the targets (index, start, end)."""
    places = [np.arange(start, end) for _, start, end in spans]
    slots = [table[place // size] * size + place % size for table, place in zip(tables, places, strict=True)]
    lengths = [end - start for _, start, end in spans]

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(device)

    return AttentionBatch(
        slots=tensor(np.concatenate(slots)),
        block_tables=tensor(_padded(tables)),
        query_starts=tensor(np.cumsum([0, *lengths])),
        context_lens=tensor(np.array([end for _, _, end in spans])),
        max_query_len=max(lengths),
        max_context_len=max(end for _, _, end in spans),
    )
