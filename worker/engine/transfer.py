"""Small tensors on their way from the host to the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy from the host without waiting for what the device does."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def to_device(values: Iterable[int], device: torch.device) -> torch.Tensor:
    """Return [n] int64 on the device, copied likewise."""
    return on_device(torch.tensor(list(values), dtype=torch.int64), device)
