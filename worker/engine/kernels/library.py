"""The compiled kernels, loaded."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Final

import structlog
import torch

from worker.engine.kernels.build import KernelBuildError, build

_log = structlog.get_logger(__name__)

_ABI_VERSION: Final = 6  # kAbiVersion of paged_attention.h


class Kernels:
    """The functions of the library. Each releases the GIL while it runs and returns a status, 0 for success."""

    def __init__(self, level: str | None = None, cache_root: Path | None = None) -> None:
        """Load the kernels for an instruction set (default: the best of this CPU), compiling them if need be.

        Raises KernelBuildError when there is no working compiler.
        """
        library = build(level, cache_root)
        try:
            loaded = ctypes.CDLL(str(library))
            version = loaded.torchrelay_abi_version()
        except (OSError, AttributeError) as error:
            raise KernelBuildError(f"{library} cannot be loaded: {error}; delete it to compile it again") from error
        if version != _ABI_VERSION:
            raise KernelBuildError(f"{library} has interface version {version}, not {_ABI_VERSION}; delete it")
        self.paged_attention = loaded.torchrelay_paged_attention
        self.paged_attention.argtypes = [ctypes.c_char_p]
        self.paged_attention.restype = ctypes.c_int
        self.decoder_step = loaded.torchrelay_decoder_step
        self.decoder_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.decoder_step.restype = ctypes.c_int
        self._argmax = loaded.torchrelay_argmax
        self._argmax.argtypes = [*(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64), ctypes.c_void_p, ctypes.c_int64]
        runtimes = openmp_runtimes()
        if len(runtimes) > 1:
            _log.warning("kernels.openmp_runtimes_compete", runtimes=sorted(runtimes))

    def argmax(self, scores: torch.Tensor) -> torch.Tensor:
        """Return where each row's largest score stands, [num_rows] int64; its complement, which is negative, where
        that score is not finite.

        `scores` is [num_rows, width] float32. A NaN counts as the largest, as with torch's argmax.
        """
        scores = scores.contiguous()
        num_rows, width = scores.shape
        result = torch.empty(num_rows, dtype=torch.int64)
        self._argmax(scores.data_ptr(), num_rows, width, result.data_ptr(), torch.get_num_threads())
        return result


def openmp_runtimes() -> frozenset[str]:
    """Return the files of the OpenMP runtimes in this process; empty where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return frozenset()
    mapped = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    return frozenset(file for file in mapped if Path(file).name.startswith(("libgomp", "libiomp5", "libomp")))
