"""Compiles the kernels for a Hopper GPU that need not be there, launched by the code that always launches them.

A program: prints one JSON object, by case the kernels and what the compiler made of them. Not for TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.builders_attention import make_case
from worker.engine.attention import triton_paged
from worker.engine.attention.interface import AttentionOptions, LayerShape
from worker.engine.attention.triton_paged import TritonAttention
from worker.engine.kernels.triton import argmax, layers, rows, vector

_kernels: list[Any] = []
_run = JITFunction.run


def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
    _kernels.append(_run(self, *args, **{**kwargs, "warmup": True}))


def attend(
    dtype: torch.dtype, heads: tuple[int, int], dims: tuple[int, int], num_shares: int = 4, **options: Any
) -> None:
    """One decode and one prefill."""
    case = make_case([(300, 1), (150, 150)], *heads, *dims, 16, seed=1)
    backend = TritonAttention(num_shares)
    cache = backend.allocate(LayerShape(heads[1], *dims), 40, dtype, torch.device("cpu"))
    key = torch.cat([case.keys[0][-1:], case.keys[1]]).to(dtype)
    value = torch.cat([case.values[0][-1:], case.values[1]]).to(dtype)
    backend.attend(case.query.to(dtype), key, value, cache, case.batch, AttentionOptions(scale=0.1, **options))


def elementwise() -> None:
    x = torch.zeros(1, 4, 4096, dtype=torch.bfloat16)
    layers.rms_norm(x, x[0, 0], 1e-5, 0.0)
    layers.gated(x, layers.SILU)
    layers.gated(x, layers.GELU_TANH)
    heads = x.view(1, 4, 32, 128)
    argmax.argmax(x[0])
    rows.quantize_rows(x, norm=vector.Norm(x[0, 0], 1e-5, 0.0))
    rows.quantize_rows(x, activation=layers.SILU)
    layers.rotate_in_place(heads.transpose(1, 2), heads[:, :, :8].transpose(1, 2), x[..., :128], x[..., 128:256])


def product_of_a_row() -> None:
    """The four of a decoder layer, with Llama's dimensions but few outputs."""
    x = torch.zeros(1, 14336, dtype=torch.bfloat16)
    norm = vector.Norm(x[0, :4096], 1e-5, 0.0)
    vector.multiply(x[:, :4096], torch.zeros(64, 4096, dtype=torch.bfloat16), norm=norm)
    vector.multiply(x[:, :4096], torch.zeros(64, 4096, dtype=torch.bfloat16), addend=x[0, :64])
    vector.multiply(x[:, :4096], torch.zeros(64, 4096, dtype=torch.bfloat16), norm=norm, activation=layers.SILU)
    vector.multiply(x, torch.zeros(64, 14336, dtype=torch.bfloat16), addend=x[0, :64])
    codes, scales = torch.zeros(64, 4096, dtype=rows.FORMAT), torch.zeros(64)
    factors = vector.Scales(scales, scales[:1])
    vector.multiply(codes[:1], codes, scales=factors, activation=layers.SILU, dtype=torch.bfloat16)


def order_of_accesses(ptx: str) -> str:
    """Of a kernel, in order: l for letting the next kernel begin, w for waiting, r for reading, s for storing."""
    reads = dict.fromkeys(("ld.global", "cp.async.ca", "cp.async.cg"), "r")
    letters = {"griddepcontrol.launch": "l", "griddepcontrol.wait": "w", **reads, "st.global": "s"}
    return "".join(letters[found] for found in re.findall("|".join(map(re.escape, letters)), ptx))


def main() -> None:
    """Compile all cases."""
    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    JITFunction.run = compile_only
    for module in (argmax, layers, rows, triton_paged, vector):
        module.launch_options = lambda device: {"OVERLAPS": True, "launch_pdl": True}
    sinks = torch.zeros(8)
    cases = {
        "llama": lambda: attend(torch.bfloat16, (32, 8), (128, 128)),
        "one share": lambda: attend(torch.bfloat16, (8, 1), (64, 64), 1, sliding_window=128, softcap=30.0, sinks=sinks),
        "narrow values": lambda: attend(torch.float16, (4, 4), (192, 128), sinks=torch.zeros(4)),
        "float32": lambda: attend(torch.float32, (9, 3), (64, 64)),
        "elementwise": elementwise,
        "products of a row": product_of_a_row,
    }
    report = {}
    for name, case in cases.items():
        case()
        report[name] = [
            {
                "kernel": kernel.metadata.name,
                "accesses": order_of_accesses(kernel.asm["ptx"]),
                "shared_bytes": kernel.metadata.shared,
                "wgmma": "wgmma.mma_async" in kernel.asm["ptx"],
                "tf32": "tf32" in kernel.asm["ptx"],
                "is_machine_code": len(kernel.asm["cubin"]) > 0,
            }
            for kernel in _kernels
        ]
        _kernels.clear()
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
