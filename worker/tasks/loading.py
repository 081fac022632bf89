"""Loads an encoder model: a body with a pooling, or with the head of a classifier, and what its files say of it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import structlog
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from common.tasks import ScoreFunction
from worker.engine import formats, model_files
from worker.engine.model_dir import check_counts
from worker.engine.model_files import ModelError, TextFiles, find_model, read_json
from worker.engine.quantize import num_bytes
from worker.tasks.facts import EncoderFacts, Head
from worker.tasks.lanes import Lanes
from worker.tasks.runner import DenseLayer, EncoderModule, check_module
from worker.tasks.sentence_files import Dense, SentenceFiles, has_sentence_files, read_sentence_files

_log = structlog.get_logger(__name__)

_HEADS: Final[Mapping[str, Head]] = {
    "ForSequenceClassification": Head.LABELS,
    "ForTokenClassification": Head.TOKEN_LABELS,
    "ForQuestionAnswering": Head.SPANS,
    "ForMaskedLM": Head.VECTOR,
    "ForPreTraining": Head.VECTOR,
    "Model": Head.VECTOR,
}
_CLASSES: Final[Mapping[Head, Any]] = {
    Head.VECTOR: AutoModel,
    Head.LABELS: AutoModelForSequenceClassification,
    Head.TOKEN_LABELS: AutoModelForTokenClassification,
    Head.SPANS: AutoModelForQuestionAnswering,
}
_MOST_LABELS: Final = 1 << 16
_SAMPLE_TOKENS: Final = (5, 17, 11)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEncoder:
    """A model ready to be run."""

    source: str  # as it was asked for
    folder: Path
    module: EncoderModule
    facts: EncoderFacts
    family: str  # transformers' model_type
    text: TextFiles
    max_tokens: int  # of one text, special tokens included
    vocab_size: int
    revision: str  # SHA-256, hex
    num_parameters: int
    weight_bytes: int
    dtype: torch.dtype
    load_check_error: float | None = None  # of texts in a padded batch against each alone; None without weights


def find_head(source: str, revision: str | None = None) -> Head | None:
    """Return what the model at `source` is for by its files, None where it generates text. Raises ModelError.

    Vectors are what sentence-transformers' models are for, whatever their class, and encoders without a head.
    """
    folder = find_model(source, revision)
    config = model_files.check_config_file(folder)
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    found = None
    if isinstance(name, str) and name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():  # some end with LMHeadModel
        found = next((head for suffix, head in _HEADS.items() if name.endswith(suffix)), None)
    if config.get("is_encoder_decoder"):
        if found not in (None, Head.VECTOR):
            raise ModelError(
                f"{source} has a classifier behind a decoder ({name}); classifiers behind encoders are served"
            )
        return None
    return Head.VECTOR if has_sentence_files(folder) else found


def load_encoder(
    source: str,
    head: Head,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    cache_root: Path | None = None,
    *,
    max_tokens: int | None = None,
    with_weights: bool = True,
) -> LoadedEncoder:
    """Load `source`, and check that it answers the same in a padded batch as alone.

    `max_tokens` bounds texts further. Without weights the module stands on the meta device: enough to describe the
    model. Raises ModelError when the model is not there, not safe to load, damaged, or answers otherwise in a batch.
    """
    started = time.monotonic()
    folder = find_model(source, revision)
    settings = model_files.check_config_file(folder)
    quantization = formats.read_quantization(folder, settings)
    if quantization is not None:
        raise ModelError(f"{source} is quantized ({quantization.name}); encoder models are served with plain weights")
    weights = model_files.read_weights(folder)
    check_counts(folder / "config.json", settings, weights.num_tensors)
    formats.check_plain(weights.headers)
    text = model_files.read_text_files(folder)
    sentence = read_sentence_files(folder) if head is Head.VECTOR else SentenceFiles()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{source}: transformers does not accept config.json: {error}") from error
    body = (
        _load(source, folder, head, config, dtype, device) if with_weights else _skeleton(source, head, config, dtype)
    )
    dense = tuple(_dense_layer(layer, dtype, device, with_weights=with_weights) for layer in sentence.dense)
    lanes = Lanes(torch.get_num_threads()) if device.type == "cpu" else None  # a GPU shares a product better itself
    module = EncoderModule(body, head, pooling=sentence.pooling, dense=dense, lanes=lanes)
    limit = _max_tokens(source, folder, config, sentence)
    loaded = LoadedEncoder(
        source=source,
        folder=folder,
        module=module,
        facts=_facts(source, head, config, sentence),
        family=str(config.model_type),
        text=text,
        max_tokens=min(limit, max_tokens or limit),
        vocab_size=int(config.get_text_config().vocab_size),
        revision=_revision(model_files.revision_of(folder, weights.files, text, cache_root), sentence),
        num_parameters=sum(parameter.numel() for parameter in body.parameters()),
        weight_bytes=num_bytes(body) if with_weights else 0,
        dtype=dtype,
    )
    if with_weights:
        lengths = [min(length, loaded.max_tokens) for length in _SAMPLE_TOKENS]
        loaded = replace(loaded, load_check_error=check_module(module, loaded.vocab_size, lengths))
        _log.info(
            "model.loaded",
            source=source,
            family=loaded.family,
            head=str(head),
            revision=loaded.revision[:16],
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            parameters=loaded.num_parameters,
            error=loaded.load_check_error,
            seconds=round(time.monotonic() - started, 1),
        )
    return loaded


def _revision(digest: str, sentence: SentenceFiles) -> str:
    """What lies beside the model decides its answers too."""
    if not sentence.contents:
        return digest
    whole = hashlib.sha256(digest.encode())
    for name, content in sorted(sentence.contents.items()):
        whole.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    whole.update(f"{sentence.max_tokens}\n".encode())
    return whole.hexdigest()


def _max_tokens(source: str, folder: Path, config: PretrainedConfig, sentence: SentenceFiles) -> int:
    """Return the least of what positions, tokenizer and sentence-transformers' files allow. Raises ModelError."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    limits = [sentence.max_tokens, positions]
    if positions is not None and config.model_type in _POSITIONS_BEHIND_PADDING:
        limits[1] = positions - (text.pad_token_id or 0) - 1
    longest = read_json(folder / "tokenizer_config.json").get("model_max_length")
    if isinstance(longest, int | float) and math.isfinite(longest) and 0 < longest < 1 << 24:
        limits.append(int(longest))
    found = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    if not found:
        raise ModelError(f"{source}: nothing says how long its texts may be (max_position_embeddings)")
    return min(found)


# Their positions are counted from behind the padding's id: a table of 514 holds 512.
_POSITIONS_BEHIND_PADDING: Final = frozenset(
    {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xlm-roberta-xl", "roberta-prelayernorm", "esm"}
)


def _facts(source: str, head: Head, config: PretrainedConfig, sentence: SentenceFiles) -> EncoderFacts:
    if head is Head.VECTOR:
        width = sentence.dense[-1].out_features if sentence.dense else int(config.get_text_config().hidden_size)
        return EncoderFacts(head=head, normalizes=sentence.normalizes, dimensions=width)
    if head is Head.SPANS:
        return EncoderFacts(head=head)
    names: Any = config.id2label
    if not isinstance(names, dict) or not 0 < len(names) <= _MOST_LABELS or set(names) != set(range(len(names))):
        raise ModelError(f"{source}: config.json must name a label for each of its logits, from 0 (id2label)")
    labels = tuple(str(names[i]) for i in range(len(names)))
    if config.problem_type == "regression":
        function = ScoreFunction.NONE
    elif config.problem_type == "multi_label_classification" or len(labels) == 1:
        function = ScoreFunction.SIGMOID
    else:
        function = ScoreFunction.SOFTMAX
    return EncoderFacts(head=head, labels=labels, function=function)


def _skeleton(source: str, head: Head, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            module: PreTrainedModel = _CLASSES[head].from_config(config, dtype=dtype)
            return module
    except Exception as error:
        raise ModelError(f"{source}: transformers cannot build a model of config.json: {error}") from error


def _load(
    source: str, folder: Path, head: Head, config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        module, report = _CLASSES[head].from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except Exception as error:
        raise ModelError(f"{source}: transformers cannot load it: {error}") from error
    for fault in ("missing_keys", "mismatched_keys"):
        # A body's pooler is trained for another task, and not looked at here.
        names = sorted(
            str(key) for key in report.get(fault) or () if head is not Head.VECTOR or "pooler." not in str(key)
        )
        if names:
            raise ModelError(f"{source}: the weights do not fit the model: {fault} {names[:3]}, {len(names)} in all")
    assert isinstance(module, PreTrainedModel)
    torch.nn.Module.to(module, device)
    module.eval()  # type: ignore[no-untyped-call]
    return module


def _dense_layer(dense: Dense, dtype: torch.dtype, device: torch.device, *, with_weights: bool) -> DenseLayer:
    layer = torch.nn.Linear(dense.in_features, dense.out_features, bias=dense.has_bias)
    if with_weights:
        try:
            tensors = load_file(dense.weights)
            layer.load_state_dict({name.removeprefix("linear."): tensor for name, tensor in tensors.items()})
        except (RuntimeError, OSError, ValueError) as error:
            raise ModelError(
                f"{dense.weights} does not hold the layer that its config.json describes: {error}"
            ) from error
    return DenseLayer(
        layer.to(device=device, dtype=dtype).eval(), torch.nn.Tanh() if dense.activation == "tanh" else None
    )
