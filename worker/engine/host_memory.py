"""Large stretches of memory on the CPU: zero, in huge pages where the system has them, and taken only when touched."""

from __future__ import annotations

import math
import mmap

import torch


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
