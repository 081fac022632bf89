"""Memory of the CPU in large stretches: taken when it is touched, in huge pages, and given back."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from typing import Final

import torch

_LIBC: Final = ctypes.CDLL(None) if sys.platform.startswith("linux") else None


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros that take no memory before they are written or read.

    Weights and KV blocks are read from end to end at every step: with small pages each of them would cost a lookup.
    Raises MemoryError when the system refuses the address range.
    """
    num_bytes = max(1, math.prod(shape) * dtype.itemsize)
    try:
        if hasattr(mmap, "MAP_ANONYMOUS"):
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            memory = mmap.mmap(-1, num_bytes)
    except OSError as error:
        raise MemoryError(f"{num_bytes} bytes are not to be had: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


def release(tensor: torch.Tensor) -> None:
    """Give the pages of a tensor that nobody will read again back to the system; its content is undefined from now on.

    A model is packed layer by layer, and the weights that are packed already would else stay in memory until the last
    layer is done, or for as long as anything else of their file is mapped. Does nothing where there is no madvise.
    """
    if _LIBC is None or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def trim() -> None:
    """Give what the allocator keeps for later back to the system, where the C library can."""
    if _LIBC is not None and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
