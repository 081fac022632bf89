"""The compiled decoder: a model's packed weights, and a step as one call into the C++ kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Final

import torch

from worker.engine.adapters.files import AdapterWeights, LinearShape
from worker.engine.attention.interface import LayerCache, LayerShape
from worker.engine.batch import StepBatch
from worker.engine.closeness import Closeness
from worker.engine.decoder.layout import DecoderLayout, LayerLayout, LinearLayout, NotLlamaShaped
from worker.engine.decoder.low_rank import PRODUCTS, DecoderAdapter, LowRank, Place, pack_adapter
from worker.engine.decoder.packing import (
    Arena,
    LinearFormat,
    PackedLinear,
    fits,
    pack,
    packed_bytes,
    padded,
)
from worker.engine.decoder.smoothing import Magnitudes, input_factors
from worker.engine.host_memory import lazy_zeros, release, trim
from worker.engine.kernels.library import Kernels

_ACTIVATIONS: Final = {"silu": 0, "gelu_tanh": 1}
_ELEMENT_TYPES: Final = {torch.float32: 0, torch.bfloat16: 1}
_FAILURES: Final = {
    1: "a slot or a block table names a block that the cache does not have",
    2: "the batch contradicts itself: query_starts, context_lens or block table width",
    3: "out of memory",
    4: "a token id, position, logit row or adapter does not exist",
}


class _Linear(ctypes.Structure):
    _fields_ = [
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("format", ctypes.c_int64),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *[(name, _Linear) for name in ("qkv", "output", "gate_up", "down")],
        *[
            (name, ctypes.c_void_p)
            for name in (
                *("attention_norm", "query_norm", "key_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm"),
                *("cosines", "sines", "key_cache", "value_cache"),
            )
        ],
        ("sliding_window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class _Decoder(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("head", _Linear),
        ("embedding", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        *[
            (name, ctypes.c_int64)
            for name in (
                *("num_layers", "hidden_size", "vocab_size", "num_heads", "num_kv_heads", "head_dim", "rotary_dim"),
                *("mlp_size", "num_positions", "num_blocks", "element_type", "activation", "wide_query_key_norm"),
            )
        ],
        *[
            (name, ctypes.c_float)
            for name in ("norm_epsilon", "embedding_scale", "residual_scale", "logit_scale", "logit_softcap")
        ],
    ]


class DecoderTimes(ctypes.Structure):
    """Seconds by part of the steps since it was made."""

    _fields_ = [(name, ctypes.c_double) for name in ("norms", "linears", "attention", "rotary", "head")]


class _Step(ctypes.Structure):
    _fields_ = [
        *[
            (name, ctypes.c_void_p)
            for name in (
                *("token_ids", "positions", "logit_rows", "slots", "block_tables", "query_starts", "context_lens"),
                *("logits", "times", "row_adapters", "adapters"),
            )
        ],
        *[
            (name, ctypes.c_int64)
            for name in ("num_tokens", "num_seqs", "num_logit_rows", "block_table_width", "num_threads", "num_adapters")
        ],
    ]


class CompiledDecoder:
    """Runs a Llama-shaped decoder on the CPU.

    In every number format a row's logits are the same to the bit whatever else is in the batch, however its prompt is
    cut into chunks, and on any number of threads. The residual stream and all sums are float32.
    """

    def __init__(
        self,
        layout: DecoderLayout,
        dtype: torch.dtype,
        kernels: Kernels,
        *,
        int8: bool = False,
        magnitudes: Magnitudes | None = None,
    ) -> None:
        """Pack the weights. The layout's linear layers lose theirs, one after another, so memory holds them once.

        `dtype` is that of keys and values, and of all weights without `int8`. `magnitudes` of inputs let int8 lose
        less, see `smoothing.py`. Raises NotLlamaShaped when a width does
        not fit the kernels; nothing is lost then.
        """
        first = layout.layers[0]
        self.dtype = dtype
        self.vocab_size = layout.head.outputs
        self.layer_probes = {i: layer.attention for i, layer in enumerate(layout.layers)}
        self.layer_shapes: Mapping[int, LayerShape] = {i: probe.shape for i, probe in self.layer_probes.items()}
        self.closeness: Closeness | None = None  # to the plain model, once that is known
        self.times: DecoderTimes | None = None
        if len({(layer.attention.shape, layer.attention.num_heads) for layer in layout.layers}) != 1:
            raise NotLlamaShaped("layers differ in their heads")
        self._call = kernels.decoder_step
        self._magnitudes = magnitudes or {}
        self.places: Mapping[str, Place] = {}  # of the model's linear layers, for adapters
        self._factors: dict[tuple[int, str], torch.Tensor] = {}  # what inputs of products are divided by
        self._kept: list[torch.Tensor] = []  # what the structures point to
        self._logits = torch.empty((0, self.vocab_size), dtype=torch.float32)
        formats = _Formats(dtype, int8=int8)
        formats.check(layout)
        # Tied weights in the embedding's own format are read out of the packed head: a fifth of a small model.
        is_tied = not int8 and _is_tied(layout)
        embedding_bytes = 0 if is_tied else layout.embedding.numel() * dtype.itemsize + 64
        arena = Arena(sum(packed_bytes(*size) for size in formats.sizes(layout)) + embedding_bytes)
        embedding = None if is_tied else arena.empty(tuple(layout.embedding.shape), dtype).copy_(layout.embedding)
        self._tables = tables = dict(layout.rope_tables)
        self._layers = (_Layer * len(layout.layers))(
            *(self._layer(index, layer, formats, arena, tables) for index, layer in enumerate(layout.layers))
        )
        head = self._linear(pack(layout.head.layers, formats.head, arena))
        for layer in layout.head.layers:
            _drop_weight(layer, is_shared=layer.weight.data_ptr() == layout.embedding.data_ptr())
        self._decoder = _Decoder(
            layers=self._layers,
            head=head,
            embedding=self._pointer(embedding),
            final_norm=self._keep(layout.final_norm).data_ptr(),
            num_layers=len(layout.layers),
            hidden_size=first.qkv.inputs,
            vocab_size=self.vocab_size,
            num_heads=first.attention.num_heads,
            num_kv_heads=first.attention.shape.num_kv_heads,
            head_dim=first.attention.shape.key_dim,
            rotary_dim=2 * next((cos.shape[1] for cos, _ in tables.values()), 0),
            mlp_size=layout.mlp_size,
            num_positions=layout.num_positions,
            element_type=_ELEMENT_TYPES[dtype],
            activation=_ACTIVATIONS[layout.activation],
            wide_query_key_norm=layout.wide_query_key_norm,
            norm_epsilon=layout.norm_epsilon,
            embedding_scale=layout.embedding_scale,
            residual_scale=layout.residual_scale,
            logit_scale=layout.logit_scale,
            logit_softcap=layout.logit_softcap,
        )
        self._arena = arena
        self._outputs = {name: getattr(first, name).outputs for name in PRODUCTS}
        # Storages, since most tensors are views of the arena.
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self._kept}
        self.weight_bytes = sum(storage.nbytes() for storage in storages.values())

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._kept.append(tensor)
        return tensor

    def _pointer(self, tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else self._keep(tensor).data_ptr()

    def _linear(self, packed: PackedLinear) -> _Linear:
        return _Linear(
            panels=self._pointer(packed.panels),
            bias=self._pointer(packed.bias),
            inputs=packed.inputs,
            outputs=packed.outputs,
            format=packed.format,
        )

    def _layer(
        self,
        index: int,
        layer: LayerLayout,
        formats: _Formats,
        arena: Arena,
        tables: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> _Layer:
        linears: dict[str, _Linear] = {}
        norms = {"qkv": layer.attention_norm, "gate_up": layer.mlp_norm}
        for name in ("qkv", "output", "gate_up", "down"):
            product: LinearLayout = getattr(layer, name)
            norm, factors = norms.get(name), input_factors(product, self._magnitudes)
            if norm is not None and factors is not None:
                norms[name] = norm / factors
                self._factors[index, name] = factors
            packed = pack(product.layers, formats.of(name), arena, gated=name == "gate_up", factors=factors)
            linears[name] = self._linear(packed)
            for linear in product.layers:
                _drop_weight(linear)
        trim()  # copies made on the way would add up to the model's size
        cosines, sines = tables[layer.rope] if layer.rope else (None, None)
        options = layer.attention.options
        return _Layer(
            **linears,
            attention_norm=self._pointer(norms["qkv"]),
            query_norm=self._pointer(layer.query_norm),
            key_norm=self._pointer(layer.key_norm),
            attention_output_norm=self._pointer(layer.attention_output_norm),
            mlp_norm=self._pointer(norms["gate_up"]),
            mlp_output_norm=self._pointer(layer.mlp_output_norm),
            cosines=None if cosines is None else cosines.data_ptr(),
            sines=None if sines is None else sines.data_ptr(),
            sliding_window=options.sliding_window or 0,
            scale=options.scale,
            softcap=options.softcap or 0.0,
        )

    @property
    def adaptable(self) -> Mapping[str, LinearShape]:
        """The linear layers that adapters may add to, by their paths in the model."""
        return {name: place.shape for name, place in self.places.items()}

    def adapter_form(self, weights: AdapterWeights) -> DecoderAdapter:
        """Return an adapter of this model as steps read it."""
        return pack_adapter(weights, self.places, len(self._layers), self._outputs, self._factors)

    def bind(self, caches: Mapping[int, LayerCache]) -> Callable[[StepBatch], torch.Tensor]:
        """Use these caches, by layer, laid out as `CpuAttention` allocates them; return `forward`.

        Raises ValueError for caches of another format or of different sizes.
        """
        for cache in caches.values():
            if not cache.keys.dtype is cache.values.dtype is self.dtype or len(cache.values) != len(caches[0].values):
                raise ValueError(f"the decoder needs caches of {self.dtype}, all of one size")
        self._caches = dict(caches)
        self._logits = self._logits[:0].clone()  # the check of the model has asked for more rows than steps will
        for index, cache in caches.items():
            self._layers[index].key_cache = cache.keys.data_ptr()
            self._layers[index].value_cache = cache.values.data_ptr()
        self._decoder.num_blocks = caches[0].values.shape[0]
        return self.forward

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Compute a step; return the logits [num_logit_rows, vocab_size] float32, valid until the next step.

        Raises ValueError for a batch that contradicts itself or names what does not exist; MemoryError.
        """
        attention = batch.attention
        num_rows = len(batch.logit_rows)
        if num_rows > len(self._logits):  # kept: each step would fault fresh memory in, 6 MB for 32 rows
            self._logits = lazy_zeros((num_rows, self.vocab_size), torch.float32)
        logits = self._logits[:num_rows]
        adapters = batch.adapters
        forms = () if adapters is None else adapters.forms
        products = (ctypes.POINTER(LowRank) * len(forms))(*(form.products for form in forms))
        step = _Step(
            token_ids=batch.input_ids.data_ptr(),
            positions=batch.position_ids.data_ptr(),
            logit_rows=batch.logit_rows.data_ptr(),
            slots=attention.slots.data_ptr(),
            block_tables=attention.block_tables.data_ptr(),
            query_starts=attention.query_starts.data_ptr(),
            context_lens=attention.context_lens.data_ptr(),
            logits=logits.data_ptr(),
            times=None if self.times is None else ctypes.addressof(self.times),
            row_adapters=None if adapters is None else adapters.of_rows.data_ptr(),
            adapters=ctypes.addressof(products),
            num_adapters=len(forms),
            num_tokens=batch.input_ids.shape[1],
            num_seqs=len(attention.context_lens),
            num_logit_rows=num_rows,
            block_table_width=attention.block_tables.shape[1],
            num_threads=torch.get_num_threads(),
        )
        status = self._call(ctypes.byref(self._decoder), ctypes.byref(step))
        if status == 3:
            raise MemoryError(_FAILURES[3])
        if status:
            raise ValueError(f"the decoder refused its arguments: {_FAILURES.get(status, status)}")
        return logits


def _is_tied(layout: DecoderLayout) -> bool:
    """Whether the head's weights are the embedding, row by row."""
    first = layout.head.layers[0].weight
    return first.data_ptr() == layout.embedding.data_ptr() and first.shape == layout.embedding.shape


def _drop_weight(layer: torch.nn.Linear, *, is_shared: bool = False) -> None:
    if not is_shared:
        release(layer.weight.detach())
    layer.weight = torch.nn.Parameter(torch.empty(0, dtype=layer.weight.dtype), requires_grad=False)


class _Formats:
    """Which layer is kept in which format."""

    def __init__(self, dtype: torch.dtype, *, int8: bool) -> None:
        plain = LinearFormat.BFLOAT16 if dtype == torch.bfloat16 else LinearFormat.FLOAT32
        self._narrow = LinearFormat.INT8 if int8 else plain
        self._wide = LinearFormat.INT8_WIDE if int8 else plain
        self.head = self._wide

    def of(self, name: str) -> LinearFormat:
        return self._wide if name in ("qkv", "down") else self._narrow

    def sizes(self, layout: DecoderLayout) -> list[tuple[int, int, LinearFormat]]:
        sizes = [(layout.head.inputs, layout.head.outputs, self.head)]
        for layer in layout.layers:
            for name in ("qkv", "output", "down"):
                linear = getattr(layer, name)
                sizes.append((linear.inputs, linear.outputs, self.of(name)))
            sizes.append((layer.gate_up.inputs, 2 * padded(layer.down.inputs), self.of("gate_up")))
        return sizes

    def check(self, layout: DecoderLayout) -> None:
        for inputs, _, linear_format in self.sizes(layout):
            if not fits(inputs, linear_format):
                raise NotLlamaShaped(f"a layer has {inputs} inputs, which are no whole words in {linear_format.name}")
