"""Memory of the CPU in large stretches: taken when it is touched or ahead of that, in huge pages, and given back."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from typing import Final

import torch

_LIBC: Final = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14
_PIECES: Final = 64  # that a tensor is populated in


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


def populate(tensors: Sequence[torch.Tensor]) -> threading.Thread:
    """Start to take the memory of these tensors, which keep their content, and return the thread that does.

    A page costs its first reader more than reading it: on virtual machines, where the host finds memory too, by some
    milliseconds for each 2 MiB. The thread gives way to all others, and goes from the beginnings of all tensors to
    their ends. What it cannot take (too little memory, an old kernel) comes when it is touched.
    """

    def run() -> None:
        if _LIBC is None:
            return
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        for piece in range(_PIECES):
            for tensor in tensors:
                start, size = tensor.data_ptr(), tensor.nbytes
                begin = (start + size * piece // _PIECES) // mmap.PAGESIZE * mmap.PAGESIZE
                end = start + size * (piece + 1) // _PIECES
                # Foreign functions are called without the interpreter's lock.
                if _LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_POPULATE_WRITE) != 0:
                    return

    thread = threading.Thread(target=run, name="populate-memory", daemon=True)
    thread.start()
    return thread


def trim() -> None:
    """Give what the allocator keeps for later back to the system, where the C library can."""
    if _LIBC is not None and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
