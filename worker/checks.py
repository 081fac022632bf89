"""What `torchrelay doctor` looks at of a worker: its model's files, compiler and kernels, and its device."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from common.diagnosis.findings import Check, Finding, Surroundings, failure, ok, warning
from worker.settings import WorkerSettings

_LOW_GPU_SHARE: Final = 0.2


def checks() -> Sequence[Check]:
    """The entry point of `torchrelay.checks`."""
    return (check_model, check_kernels, check_device)


async def check_model(where: Surroundings) -> Sequence[Finding]:
    """The files of the model that a worker with these settings would serve; its weights are not loaded."""
    settings = _settings()
    return [] if settings is None else [await asyncio.to_thread(look_at_model, settings)]


async def check_kernels(where: Surroundings) -> Sequence[Finding]:
    """Whether the kernels for this CPU are compiled, or could be."""
    settings = _settings()
    return [] if settings is None else [await asyncio.to_thread(look_at_kernels)]


async def check_device(where: Surroundings) -> Sequence[Finding]:
    """The device that a worker with these settings would compute on."""
    settings = _settings()
    return [] if settings is None else await asyncio.to_thread(look_at_device, settings.device, where.root)


def _settings() -> WorkerSettings | None:
    """None where no worker can run, or where the settings are wrong: their own check says so."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        return None  # a machine for gateways
    try:
        return WorkerSettings()
    except ValidationError:
        return None


def look_at_model(settings: WorkerSettings) -> Finding:
    """Read what can be read without loading: configuration, headers of the weights, tokenizer."""
    from worker.engine import model_files
    from worker.engine.model_dir import ModelError

    source = settings.model
    if _is_on_hub(source):
        if _is_cached(source, settings.revision):
            return ok("model", f"{source} is in the Hub's cache on this machine")
        fix = "let it, or fetch it before: `torchrelay models check` with its name"
        return warning("model", f"{source} is not on this machine: a worker fetches it from the Hub at its start", fix)
    try:
        folder = model_files.find_model(source, settings.revision)
        config = model_files.check_config_file(folder)
        weights = model_files.read_weights(folder)
        model_files.read_text_files(folder)
    except ModelError as error:
        fix = "set TORCHRELAY_WORKER_MODEL to a complete model; `torchrelay models check DIR` says more"
        return failure("model", " ".join(str(error).split()), fix)
    return ok("model", f"{source} can be read: {config['model_type']}, {weights.num_tensors} tensors")


def _is_on_hub(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith(("/", ".", "~")) and not Path(source).exists()


def _is_cached(source: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str)


def look_at_kernels() -> Finding:
    """Look for a compiler, and for what it has compiled."""
    from worker.engine.kernels.build import KernelBuildError, find_compiler, library_path, supported_levels

    try:
        compiler = find_compiler()
    except KernelBuildError as error:
        return warning(
            "kernels", f"{error.args[0].partition(';')[0]}: a CPU computes several times slower", _compiler()
        )
    level = supported_levels()[0]
    if library_path(level, compiler).exists():
        return ok("kernels", f"compiled for {level} by {compiler.version}")
    fix = f"{sys.executable} -m worker.engine.kernels.build"
    return warning("kernels", f"not compiled yet for {level}: the first start on a CPU takes longer", fix)


def _compiler() -> str:
    return "install a C++ compiler (Debian: apt install g++), or name one in CXX"


def look_at_device(name: str, root: Path) -> list[Finding]:
    """What torch makes of the device, and what the machine has besides."""
    import torch

    from worker.engine.device import DeviceError, choose_device

    try:
        device = choose_device(name)
    except DeviceError as error:
        fix = "set TORCHRELAY_WORKER_DEVICE=auto, or install the driver and torch for CUDA (requirements-cuda.lock)"
        return [failure("device", str(error), fix)]
    if device.type != "cuda":
        if name != "cpu" and _has_nvidia_driver(root):
            what = f"this machine has an NVIDIA driver, but torch {torch.__version__} uses no GPU"
            fix = "install torch for CUDA (requirements-cuda.lock), or a driver that is new enough for it"
            return [warning("device", what, fix)]
        return [ok("device", f"the CPU computes, with {torch.get_num_threads()} threads")]
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    major, minor = properties.major, properties.minor
    what = f"{properties.name} (compute capability {major}.{minor}), {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
    found = [ok("device", what)]
    if free < _LOW_GPU_SHARE * total:
        fix = "end what uses the GPU, or share it: TORCHRELAY_ENGINE_GPU_MEMORY_FRACTION"
        found = [warning("device", what, fix)]
    if find_spec("triton") is None:
        fix = f"{sys.executable} -m pip install triton"
        found.append(failure("device", "the package triton is missing: the GPU's kernels are compiled by it", fix))
    return found


def _has_nvidia_driver(root: Path) -> bool:
    return (root / "proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
