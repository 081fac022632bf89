"""Which attention a worker runs with."""

from __future__ import annotations

import sys

import pytest
import torch
from structlog.testing import capture_logs

from tests.builders_triton import triton
from worker.assembly import choose_backend

CUDA = torch.device("cuda")


def test_a_gpu_gets_triton() -> None:
    assert triton.__version__
    assert choose_backend(CUDA, torch.bfloat16, 16).name == "triton"


def test_a_gpu_without_triton_gets_torch_and_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "worker.engine.attention.triton_paged", raising=False)
    with capture_logs() as logs:
        assert choose_backend(CUDA, torch.bfloat16, 16).name == "torch_ref"
    assert [entry["event"] for entry in logs] == ["kernels.unavailable"]
    assert "triton" in logs[0]["reason"]


def test_blocks_of_another_size_get_torch_and_a_warning() -> None:
    with capture_logs() as logs:
        assert choose_backend(CUDA, torch.bfloat16, 64).name == "torch_ref"
    assert logs[0]["reason"] == "they need blocks of 16, not 64"


def test_a_cpu_never_gets_triton() -> None:
    assert choose_backend(torch.device("cpu"), torch.float32, 16).name in ("cpu_ext", "torch_ref")
