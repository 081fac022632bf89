"""What doctor says of a worker's model, kernels and device."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.diagnosis.findings import Level, Surroundings
from tests.builders_models import write_tiny_model
from worker.checks import check_device, check_kernels, check_model, look_at_device, look_at_model
from worker.settings import WorkerSettings


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("TORCHRELAY_"):
            monkeypatch.delenv(name)


async def test_a_whole_model_is_read_without_its_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHRELAY_WORKER_MODEL", str(write_tiny_model(tmp_path / "tiny")))
    (found,) = await check_model(Surroundings())
    assert (found.level, found.check) == (Level.OK, "model")
    assert "gpt2" in found.what or "llama" in found.what


@pytest.mark.parametrize(
    ("lost", "what"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "safetensors"),
        ("tokenizer.json", "tokenizer"),
    ],
)
def test_a_model_with_a_file_missing_is_a_failure(tmp_path: Path, lost: str, what: str) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    (folder / lost).unlink()
    found = look_at_model(WorkerSettings(model=str(folder)))
    assert found.level is Level.FAILURE
    assert what in found.what
    assert "\n" not in found.what
    assert "torchrelay models check" in found.fix


def test_a_folder_that_is_not_there_and_a_model_of_the_hub_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = look_at_model(WorkerSettings(model=str(tmp_path / "nothing")))
    assert (missing.level, "there is no directory" in missing.what) == (Level.FAILURE, True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    on_hub = look_at_model(WorkerSettings(model="nobody/has-this-model-0123456789"))
    assert (on_hub.level, "fetches it from the Hub" in on_hub.what) == (Level.WARNING, True)


async def test_kernels_without_a_compiler_and_not_compiled_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (found,) = await check_kernels(Surroundings())
    assert (found.level, found.check) == (Level.WARNING, "kernels")
    assert found.fix.endswith("-m worker.engine.kernels.build")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    (found,) = await check_kernels(Surroundings())
    assert "no C++ compiler found" in found.what
    assert "apt install g++" in found.fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_and_a_driver_that_torch_cannot_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (found,) = look_at_device("cuda:0", tmp_path)
    assert (found.level, found.check) == (Level.FAILURE, "device")
    assert "TORCHRELAY_WORKER_DEVICE=auto" in found.fix
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = look_at_device("auto", tmp_path)
    assert found.level is Level.OK
    driver = tmp_path / "proc/driver/nvidia/version"
    driver.parent.mkdir(parents=True)
    driver.write_text("NVRM version: 575\n")
    (found,) = look_at_device("auto", tmp_path)
    assert (found.level, "uses no GPU" in found.what) == (Level.WARNING, True)
    assert "requirements-cuda.lock" in found.fix
    (found,) = look_at_device("cpu", tmp_path)
    assert found.level is Level.OK, "whoever asks for the CPU need not be told of a GPU"


@pytest.mark.parametrize(
    ("free", "has_triton", "levels"),
    [
        (70e9, True, [Level.OK]),
        (8e9, True, [Level.WARNING]),
        (70e9, False, [Level.OK, Level.FAILURE]),
    ],
)
def test_a_gpu_that_is_full_or_without_a_compiler_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, has_triton: bool, levels: list[Level]
) -> None:
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(80e9)))
    monkeypatch.setattr("worker.checks.find_spec", lambda name: object() if has_triton else None)
    found = look_at_device("auto", tmp_path)
    assert [one.level for one in found] == levels
    assert found[0].what.startswith("NVIDIA H100 (compute capability 9.0), ")
    assert found[-1].fix == "" or "GPU_MEMORY_FRACTION" in found[-1].fix or "pip install triton" in found[-1].fix


async def test_a_machine_for_gateways_alone_needs_none_of_this(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.checks.find_spec", lambda name: None)
    for check in (check_model, check_kernels, check_device):
        assert await check(Surroundings()) == []
