"""Triton for tests: on the GPU where there is one, else through its interpreter, else not at all.

To be imported before any kernel. Skips the importing test module where triton is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _let_scalars_count() -> None:
    """numpy 2.4 no longer turns an array of one element into an int, which triton 3.6's interpreter asks of it."""
    from triton.runtime import interpreter

    patch: Callable[[Any, Any], None] = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


def _let_fp8_round() -> None:
    """The interpreter forgets to carry into the exponent: 127 becomes 64 in e4m3. torch rounds as a GPU does."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert: Callable[..., Any] = interpreter._convert_float

    def convert_float(data: Any, from_type: Any, to_type: Any, rounding_mode: Any) -> Any:
        if from_type != tl.float32 or to_type != tl.float8e4nv:
            return convert(data, from_type, to_type, rounding_mode)
        return torch.tensor(data).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = convert_float


_let_scalars_count()
_let_fp8_round()


def enlarge_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """For whole models: the interpreter takes as long for a program with 32 outputs as for a GPU's usual two."""
    from worker.engine.kernels.triton import vector

    usual = vector._tile

    def tile(num_outputs: int, depth: int, itemsize: int, *, is_gated: bool) -> tuple[int, int, int]:
        return math.gcd(num_outputs, 32), *usual(num_outputs, depth, itemsize, is_gated=is_gated)[1:]

    monkeypatch.setattr(vector, "_tile", tile)
