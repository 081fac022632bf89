"""Memory in large stretches: taken lazily or ahead, and given back."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import pytest
import torch

from worker.engine import host_memory
from worker.engine.host_memory import lazy_zeros, populate, release

SIZE = 64 << 20
LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None

pytestmark = pytest.mark.skipif(LIBC is None, reason="asks Linux which pages are there")


def resident_bytes(*tensors: torch.Tensor) -> int:
    """Of these very tensors: what a process holds as a whole changes with what other tests left behind."""
    num_pages = 0
    for tensor in tensors:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        end = tensor.data_ptr() + tensor.nbytes
        pages = (ctypes.c_ubyte * -(-(end - start) // mmap.PAGESIZE))()
        assert LIBC is not None
        if LIBC.mincore(ctypes.c_void_p(start), ctypes.c_size_t(end - start), pages) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        num_pages += sum(page & 1 for page in pages)
    return num_pages * mmap.PAGESIZE


def test_memory_is_taken_when_it_is_populated_and_not_before() -> None:
    tensors = [lazy_zeros((SIZE // 4,), torch.float32) for _ in range(2)]
    assert resident_bytes(*tensors) == 0
    populate(tensors).join()
    assert all(resident_bytes(tensor) >= SIZE - (2 << 20) for tensor in tensors)  # some may be swapped out again
    assert all(not tensor.any() for tensor in tensors)


def test_content_survives_being_populated() -> None:
    tensor = lazy_zeros((SIZE // 4,), torch.float32)
    tensor[::4096] = torch.arange(len(tensor[::4096]), dtype=torch.float32)
    expected = tensor.clone()
    populate([tensor]).join()
    assert torch.equal(tensor, expected)


def test_a_kernel_that_cannot_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_MADV_POPULATE_WRITE", 9999)
    tensor = lazy_zeros((SIZE // 4,), torch.float32)
    populate([tensor]).join()
    assert resident_bytes(tensor) == 0
    tensor.fill_(1)
    assert float(tensor.sum()) == SIZE // 4


def test_released_memory_is_given_back() -> None:
    tensor = lazy_zeros((SIZE // 4,), torch.float32).fill_(1)
    assert resident_bytes(tensor) >= SIZE - (2 << 20)
    release(tensor)
    assert resident_bytes(tensor) == 0
