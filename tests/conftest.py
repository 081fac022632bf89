"""What holds for every test: torch has one thread, and where there is no NVIDIA GPU, Triton kernels are interpreted.

The latter is set before anything imports triton, which reads it when kernels, its own included, are defined. Before
anything imports torch, idle threads are told to sleep, as in a worker: beside other tests, those that look for work
instead take the core of the one that has some. grpc's handlers at a fork are left out, as in `torchrelay serve`: where
a call is in progress they crash the child, and a fork here is followed by an exec, which needs none.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="module")
def num_torch_threads() -> Iterator[None]:
    """One: at a tiny model's sizes threads wait for each other longer than they compute, the longer the busier the CPU.

    Tests of our own kernels, which divide their work among these threads too, override this and have all of them.
    """
    torch = sys.modules.get("torch")  # not to be imported for tests that do without
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def uncached_loggers() -> Iterator[None]:
    """A module's logger that has been used keeps its processors, which `capture_logs` then does not reach: not here."""
    configure = structlog.configure

    def without_cache(**options: Any) -> None:
        configure(**{**options, "cache_logger_on_first_use": False})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structlog, "configure", without_cache)
        yield
