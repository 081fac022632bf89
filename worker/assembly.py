"""Builds a worker's engine from its settings: model, attention, KV cache, and the card that tells others of it."""

from __future__ import annotations

from dataclasses import dataclass

import structlog
import torch

from common.registry import ModelCard
from worker.detokenizer import IncrementalDetokenizer
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.attention.interface import AttentionBackend
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.cost import CostModel, StepBudget
from worker.engine.device import choose_device, choose_dtype, num_compute_threads
from worker.engine.kernels.build import KernelBuildError
from worker.engine.loadcheck import check_model
from worker.engine.loop import Engine
from worker.engine.model import load_model
from worker.engine.probe import probe_cost
from worker.engine.runner import ModelRunner
from worker.engine.settings import EngineSettings
from worker.registration import make_card
from worker.settings import WorkerSettings

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Assembly:
    """What a worker process runs, and what it publishes."""

    engine: Engine
    card: ModelCard
    files: dict[str, bytes]
    device: str


def assemble(settings: WorkerSettings, engine_settings: EngineSettings) -> Assembly:
    """Load the model, check that it answers rightly here, and allocate the KV cache: seconds to minutes.

    Raises ModelError, DeviceError, UnsupportedFamilyError, and ValueError where settings contradict the model.
    """
    device = choose_device(settings.device)
    torch.set_num_threads(settings.num_threads or num_compute_threads())
    loaded = load_model(settings.model, choose_dtype(settings.dtype, device), device, settings.revision)
    backend = choose_backend(device, loaded.dtype, engine_settings.block_size)
    check_model(loaded, backend)
    longest = min(engine_settings.max_model_len or loaded.context_length, loaded.context_length)
    engine_settings = engine_settings.model_copy(update={"max_model_len": longest})
    runner = ModelRunner(loaded.module, backend, engine_settings)
    engine = Engine(
        runner,
        engine_settings,
        lambda: IncrementalDetokenizer(loaded.text.tokenizer),
        cost=measure_cost(runner, engine_settings),
        cache_salt=f"{loaded.revision}:{loaded.dtype}".encode(),
    )
    stats = engine.stats()
    card, files = make_card(
        loaded,
        name=settings.model_name or default_name(settings.model),
        context_tokens=engine.max_model_len,
        block_tokens=stats.block_size,
        kv_tokens=stats.num_blocks * stats.block_size,
    )
    log.info(
        "engine.ready",
        model=card.name,
        device=describe_device(device),
        dtype=card.dtype,
        attention=backend.name,
        threads=torch.get_num_threads(),
        kv_tokens=card.kv_tokens,
        context_tokens=card.context_tokens,
    )
    return Assembly(engine, card, files, describe_device(device))


def measure_cost(runner: ModelRunner, settings: EngineSettings) -> CostModel:
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
    """Return the fastest attention that works here; without a compiler, say so and take torch's."""
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and block_size == CpuAttention.block_size:
        try:
            return CpuAttention()
        except KernelBuildError as error:
            log.warning("kernels.unavailable", reason=str(error), effect="attention in torch: right, but slower")
    return TorchAttention(block_size)


def describe_device(device: torch.device) -> str:
    """Return the device with its name, such as `cuda:0 NVIDIA H100`."""
    if device.type == "cuda":
        return f"cuda:{device.index or 0} {torch.cuda.get_device_name(device)}"
    return "cpu"


def default_name(source: str) -> str:
    """Return the name of a model that the operator gave none: the last part of its path or id."""
    return "smollm2-135m-instruct" if source == "demo" else source.rstrip("/").rsplit("/", 1)[-1]
