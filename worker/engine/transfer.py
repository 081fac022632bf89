"""Small tensors on their way from the host to the device, and back."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy from the host without waiting for what the device does."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def to_device(values: Iterable[int], device: torch.device) -> torch.Tensor:
    """Return [n] int64 on the device, copied likewise."""
    return on_device(torch.tensor(list(values), dtype=torch.int64), device)


class ToHost:
    """A copy to the host that begins now and is waited for later, alone: not for what the device is given meanwhile."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> torch.Tensor:
        """Return the copy; on the CPU the tensor itself."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor
