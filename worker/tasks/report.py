"""What `torchrelay models check` says of an encoder model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker.engine.closeness import TOLERANCE
from worker.engine.device import choose_device, choose_dtype, num_compute_threads
from worker.settings import WorkerSettings
from worker.tasks.facts import Head
from worker.tasks.loading import load_encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderReport:
    """How a model is served on this machine."""

    source: str
    revision: str
    family: str  # transformers' model_type
    tasks: tuple[str, ...]
    num_parameters: int
    weight_bytes: int
    dtype: str
    device: str
    context_tokens: int  # of one text
    labels: tuple[str, ...]
    embedding_dimensions: int
    normalizes: bool  # vectors have length 1 by default
    load_check_error: float  # padded batch against each text alone, relative
    load_check_tolerance: float
    vocab_size: int
    tokenizer_size: int  # ids that the tokenizer has


def check_encoder(settings: WorkerSettings, head: Head) -> EncoderReport:
    """Load and check a model. Raises ModelError, DeviceError."""
    device = choose_device(settings.device)
    torch.set_num_threads(settings.num_threads or num_compute_threads())
    dtype = choose_dtype(settings.dtype, device)
    loaded = load_encoder(settings.model, head, dtype, device, settings.revision)
    assert loaded.load_check_error is not None, "it was loaded with its weights"
    return EncoderReport(
        source=loaded.source,
        revision=loaded.revision,
        family=loaded.family,
        tasks=tuple(map(str, loaded.facts.tasks)),
        num_parameters=loaded.num_parameters,
        weight_bytes=loaded.weight_bytes,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        context_tokens=loaded.max_tokens,
        labels=loaded.facts.labels,
        embedding_dimensions=loaded.facts.dimensions,
        normalizes=loaded.facts.normalizes,
        load_check_error=loaded.load_check_error,
        load_check_tolerance=TOLERANCE[dtype],
        vocab_size=loaded.vocab_size,
        tokenizer_size=loaded.text.tokenizer.get_vocab_size(),
    )


def describe_encoder(report: EncoderReport) -> str:
    """Return the report as lines for people."""
    vectors = f"{report.embedding_dimensions} numbers{', length 1' if report.normalizes else ''}"
    lines = {
        "family": report.family,
        "tasks": ", ".join(report.tasks),
        "parameters": f"{report.num_parameters:,}",
        "weights": f"{report.weight_bytes:,} bytes as {report.dtype}",
        "computes in": f"{report.dtype} on {report.device}",
        "context": f"{report.context_tokens} tokens a text",
        **({"labels": ", ".join(report.labels)} if report.labels else {}),
        **({"vectors": vectors} if report.embedding_dimensions else {}),
        "load check": f"relative error {report.load_check_error:.2g}, allowed {report.load_check_tolerance:.2g}",
        "tokenizer": f"{report.tokenizer_size} ids of {report.vocab_size}",
        "revision": report.revision,
    }
    body = "".join(f"  {name:<14}{text}\n" for name, text in lines.items())
    return f"{report.source} can be served\n{body}"
