"""`torchrelay models check`: loads a model as a worker would, and says how it can be served or why it cannot."""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from common.startup import CANNOT_START, read_settings
from worker.assembly import choose_backend, describe_device
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.attention.interface import AttentionBackend
from worker.engine.closeness import TOLERANCE, Closeness
from worker.engine.device import choose_device, choose_dtype, num_compute_threads
from worker.engine.loadcheck import check_module, context_limit, probe_attention
from worker.engine.model import LoadedModel, ModelError, load_model
from worker.engine.settings import EngineSettings
from worker.settings import WorkerSettings
from worker.tasks.loading import find_head
from worker.tasks.report import check_encoder, describe_encoder

_CPU: Final = torch.device("cpu")  # the only device with a compiled decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Report:
    """Whether int8 weights are to be had, and how far they move the logits."""

    is_possible: bool
    error: float | None = None  # relative to the spread of a token's logits
    tolerance: float | None = None
    reason: str | None = None  # why not


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """How a model is served on this machine."""

    source: str
    revision: str
    family: str  # transformers' model_type
    num_parameters: int
    quantization: str | None  # of the files
    weight_format: str  # in memory
    weight_bytes: int
    dtype: str  # of computation, keys and values
    device: str
    context_tokens: int
    context_limited_by: str | None
    max_source_tokens: int  # that an encoder reads; 0 without one
    layers: Mapping[str, int]  # number of layers by kind of attention, "sliding window 512" or "full"
    attention: str  # name of the back-end
    is_compiled: bool  # runs as the compiled decoder
    not_compiled_because: str | None
    load_check_error: float  # packed, paged and chunked logits against the plain model's, see closeness.py
    load_check_tolerance: float
    int8: Int8Report
    vocab_size: int
    tokenizer_size: int  # ids that the tokenizer has
    has_chat_template: bool


def check_model_dir(*, as_json: bool) -> int:
    """Check the model of the environment's settings and print what was found; return the exit status.

    0: it can be served. CANNOT_START: it cannot, and the reason is printed.
    """
    settings, engine_settings = read_settings(
        lambda: (WorkerSettings(), EngineSettings()), WorkerSettings, EngineSettings
    )
    try:
        head = find_head(settings.model, settings.revision)
        if head is not None:
            encoder = check_encoder(settings, head)
            text, found = describe_encoder(encoder), asdict(encoder)
        else:
            report = check(settings, engine_settings)
            text, found = describe(report), asdict(report)
    except Exception as error:  # noqa: BLE001 - as in a worker: every library on the way has its own
        reason = str(error) or type(error).__name__
        if as_json:
            _write_json({"can_be_served": False, "source": settings.model, "reason": reason})
        else:
            sys.stdout.write(f"{settings.model} cannot be served: {reason}\n")
        return CANNOT_START
    if as_json:
        _write_json({"can_be_served": True, **found})
    else:
        sys.stdout.write(text)
    return 0


def _write_json(value: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def check(settings: WorkerSettings, engine_settings: EngineSettings) -> ModelReport:
    """Load and check a model. Raises ModelError, DeviceError, UnsupportedFamilyError."""
    device = choose_device(settings.device)
    torch.set_num_threads(settings.num_threads or num_compute_threads())
    dtype = choose_dtype(settings.dtype, device)
    backend = choose_backend(device, dtype, engine_settings.block_size)
    compile_for = backend if isinstance(backend, CpuAttention) else None
    loaded = load_model(settings.model, dtype, device, settings.revision, compile_for=compile_for)
    closeness = _closeness(loaded, backend)
    limit = context_limit(loaded.config)
    not_compiled = _not_compiled(loaded, compile_for)
    report: dict[str, Any] = {
        "source": loaded.source,
        "revision": loaded.revision,
        "family": loaded.family,
        "num_parameters": loaded.num_parameters,
        "quantization": loaded.quantization,
        "weight_format": loaded.weight_format,
        "weight_bytes": loaded.weight_bytes,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": describe_device(device),
        "context_tokens": limit.tokens,
        "context_limited_by": limit.reason,
        "max_source_tokens": loaded.max_source_tokens,
        "layers": _layers(loaded),
        "attention": backend.name,
        "is_compiled": loaded.decoder is not None,
        "not_compiled_because": not_compiled,
        "load_check_error": closeness.error,
        "load_check_tolerance": closeness.tolerance,
        "vocab_size": loaded.vocab_size,
        "tokenizer_size": loaded.text.tokenizer.get_vocab_size(),
        "has_chat_template": loaded.text.chat_template is not None,
    }
    del loaded  # or memory would have to hold both
    gc.collect()
    int8 = (
        Int8Report(is_possible=False, reason=not_compiled)
        if compile_for is None or not_compiled is not None
        else _try_int8(settings, dtype, compile_for)
    )
    return ModelReport(**report, int8=int8)


def _closeness(loaded: LoadedModel, backend: AttentionBackend) -> Closeness:
    if loaded.decoder is not None and loaded.decoder.closeness is not None:
        return loaded.decoder.closeness  # it was checked when it was made
    return Closeness(check_module(loaded.module, backend), TOLERANCE[loaded.dtype])


def _layers(loaded: LoadedModel) -> dict[str, int]:
    probes = probe_attention(loaded.module) if loaded.decoder is None else loaded.decoder.layer_probes
    windows = (probe.options.sliding_window for probe in probes.values())
    return dict(Counter("full" if window is None else f"sliding window {window}" for window in windows))


def _not_compiled(loaded: LoadedModel, compile_for: CpuAttention | None) -> str | None:
    if loaded.decoder is not None:
        return None
    return loaded.not_compiled if compile_for else f"there are no kernels for {loaded.dtype} on this device"


def _try_int8(settings: WorkerSettings, dtype: torch.dtype, backend: CpuAttention) -> Int8Report:
    try:
        loaded = load_model(settings.model, dtype, _CPU, settings.revision, compile_for=backend, narrow="int8")
    except ModelError as error:
        return Int8Report(is_possible=False, reason=str(error))
    assert loaded.decoder is not None, "a model with int8 weights is compiled"
    assert loaded.decoder.closeness is not None, "a compiled decoder was compared"
    return Int8Report(
        is_possible=True, error=loaded.decoder.closeness.error, tolerance=loaded.decoder.closeness.tolerance
    )


def describe(report: ModelReport) -> str:
    """Return the report as lines for people."""
    files = report.quantization or "plain weights"
    compiled = "yes" if report.is_compiled else f"no: {report.not_compiled_because}"
    int8 = report.int8
    if int8.is_possible:
        int8_text = f"possible; error of the logits {int8.error:.2g}, allowed {int8.tolerance:.2g}"
    else:
        int8_text = f"not possible: {int8.reason}"
    layers = ", ".join(f"{number} x {kind}" for kind, number in report.layers.items())
    context = f"{report.context_tokens} tokens"
    if report.max_source_tokens:
        context += f", behind a source of {report.max_source_tokens}"
    if report.context_limited_by is not None:
        context += f"; limited: {report.context_limited_by}"
    lines = {
        "family": report.family,
        "parameters": f"{report.num_parameters:,}",
        "files": files,
        "weights": f"{report.weight_bytes:,} bytes as {report.weight_format}",
        "computes in": f"{report.dtype} on {report.device}",
        "context": context,
        "layers": layers,
        "attention": report.attention,
        "compiled": compiled,
        "load check": f"error of the logits {report.load_check_error:.2g}, allowed {report.load_check_tolerance:.2g}",
        "int8": int8_text,
        "tokenizer": f"{report.tokenizer_size} ids of {report.vocab_size}",
        "chat template": "present" if report.has_chat_template else "absent",
        "revision": report.revision,
    }
    body = "".join(f"  {name:<14}{text}\n" for name, text in lines.items())
    return f"{report.source} can be served\n{body}"
