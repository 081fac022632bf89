"""Finds, on a CPU, where a GPU's host would wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Notes every operation for which a GPU's host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = [i for i in args[1] if i is not None] if name in ("index", "index_put", "index_put_") else []
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero") or any(i.dtype == torch.bool for i in indices):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))
