"""An adapter as the engine holds it. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from common.generation import AdapterRef

ADAPTER_NOT_FOUND: Final = "ADAPTER_NOT_FOUND"


class AdapterFailure(Exception):
    """An adapter cannot be had here; the text is the machine-readable reason that its requests end with."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One revision of an adapter, in memory."""

    ref: AdapterRef
    rank: int
    num_bytes: int
    form: Any  # what the model's runner has made of its weights, and reads


@dataclass(slots=True, eq=False)
class AdapterLease:
    """Keeps an adapter in memory until it is released, which may be said twice. For any thread."""

    adapter: Adapter
    on_release: Callable[[], None] = lambda: None
    _is_released: bool = field(default=False, init=False)

    def release(self) -> None:
        if not self._is_released:
            self._is_released = True
            self.on_release()
