"""Device, number format and threads for this machine. Imports torch only inside functions, see `quiet_openmp`."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

DTYPES: Final = ("auto", "bfloat16", "float32")


class DeviceError(Exception):
    """The device or number format asked for is not to be had; the message names what is."""


def quiet_openmp() -> None:
    """Let idle OpenMP threads sleep instead of spin. To be called before torch is first imported.

    Gateway, Redis and clients often share the engine's cores, and a spinning thread takes them away for nothing. The
    runtime reads its environment once, when it is loaded; what the user has set stays.
    """
    if "torch" in sys.modules:
        raise RuntimeError("quiet_openmp() has no effect once torch is imported")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def leave_out_triton(device: str = "auto") -> None:
    """Keep Triton from being imported unless a GPU will compute. To be called before transformers is first imported.

    transformers imports torch's compiler, and that Triton where it is installed: 57 MB for kernels that a CPU never
    runs. None in `sys.modules` is Python's own way to say that there is no such module.
    """
    import torch

    if (device == "cpu" or not torch.cuda.is_available()) and "triton" not in sys.modules:
        sys.modules["triton"] = None  # type: ignore[assignment]


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; "auto" is CUDA where there is a GPU, else the CPU. Raises DeviceError."""
    import torch

    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"unknown device {name!r}; choose auto, cpu, cuda or cuda:<index>") from error
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {name!r} is not supported; choose auto, cpu, cuda or cuda:<index>")
    if device.type == "cuda" and (not has_cuda or (device.index or 0) >= torch.cuda.device_count()):
        found = f"{torch.cuda.device_count()} GPUs" if has_cuda else "no usable GPU"
        raise DeviceError(f"device {name!r} was asked for, but torch {torch.__version__} finds {found}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the number format called `name`; "auto" is bfloat16 where the hardware multiplies it, else float32.

    Raises DeviceError. Without AVX512_BF16 or AMX a CPU emulates bfloat16 products, slower than float32 ones.
    """
    import torch

    if name not in DTYPES:
        raise DeviceError(f"unknown dtype {name!r}; choose one of {', '.join(DTYPES)}")
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products: AVX512_BF16 or AMX on x86, the bf16 extension on Arm."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def cpu_flags() -> frozenset[str]:
    """Return the CPU's features by Linux's names for them; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return frozenset(next(lines, "").split())


def num_compute_threads(reserved: int = 0) -> int:
    """Return how many threads should compute: the physical cores this process may use, less `reserved`, at least 1.

    Hyperthreads share the units that matrix products need, so a core counts once. A container's CPU quota counts too:
    more threads than it allows would be stopped in the middle of every parallel region.
    """
    return max(1, min(_physical_cores(), _cgroup_cpus()) - reserved)


def _physical_cores() -> int:
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_first_sibling(cpu) for cpu in usable}
    return max(1, len(cores))


def _first_sibling(cpu: int) -> str:
    """The CPUs of one core name the same list of siblings; where the system does not tell, a CPU is a core."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _cgroup_cpus() -> int:
    """CPUs that the control group allows, rounded up; a large number without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return sys.maxsize


def memory_use(device: str) -> tuple[int, int]:
    """Return used and all bytes: of a GPU by all processes; on a CPU of this process, and what it may have.

    Zeros where the system does not tell.
    """
    if device.startswith("cuda"):
        import torch

        free, total = torch.cuda.mem_get_info(torch.device(device.split()[0]))
        return total - free, total
    try:
        used = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0, 0
    return used, min(total, _cgroup_bytes())


def _cgroup_bytes() -> int:
    """Memory that the control group allows; a large number without a limit."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return sys.maxsize
