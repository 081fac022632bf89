"""Kernels that begin before the one before them has ended: programmatic dependent launch, from Hopper on.

Between two launches of a stream a GPU drains: the last programs of the one run alone, and the first of the next begin
when all is over. At batch 1 such gaps are a tenth of a step. A kernel that is launched with these options may begin as
soon as every program of the kernel before it runs, and waits by itself (`gdc_wait`) until that one has ended, with all
that it wrote. So each of our kernels

    1.  lets the next one begin: first of all, since that only takes room that nothing else wants any more
    2.  reads what no kernel writes, which is weights
    3.  waits, in every program and before any other access, writes included: what comes behind relies on its end to
        mean that everything before it has ended too

CUDA graphs keep such launches as they are. (CUDA C++ Programming Guide, Programmatic Dependent Launch.)
"""

from __future__ import annotations

from functools import cache
from typing import Final, TypedDict

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_LEAST_CAPABILITY: Final = (9, 0)


class LaunchOptions(TypedDict):
    """Of every launch: the kernel's own parameter, and Triton's."""

    OVERLAPS: bool
    launch_pdl: bool


@triton.jit
def start_early(OVERLAPS: tl.constexpr):
    """What a kernel that reads nothing beforehand does first."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()


@cache
def launch_options(device: torch.device) -> LaunchOptions:
    """Return how to launch kernels on this device."""
    overlaps = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    return {"OVERLAPS": overlaps, "launch_pdl": overlaps}
