"""Choosing device, number format and threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from worker.engine import device
from worker.engine.device import (
    DeviceError,
    choose_device,
    choose_dtype,
    leave_out_triton,
    num_compute_threads,
    quiet_openmp,
)

CPU = torch.device("cpu")


def test_auto_is_the_gpu_where_there_is_one() -> None:
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["tpu-v9", "mps", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(DeviceError, match=name):
        choose_device(name)


def test_formats_by_name_and_by_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_dtype("float32", CPU) is torch.float32
    assert choose_dtype("bfloat16", CPU) is torch.bfloat16
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    for has_products, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(device, "cpu_multiplies_bfloat16", lambda has=has_products: has)
        assert choose_dtype("auto", CPU) is expected
    with pytest.raises(DeviceError, match="int4"):
        choose_dtype("int4", CPU)


def test_threads_are_bounded_by_cores_quota_and_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= num_compute_threads() <= (os.cpu_count() or 1)
    monkeypatch.setattr(device, "_physical_cores", lambda: 16)
    monkeypatch.setattr(device, "_cgroup_cpus", lambda: 6)
    assert num_compute_threads() == 6
    assert num_compute_threads(reserved=2) == 4
    assert num_compute_threads(reserved=9) == 1


@pytest.mark.parametrize(
    ("content", "cpus"), [("150000 100000\n", 2), ("max 100000\n", sys.maxsize), ("", sys.maxsize)]
)
def test_the_cpu_quota_is_rounded_up(content: str, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(content)
    monkeypatch.setattr(device, "Path", lambda _: file)
    assert device._cgroup_cpus() == cpus


def test_hyperthreads_of_a_core_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5})
    monkeypatch.setattr(device, "_first_sibling", lambda cpu: f"{cpu % 4},{cpu % 4 + 4}")
    assert device._physical_cores() == 2


def test_openmp_is_quieted_before_torch_and_not_after() -> None:
    with pytest.raises(RuntimeError, match="once torch is imported"):
        quiet_openmp()
    program = (
        "import os, sys\nfrom worker.engine.device import quiet_openmp\nquiet_openmp()\n"
        "assert 'torch' not in sys.modules\nprint(os.environ['OMP_WAIT_POLICY'])"
    )
    for setting, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {**os.environ, "OMP_WAIT_POLICY": setting or ""}
        if setting is None:
            del environment["OMP_WAIT_POLICY"]
        result = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        assert result.stdout.strip() == expected


@pytest.mark.parametrize(
    ("device_name", "has_gpu", "stays"), [("auto", True, True), ("cpu", True, False), ("auto", False, False)]
)
def test_triton_is_left_out_where_no_gpu_will_compute(
    monkeypatch: pytest.MonkeyPatch, device_name: str, has_gpu: bool, stays: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    others = {name: module for name, module in sys.modules.items() if name != "triton"}
    monkeypatch.setattr(sys, "modules", others)
    leave_out_triton(device_name)
    assert ("triton" not in others) == stays
    monkeypatch.setattr(sys, "modules", {**others, "triton": pytest})
    leave_out_triton(device_name)
    assert sys.modules["triton"] is pytest  # imported already


def test_an_engine_is_imported_without_triton() -> None:
    program = (
        "import sys\nfrom worker.engine.device import leave_out_triton\nleave_out_triton('cpu')\n"
        "import worker.assembly, transformers.modeling_utils\n"
        "print([name for name, module in sys.modules.items() if name.split('.')[0] == 'triton' and module])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
