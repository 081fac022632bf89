"""The model runner: owns the model, the KV cache and the batch buffers, and turns a plan into logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from common.generation import AdapterRef
from worker.engine.adapters.files import AdapterWeights, LinearShape
from worker.engine.adapters.modules import AdaptedModule
from worker.engine.adapters.types import Adapter
from worker.engine.attention import hf
from worker.engine.attention.interface import AttentionBackend, LayerShape
from worker.engine.batch import BatchBuffers, StepBatch, TokensInFlight
from worker.engine.blocks import SCRATCH_BLOCK
from worker.engine.decoder.program import CompiledDecoder
from worker.engine.host_memory import populate
from worker.engine.memory import cache_bytes
from worker.engine.scheduler import MAX_SCORED_ROWS, BlockCopy, Plan
from worker.engine.seq2seq import families
from worker.engine.seq2seq import model as seq2seq_model
from worker.engine.settings import EngineSettings
from worker.engine.transfer import to_device
from worker.engine.types import OnPart, ignore_part


class StepOutOfMemory(Exception):
    """The device had not enough memory for a step. Nothing of it counts; a smaller step may succeed."""


@contextmanager
def memory_guard() -> Iterator[None]:
    """Turn torch's ways of saying that memory is short into StepOutOfMemory."""
    try:
        yield
    except MemoryError as error:
        raise StepOutOfMemory(str(error)) from error
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU allocator raises a plain one
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise StepOutOfMemory(str(error)) from error
        raise


class ModelRunner:
    """Runs steps of one model. All tensors live on the model's device, keys and values in its dtype."""

    def __init__(
        self,
        model: PreTrainedModel,
        backend: AttentionBackend,
        settings: EngineSettings,
        decoder: CompiledDecoder | None = None,
        on_part: OnPart = ignore_part,
        *,
        adapt: Mapping[str, LinearShape] | None = None,
    ) -> None:
        """Takes the model over: its attention is replaced and it is put into evaluation mode.

        With a decoder, compiled from the model, the model itself is not run any more. `on_part` is told when a
        step's batch is laid out and when its forward pass begins. `adapt` are the model's linear layers as it came,
        where adapters are to be served.

        Raises UnsupportedModel when its class ignores the replacement, ValueError when the KV cache holds no block.
        """
        if backend.block_size != settings.block_size:
            raise ValueError(f"block_size is {settings.block_size}, but {backend.name} uses {backend.block_size}")
        self._model: PreTrainedModel = model.eval()  # type: ignore[no-untyped-call]
        self.device = model.device
        self.attention_name = backend.name
        self._decoder = decoder
        self.on_part = on_part
        self._has_encoder = families.has_encoder(model.config)
        if self._has_encoder:
            shapes: Mapping[int, LayerShape] = {
                layer: probe.shape for layer, probe in seq2seq_model.install(model).items()
            }
        elif decoder is None:
            hf.install(model)
            shapes = hf.probe_layer_shapes(model, self.device)
        else:
            shapes = decoder.layer_shapes
        self._adapted = None
        if adapt is not None and decoder is None and not self._has_encoder:
            self._adapted = AdaptedModule(model, adapt)
        self.num_blocks = settings.num_blocks or 0
        if settings.num_blocks is None:
            size = cache_bytes(model, settings)
            self.num_blocks = size // _block_bytes(shapes.values(), settings.block_size, model.dtype)
            if self.num_blocks < 1:
                raise ValueError(f"kv_cache_bytes ({size}) is less than one block")
        self.num_blocks += SCRATCH_BLOCK + 1
        caches = {
            layer: backend.allocate(shape, self.num_blocks, model.dtype, self.device) for layer, shape in shapes.items()
        }
        self._caches = tuple(caches.values())
        self._attention = hf.PagedAttention(backend, caches)
        self._seq2seq = seq2seq_model.PagedSeq2Seq(model, backend, caches) if self._has_encoder else None
        if decoder is not None:
            decoder.bind(caches)
        self.vocab_size: int = model.config.vocab_size
        self.max_model_len = self._max_model_len(settings)
        self.max_source_tokens = self._max_source_tokens(settings) if self._has_encoder else 0
        self._buffers = BatchBuffers(
            max_num_tokens=settings.most_step_tokens,
            max_num_seqs=settings.max_num_seqs,
            max_num_blocks=-(-self.max_model_len // settings.block_size),
            block_size=settings.block_size,
            device=self.device,
            max_scored_rows=MAX_SCORED_ROWS,
            has_sources=self._has_encoder,
        )
        self._takes_logit_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    def _max_model_len(self, settings: EngineSettings) -> int:
        """What the model's positions, the settings and the whole KV cache allow one sequence."""
        limits = [
            (self.num_blocks - 1) * settings.block_size,
            getattr(self._model.config, "max_position_embeddings", None),
            settings.max_model_len,
        ]
        return min(limit for limit in limits if limit is not None)

    def _max_source_tokens(self, settings: EngineSettings) -> int:
        """What the encoder reads of one source, beside which one block is left."""
        limits = [(self.num_blocks - 2) * settings.block_size, families.most_tokens(self._model.config)]
        if families.is_unbounded(self._model.config):
            limits[1] = max(limits[1] or 0, settings.max_model_len or 0)
        return min(limit for limit in limits if limit is not None)

    @property
    def adaptable(self) -> Mapping[str, LinearShape]:
        """The linear layers that adapters may add to, by path."""
        source = self._decoder or self._adapted
        return {} if source is None else source.adaptable

    def load_adapter(self, ref: AdapterRef, weights: AdapterWeights) -> Adapter:
        """Make an adapter, all of whose layers are adaptable, what steps read. For any thread."""
        source = self._decoder or self._adapted
        assert source is not None, "no adapters are served"
        form = source.adapter_form(weights)
        return Adapter(ref, weights.rank, form.num_bytes, form)

    def populate_cache(self) -> None:
        """Take the memory of the KV cache, which so far only has addresses; on a CPU, in the background."""
        if self.device.type == "cpu":
            populate([tensor for cache in self._caches for tensor in (cache.keys, cache.values)])

    @torch.inference_mode()
    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """Copy blocks of the KV cache, in all layers. Every source is read before any target is written.

        Raises StepOutOfMemory.
        """
        pairs = [(copy.source, copy.target) for copy in copies]
        sources, targets = (to_device(block_ids, self.device) for block_ids in zip(*pairs, strict=True))
        with memory_guard():
            for cache in self._caches:
                for tensor in (cache.keys, cache.values):
                    tensor.index_copy_(0, targets, tensor.index_select(0, sources))

    @torch.inference_mode()
    def execute(self, plan: Plan, in_flight: TokensInFlight | None = None) -> torch.Tensor:
        """Compute the plan: write its keys and values and return the logits of all `num_logit_rows` of its chunks.

        `in_flight` are the tokens that are pending in the plan. Raises StepOutOfMemory.
        """
        self.on_part("batch")
        batch = self._buffers.fill(plan)
        if in_flight is not None:
            in_flight.fill_in(batch.input_ids[0], plan)
        self.on_part("forward")
        return self.forward(batch)

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Compute a step that is laid out already. Raises StepOutOfMemory."""
        if self._decoder is not None:
            with memory_guard():
                return self._decoder.forward(batch)
        if self._seq2seq is not None:
            assert batch.sources is not None, "an encoder-decoder model needs sources"
            with memory_guard():
                return self._seq2seq.forward(
                    batch.input_ids, batch.position_ids, batch.logit_rows, batch.attention, batch.sources
                )
        self._attention.batch = batch.attention
        if self._adapted is not None:
            self._adapted.begin(batch.adapters)
        extra = {"logits_to_keep": batch.logit_rows} if self._takes_logit_rows else {}
        with memory_guard(), hf.attention(self._attention):
            output = self._model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **extra)
        logits: torch.Tensor = output.logits[0]
        return logits if self._takes_logit_rows else logits[batch.logit_rows]


def _block_bytes(shapes: Iterable[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return sum(block_size * s.num_kv_heads * (s.key_dim + s.value_dim) for s in shapes) * dtype.itemsize
