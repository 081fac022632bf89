"""Memory in large stretches: taken lazily or ahead, and given back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from worker.engine import host_memory
from worker.engine.host_memory import lazy_zeros, populate, release

SIZE = 64 << 20

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def test_memory_is_taken_when_it_is_populated_and_not_before() -> None:
    before = resident_bytes()
    tensors = [lazy_zeros((SIZE // 4,), torch.float32) for _ in range(2)]
    assert resident_bytes() - before < SIZE
    populate(tensors).join()
    assert resident_bytes() - before >= 2 * SIZE - (8 << 20)
    assert all(not tensor.any() for tensor in tensors)


def test_content_survives_being_populated() -> None:
    tensor = lazy_zeros((SIZE // 4,), torch.float32)
    tensor[::4096] = torch.arange(len(tensor[::4096]), dtype=torch.float32)
    expected = tensor.clone()
    populate([tensor]).join()
    assert torch.equal(tensor, expected)


def test_a_kernel_that_cannot_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_MADV_POPULATE_WRITE", 9999)
    before = resident_bytes()
    tensor = lazy_zeros((SIZE // 4,), torch.float32)
    populate([tensor]).join()
    assert resident_bytes() - before < SIZE
    tensor.fill_(1)
    assert float(tensor.sum()) == SIZE // 4


def test_released_memory_is_given_back() -> None:
    tensor = lazy_zeros((SIZE // 4,), torch.float32).fill_(1)
    before = resident_bytes()
    release(tensor)
    assert before - resident_bytes() >= SIZE - (8 << 20)
