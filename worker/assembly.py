"""Builds a worker's engine from its settings: model, attention, KV cache, and the card that tells others of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
import structlog
import torch

from common.registry import ModelCard
from worker.adapters import AdapterFolder
from worker.chat.text import ChatReader
from worker.detokenizer import IncrementalDetokenizer
from worker.engine.adapters.files import AdapterLimits
from worker.engine.adapters.store import AdapterStore
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.attention.interface import AttentionBackend
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.cost import CostModel, StepBudget
from worker.engine.device import DeviceError, choose_device, choose_dtype, num_compute_threads
from worker.engine.graphs import CudaRecorder, GraphRunner
from worker.engine.host_memory import trim
from worker.engine.kernels.build import KernelBuildError
from worker.engine.loadcheck import check_model
from worker.engine.loop import Engine, Runner
from worker.engine.memory import limit_memory
from worker.engine.model import ModelError, load_model
from worker.engine.probe import probe_cost
from worker.engine.quantize import Narrow, check_device
from worker.engine.runner import ModelRunner
from worker.engine.sampler import Argmax
from worker.engine.settings import EngineSettings
from worker.engine.thread import StepEngine, StepStart
from worker.engine.types import OnPart, ignore_part
from worker.profiling import StepProfiler
from worker.registration import make_card
from worker.settings import WorkerSettings
from worker.structured import make_compiler
from worker.tasks.assembly import make_encoder_card, make_engine
from worker.tasks.facts import Head
from worker.tasks.loading import find_head, load_encoder

log = structlog.get_logger()

_SLOWER: Final = "attention in torch: right, but slower"


@dataclass(frozen=True, slots=True)
class Assembly:
    """What a worker process runs, and what it publishes."""

    engine: StepEngine
    card: ModelCard
    files: dict[str, bytes]
    device: str
    adapters: AdapterFolder | None = None  # None: none are served
    store: AdapterStore | None = None
    step_start: StepStart | None = None  # told of the engine's steps


def assemble(settings: WorkerSettings, engine_settings: EngineSettings) -> Assembly:
    """Load the model, check that it answers rightly here, and allocate the KV cache: seconds to minutes.

    Raises ModelError, DeviceError, UnsupportedFamilyError, and ValueError where settings contradict the model.
    """
    device = choose_device(settings.device)
    torch.set_num_threads(settings.num_threads or num_compute_threads())
    dtype = choose_dtype(settings.dtype, device)
    narrow = None if settings.quantization == "none" else settings.quantization
    if narrow is not None:
        check_device(narrow, device, dtype)
    head = find_head(settings.model, settings.revision)
    if head is not None:
        return _assemble_encoder(settings, engine_settings, head, dtype, device)
    backend = choose_backend(device, dtype, engine_settings.block_size)
    if narrow is not None:
        check_narrow(narrow, device, dtype, backend)
    loaded = load_model(
        settings.model,
        dtype,
        device,
        settings.revision,
        compile_for=backend if isinstance(backend, CpuAttention) else None,
        narrow=narrow,
    )
    if loaded.decoder is None:  # a compiled decoder was checked when it was made
        check_model(loaded, backend)
    longest = engine_settings.max_model_len or loaded.context_length
    if loaded.has_fixed_context:
        longest = min(longest, loaded.context_length)
    engine_settings = engine_settings.model_copy(update={"max_model_len": longest})
    on_part: OnPart = ignore_part
    if settings.profile_steps:
        on_part = StepProfiler(settings.profile_steps, Path(settings.profile_file), device, loaded.decoder).on_part
    step_start = StepStart(on_part)
    adapt = loaded.linear_layers if settings.adapters_dir else None
    model_runner = ModelRunner(loaded.module, backend, engine_settings, loaded.decoder, step_start.on_part, adapt=adapt)
    runner = make_runner(model_runner, engine_settings)
    cost = measure_cost(runner, engine_settings)
    trim()  # what loading and the probe have left behind
    model_runner.populate_cache()  # not before: it would disturb what is measured
    grammars = make_compiler(loaded.text.tokenizer_json, loaded.vocab_size, loaded.eos_token_ids)
    engine = Engine(
        runner,
        engine_settings,
        lambda: IncrementalDetokenizer(loaded.text.tokenizer),
        cost=cost,
        cache_salt=f"{loaded.revision}:{loaded.dtype}:{settings.quantization}".encode(),
        argmax=choose_argmax(backend),
        grammars=grammars,
        on_part=step_start.on_part,
        read_chat=ChatReader(loaded.text.tokenizer),
    )
    loaded = replace(loaded, context_length=longest, max_source_tokens=engine.max_source_tokens)
    stats = engine.stats()
    card, files = make_card(
        loaded,
        name=settings.model_name or default_name(settings.model),
        context_tokens=engine.max_model_len,
        block_tokens=stats.block_size,
        kv_tokens=stats.num_blocks * stats.block_size,
        max_sequences=engine_settings.max_num_seqs,
        attention_backend=backend.name,
        tool_format=settings.tool_format,
        reasoning_format=settings.reasoning_format,
        structured_output=grammars is not None,
        tasks=settings.tasks,
    )
    folder = store = None
    if settings.adapters_dir:
        limits = AdapterLimits(settings.max_adapter_rank, settings.adapter_bytes)
        folder = AdapterFolder(Path(settings.adapters_dir), model_runner.adaptable, limits, model_runner.load_adapter)
        store = AdapterStore(folder, max_adapters=settings.max_loaded_adapters, max_bytes=settings.adapter_bytes)
        card = msgspec.structs.replace(card, adapters=folder.scan())
    log.info(
        "engine.ready",
        model=card.name,
        device=describe_device(device),
        dtype=card.dtype,
        attention=backend.name,
        compiled=loaded.decoder is not None,
        quantization=settings.quantization,
        threads=torch.get_num_threads(),
        kv_tokens=card.kv_tokens,
        context_tokens=card.context_tokens,
        adapters=[adapter.name for adapter in card.adapters],
    )
    return Assembly(engine, card, files, describe_device(device), folder, store, step_start)


def _assemble_encoder(
    settings: WorkerSettings, engine_settings: EngineSettings, head: Head, dtype: torch.dtype, device: torch.device
) -> Assembly:
    """As `assemble`, of a model whose tasks are those of encoders."""
    for name in ("quantization", "adapters_dir", "tasks"):
        if getattr(settings, name) not in ("", "none"):
            raise ModelError(f"{settings.model} is an encoder model: {name} is only for models that generate text")
    limit = engine_settings.max_model_len
    limit_memory(device, engine_settings)
    loaded = load_encoder(settings.model, head, dtype, device, settings.revision, max_tokens=limit)
    engine = make_engine(loaded, engine_settings, device)
    name = settings.model_name or default_name(settings.model)
    card, files = make_encoder_card(loaded, name, settings.max_jobs)
    trim()
    log.info(
        "engine.ready",
        model=card.name,
        device=describe_device(device),
        dtype=card.dtype,
        tasks=card.tasks,
        threads=torch.get_num_threads(),
        context_tokens=card.context_tokens,
    )
    return Assembly(engine, card, files, describe_device(device))


def check_narrow(narrow: Narrow, device: torch.device, dtype: torch.dtype, backend: AttentionBackend) -> None:
    """Refuse narrow weights that cannot be had here, before the model is loaded. Raises DeviceError."""
    check_device(narrow, device, dtype)
    if device.type == "cpu" and not isinstance(backend, CpuAttention):
        raise DeviceError(f"{narrow} weights need the compiled kernels on a CPU, and this worker has none")


def make_runner(runner: ModelRunner, settings: EngineSettings) -> Runner:
    """Return what runs the steps: on a GPU, all but the largest are recorded now and replayed from then on."""
    if runner.device.type != "cuda" or runner.attention_name == TorchAttention.name:  # torch's waits for the device
        return runner
    if runner.max_source_tokens:  # what its classes compute is not recorded
        return runner
    return GraphRunner(
        runner,
        CudaRecorder(runner.device),
        settings.max_num_seqs,
        settings.block_size,
        max_num_tokens=settings.most_recorded_tokens,
    )


def measure_cost(runner: Runner, settings: EngineSettings) -> CostModel:
    """Probe what steps cost here, and log it with the token budgets that follow."""
    cost = probe_cost(runner, settings)
    budget = StepBudget(settings, cost)
    log.info(
        "engine.probed",
        step_ms={num_rows: round(ms, 2) for num_rows, ms in cost.points},
        token_budget=budget.most_tokens(num_decodes=1),
        prefill_token_budget=budget.most_tokens(num_decodes=0),
    )
    return cost


def choose_backend(device: torch.device, dtype: torch.dtype, block_size: int) -> AttentionBackend:
    """Return the fastest attention that works here; without a compiler or Triton, say so and take torch's."""
    if device.type == "cuda":
        try:
            from worker.engine.attention.triton_paged import TritonAttention
        except ImportError as error:
            log.warning("kernels.unavailable", reason=str(error), effect=_SLOWER)
        else:
            if block_size == TritonAttention.block_size:
                return TritonAttention()
            log.warning("kernels.unavailable", reason=f"they need blocks of 16, not {block_size}", effect=_SLOWER)
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and block_size == CpuAttention.block_size:
        try:
            return CpuAttention()
        except KernelBuildError as error:
            log.warning("kernels.unavailable", reason=str(error), effect=_SLOWER)
    return TorchAttention(block_size)


def choose_argmax(backend: AttentionBackend) -> Argmax | None:
    """Return what finds the largest scores where there is something faster than torch: with the compiled kernels."""
    if isinstance(backend, CpuAttention):
        return backend.kernels.argmax
    if backend.name == TorchAttention.name:
        return None
    from worker.engine.kernels.triton.argmax import argmax

    return argmax


def describe_device(device: torch.device) -> str:
    """Return the device with its name, such as `cuda:0 NVIDIA H100`."""
    if device.type == "cuda":
        return f"cuda:{device.index or 0} {torch.cuda.get_device_name(device)}"
    return "cpu"


def default_name(source: str) -> str:
    """Return the name of a model that the operator gave none: the last part of its path or id."""
    return "smollm2-135m-instruct" if source == "demo" else source.rstrip("/").rsplit("/", 1)[-1]
