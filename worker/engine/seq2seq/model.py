"""Runs encoder-decoder models over the paged KV cache: sources once, and the decoder's steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from worker.engine.attention.hf import LayerProbe
from worker.engine.attention.interface import AttentionBackend, AttentionBatch, AttentionOptions, LayerCache
from worker.engine.seq2seq import bridge, families
from worker.engine.seq2seq.batch import SourceBatch, SourceRows
from worker.engine.seq2seq.bridge import FilledCache, Step


def install(model: PreTrainedModel) -> dict[int, LayerProbe]:
    """Install the bridge in a model, and return what the layers of its decoder ask of attention, by index.

    Raises UnsupportedModel.
    """
    bridge.install(model)
    shapes = [layer.shape for layer in bridge.decoder_layers(model)]
    return {index: LayerProbe(shape, shape.num_kv_heads, AttentionOptions(1.0)) for index, shape in enumerate(shapes)}


@torch.inference_mode()
def compute_largest(model: PreTrainedModel, num_tokens: int, num_logit_rows: int) -> None:
    """Read a source of the greatest usual length, then compute a step of so many tokens: all without a KV cache."""
    device = model.device
    source = torch.zeros(1, families.most_tokens(model.config) or 1, dtype=torch.int64, device=device)
    bridge.encoder_of(model)(input_ids=source)
    tokens = torch.zeros(1, num_tokens, dtype=torch.int64, device=device)
    rows = torch.arange(num_logit_rows, device=device)
    _decode(model, FilledCache(model), tokens, Step(_NoAttention(), tokens[0], rows))


def _decode(model: PreTrainedModel, cache: FilledCache, input_ids: torch.Tensor, step: Step) -> torch.Tensor:
    """Return the logits [num_logit_rows, vocab_size] of a step."""
    with bridge.running(step):
        output = model(
            encoder_outputs=(cache.source,),
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=False,
        )
    logits: torch.Tensor = output.logits[0]
    return logits


class _NoAttention:
    def within(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        return torch.zeros_like(query)

    def across(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        return torch.zeros_like(query)


class PagedSeq2Seq:
    """Owns the caches of one model's layers: what is within and what is across lies in blocks of the same ones.

    That needs keys and values of one shape, which all families have.
    """

    def __init__(self, model: PreTrainedModel, backend: AttentionBackend, caches: Mapping[int, LayerCache]) -> None:
        """The bridge is installed in the model."""
        self._model = model
        self._layers = bridge.decoder_layers(model)
        self._attention = _Attention(backend, caches)
        self._cache = FilledCache(model)

    def forward(
        self,
        input_ids: torch.Tensor,  # [1, num_tokens] int64
        position_ids: torch.Tensor,  # [1, num_tokens] int64
        logit_rows: torch.Tensor,
        batch: AttentionBatch,
        sources: SourceBatch,
    ) -> torch.Tensor:
        """Return the logits [num_logit_rows, vocab_size] of a step, and read its new sources before."""
        for source in sources.new:
            self._read(source)
        self._attention.batch, self._attention.sources = batch, sources.attention
        return _decode(self._model, self._cache, input_ids, Step(self._attention, position_ids[0], logit_rows))

    def _read(self, source: SourceRows) -> None:
        """Encode a source alone, which gives the same in whatever batch, and keep its keys and values of all layers."""
        hidden = bridge.encoder_of(self._model)(input_ids=source.token_ids).last_hidden_state[0]
        for index, layer in enumerate(self._layers):
            self._attention.store(index, *layer.keys_and_values(hidden), source.slots)


class _Attention:
    def __init__(self, backend: AttentionBackend, caches: Mapping[int, LayerCache]) -> None:
        self._backend = backend
        self._caches = caches
        self.batch: AttentionBatch | None = None  # of the step in progress
        self.sources: AttentionBatch | None = None

    def within(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        assert self.batch is not None, "no step is in progress"
        return self._backend.attend(query, key, value, self._caches[layer], self.batch, options)

    def across(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        assert self.sources is not None, "no step is in progress"
        # A back-end always writes, and so it does: into the scratch block.
        nothing = query.new_zeros(1, *query.shape[1:]).expand(query.shape)
        return self._backend.attend(query, nothing, nothing, self._caches[layer], self.sources, options)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Write keys and values where a back-end reads them; what it attends over meanwhile is one token each."""
        num_tokens, device = key.shape[0], key.device
        starts = torch.arange(num_tokens + 1, dtype=torch.int32, device=device)
        batch = AttentionBatch(
            slots=slots,
            block_tables=torch.zeros(num_tokens, 1, dtype=torch.int32, device=device),
            query_starts=starts,
            context_lens=torch.ones(num_tokens, dtype=torch.int32, device=device),
            max_query_len=1,
            max_context_len=1,
        )
        self._backend.attend(key, key, value, self._caches[layer], batch, AttentionOptions(scale=1.0))
