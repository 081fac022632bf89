"""Loads a model for the engine: weights on the device, tokenizer, and what its configuration says about serving it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import structlog
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from worker.engine import formats, model_files, quantize
from worker.engine.adapters.files import LinearShape
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.decoder.compile import DecoderDiffers, compile_decoder
from worker.engine.decoder.layout import NotLlamaShaped
from worker.engine.decoder.program import CompiledDecoder
from worker.engine.formats import Quantization
from worker.engine.fuse import speed_up
from worker.engine.generation_defaults import read_defaults
from worker.engine.loadcheck import UnsupportedFamilyError, check_config, context_length, install_attention
from worker.engine.model_dir import check_counts
from worker.engine.model_files import ModelError, TextFiles, Weights, find_model
from worker.engine.quantize import Narrow, num_bytes
from worker.engine.seq2seq import families

_log = structlog.get_logger(__name__)

__all__ = ["LoadedModel", "ModelError", "load_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to be checked and run. The module is in evaluation mode and calls our attention."""

    source: str  # as it was asked for
    folder: Path
    module: PreTrainedModel
    config: PretrainedConfig
    family: str  # transformers' model_type
    text: TextFiles
    generation_defaults: Mapping[str, Any]  # by the names of GenerationDefaults' fields; only what the model sets
    eos_token_ids: tuple[int, ...]
    # Most tokens of a sequence, prompt and output together; beside an encoder, of the decoder, its start included.
    context_length: int
    vocab_size: int  # width of the logits
    revision: str  # SHA-256, hex
    num_parameters: int
    weight_format: str  # what the weights are kept in: "bfloat16", "int8", or a quantization's name such as "gptq"
    weight_bytes: int  # memory that the weights take in that; 0 without them
    quantization: str | None = None  # of the files, by its name; None where they hold plain weights
    not_compiled: str | None = None  # why there is no decoder, where one was asked for
    linear_layers: Mapping[str, LinearShape] = field(default_factory=dict)  # by path, as the model came; not the head
    decoder: CompiledDecoder | None = None  # runs in the module's place; the module's linear layers are then empty
    is_encoder_decoder: bool = False
    max_source_tokens: int = 0  # that its encoder reads; 0 without one
    decoder_start_token_id: int | None = None  # what its decoder begins with; None without an encoder
    has_fixed_context: bool = True  # else the lengths above are what is usual, and a setting may raise them

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def device(self) -> torch.device:
        return self.module.device


def load_model(
    source: str,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    cache_root: Path | None = None,
    *,
    fast: bool = True,
    with_weights: bool = True,
    compile_for: CpuAttention | None = None,
    narrow: Narrow | None = None,
) -> LoadedModel:
    """Load `source` (a directory, a Hub id, or "demo"); `revision` is a branch or commit on the Hub.

    `fast` lets the model's layers be replaced by faster ones; its state dict is then no longer the files'. With
    `compile_for` a Llama-shaped model becomes a compiled decoder for that attention. `narrow` weights are the
    decoder's own int8 then, else they are made on `device`, which `quantize.check_device` must have passed. Without
    weights the module stands on the meta device: enough to describe the model, not to run it.

    Raises ModelError when the model is not there, not safe to load, damaged, of a family that cannot be served, or
    cannot have narrow weights though they are asked for.
    """
    started = time.monotonic()
    folder = find_model(source, revision)
    settings = model_files.check_config_file(folder)
    quantization = formats.read_quantization(folder, settings)
    if narrow is not None and quantization is not None:
        raise ModelError(
            f"{source} is quantized already ({quantization.name}); {narrow} weights are made of plain ones alone"
        )
    weights = model_files.read_weights(folder)
    check_counts(folder / "config.json", settings, weights.num_tensors)
    if quantization is None:
        formats.check_plain(weights.headers)
    elif with_weights:
        formats.check_packages(folder, quantization)
    text = model_files.read_text_files(folder)
    generation = model_files.read_json(folder / "generation_config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        check_config(config)
        limit = context_length(config)
        is_seq2seq = families.has_encoder(config)
        if is_seq2seq and (narrow is not None or quantization is not None):
            kind = narrow if quantization is None else quantization.name
            raise UnsupportedFamilyError(
                f"the family {config.model_type} has an encoder, and is served with plain weights alone, not {kind}"
            )
    except UnsupportedFamilyError as error:
        raise ModelError(f"{source}: {error}") from error
    except Exception as error:
        raise ModelError(f"{source}: transformers does not accept config.json: {error}") from error
    skeleton = _skeleton(source, config, dtype)
    if is_seq2seq and not generation:  # as transformers does: older ones have it in config.json
        generation = _set_parameters(config, settings)
    if quantization is None:
        _check_size(source, skeleton, weights)
    decoder, not_compiled, weight_bytes = None, None, 0
    if with_weights:
        read = partial(_load_weights, source, folder, config, dtype, device, quantization)
        module = read()
        # Files of a quantized model may pack several parameters into one number.
        num_parameters = _num_parameters(module if quantization is None else skeleton)
        try:
            if is_seq2seq:
                not_compiled = f"the family {config.model_type} has an encoder"
            elif compile_for is not None:
                module, decoder, not_compiled = _compile(source, read, module, compile_for, limit, narrow)
            # Layers that are replaced below keep their weights, in another layout.
            weight_bytes = num_bytes(module) if decoder is None else decoder.weight_bytes
            if fast and decoder is None and _is_replaceable(module, quantization, narrow):
                speed_up_for_device(module)
            if narrow is not None and decoder is None:
                quantize.narrow_weights(module, narrow, source)
                weight_bytes = num_bytes(module)
            if decoder is None:
                install_attention(module)
        except UnsupportedFamilyError as error:
            raise ModelError(f"{source}: {error}") from error
    else:
        module = skeleton
        num_parameters = _num_parameters(module)
    loaded = LoadedModel(
        source=source,
        folder=folder,
        module=module,
        config=config,
        family=str(config.model_type),
        text=text,
        generation_defaults=read_defaults(
            generation, int(config.get_text_config().vocab_size), num_started=int(is_seq2seq)
        ),
        eos_token_ids=_eos_token_ids(generation, config, text),
        context_length=limit,
        vocab_size=int(config.get_text_config().vocab_size),
        revision=model_files.revision_of(folder, weights.files, text, cache_root),
        num_parameters=num_parameters,
        weight_format=_weight_format(dtype, quantization, narrow),
        weight_bytes=weight_bytes,
        quantization=None if quantization is None else quantization.name,
        not_compiled=not_compiled,
        linear_layers={} if is_seq2seq else _linear_layers(skeleton),
        decoder=decoder,
        is_encoder_decoder=is_seq2seq,
        max_source_tokens=limit if is_seq2seq else 0,
        decoder_start_token_id=families.decoder_start(generation, config) if is_seq2seq else None,
        has_fixed_context=not (is_seq2seq and families.is_unbounded(config)),
    )
    _log.info(
        "model.loaded",
        source=source,
        family=loaded.family,
        revision=loaded.revision[:16],
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        parameters=loaded.num_parameters,
        seconds=round(time.monotonic() - started, 1),
    )
    return loaded


def speed_up_for_device(module: PreTrainedModel) -> tuple[str, ...]:
    """Replace layers by the faster ones of the device; return the names of the changes that were kept."""
    if module.device.type != "cuda":
        return speed_up(module)
    if families.has_encoder(module.config):
        return ()
    try:
        from worker.engine import fuse_cuda
    except ImportError as error:
        _log.warning("kernels.unavailable", reason=str(error), effect="layers as transformers has them, slower")
        return ()
    return fuse_cuda.speed_up(module)


def _skeleton(source: str, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without its weights. Raises ModelError."""
    try:
        with torch.device("meta"):
            from_config: Any = _auto_class(config).from_config
            module: PreTrainedModel = from_config(config, dtype=dtype, attn_implementation="eager")
            return module
    except Exception as error:
        raise ModelError(f"{source}: transformers cannot build a model of config.json: {error}") from error


def _auto_class(config: PretrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if families.has_encoder(config) else AutoModelForCausalLM


def _check_size(source: str, skeleton: PreTrainedModel, weights: Weights) -> None:
    """Refuse a configuration of another size than the files: memory would be filled with numbers that they do not hold.

    Layers that share weights may count twice here.
    """
    described, stored = _num_parameters(skeleton), weights.num_elements
    if described > 2 * stored:
        raise ModelError(f"{source}: config.json describes {described} parameters; the files hold {stored}")


def _set_parameters(config: PretrainedConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of generation; `settings` is all of it, of which `config` loses these entries."""
    from_model_config: Any = GenerationConfig.from_model_config
    generation = from_model_config({**config.to_dict(), **settings})
    return {name: value for name, value in generation.to_diff_dict().items() if value is not None}


def _linear_layers(skeleton: PreTrainedModel) -> dict[str, LinearShape]:
    head: object = skeleton.get_output_embeddings()  # type: ignore[no-untyped-call]
    layers: dict[str, LinearShape] = {}
    for name, layer in skeleton.named_modules():
        if layer is head:
            continue
        if isinstance(layer, torch.nn.Linear):
            layers[name] = LinearShape(layer.in_features, layer.out_features)
        elif isinstance(layer, Conv1D):
            layers[name] = LinearShape(layer.weight.shape[0], layer.weight.shape[1])
    return layers


def _num_parameters(module: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _is_replaceable(module: PreTrainedModel, quantization: Quantization | None, narrow: Narrow | None) -> bool:
    """Whether layers may be made faster: they are plain, and stay what can be quantized where they are to be."""
    if narrow is not None and module.device.type != "cuda":
        return False  # in oneDNN's layout they are no linear layers any more
    return quantization is None or quantization.is_undone


def _weight_format(dtype: torch.dtype, quantization: Quantization | None, narrow: Narrow | None) -> str:
    if narrow is not None:
        return narrow
    if quantization is not None and not quantization.is_undone:
        return quantization.name
    return str(dtype).removeprefix("torch.")


class _Compiled(NamedTuple):
    module: PreTrainedModel
    decoder: CompiledDecoder | None
    reason: str | None  # why there is no decoder


def _compile(
    source: str,
    read: Callable[[], PreTrainedModel],
    module: PreTrainedModel,
    backend: CpuAttention,
    num_positions: int,
    narrow: Narrow | None,
) -> _Compiled:
    """Return the model's decoder, or None and the model as `read` gives it. Raises ModelError for want of int8."""
    if narrow not in (None, "int8"):
        raise ModelError(f"{source}: a compiled decoder has no {narrow} weights; it has int8")
    try:
        return _Compiled(module, compile_decoder(module, backend, num_positions, int8=narrow == "int8"), None)
    except NotLlamaShaped as error:
        reason: Exception = error
    except DecoderDiffers as error:
        reason = error
        module = read()
    if narrow is not None:
        raise ModelError(f"{source}: int8 weights are not for this model: {reason}") from reason
    _log.info("model.not_compiled", family=module.config.model_type, reason=str(reason))
    return _Compiled(module, None, str(reason))


def _load_weights(
    source: str,
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None,
) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    faults = ["missing_keys", "mismatched_keys"]
    extra: dict[str, Any] = {}
    if quantization is not None:
        extra = formats.loading_arguments(quantization, device)
        faults.append("unexpected_keys")  # a scale that is left behind
    try:
        # In evaluation mode already.
        result: Any = _auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **extra,
        )
    except Exception as error:
        raise ModelError(f"{source}: transformers cannot load it: {error}") from error
    module, report = result
    for fault in faults:
        if report.get(fault):
            # transformers would fill them with random numbers, and the model would answer nonsense.
            names = sorted(str(key) for key in report[fault])
            raise ModelError(f"{source}: the weights do not fit the model: {fault} {names[:3]}, {len(names)} in all")
    assert isinstance(module, PreTrainedModel)
    if quantization is None:
        torch.nn.Module.to(module, device)  # in place; the subclass's own `to` is typed wrongly
    else:
        formats.check_loaded(module, quantization, dtype)
    return module


def _eos_token_ids(generation: Mapping[str, Any], config: PretrainedConfig, text: TextFiles) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, else of config.json, else of the tokenizer; () without any."""
    value = generation.get("eos_token_id")
    if value is None:
        value = getattr(config.get_text_config(), "eos_token_id", None)
    if value is None and "eos_token" in text.special_tokens:
        value = text.tokenizer.token_to_id(text.special_tokens["eos_token"])
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise ModelError(f"eos_token_id is {json.dumps(value)}, not a token id or a list of them")
    return tuple(dict.fromkeys(ids))
