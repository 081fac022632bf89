"""Compiles the CPU kernels: `python -m worker.engine.kernels.build` at install, or at first use; with `--prebuild` for
every CPU of the architecture, beside the source: for images, whose last stage has no compiler.

One shared library per instruction set, of one source compiled with that set's flags. It has a plain C interface and
includes no torch header, so it compiles in seconds and fits every torch version; it is linked against the OpenMP
runtime that torch has brought, because two runtimes in one process would compete for the cores.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
import torch
from filelock import FileLock, Timeout

from worker.cache import cache_dir
from worker.engine.device import cpu_flags

_log = structlog.get_logger(__name__)

_HERE: Final = Path(__file__).resolve().parent
_PREBUILT: Final = _HERE / "prebuilt"
_SOURCE: Final = _HERE / "kernels.cpp"
_HEADERS: Final = (
    *(
        "arena.h",
        "attend.h",
        "decoder.h",
        "decoder_step.h",
        "fetch.h",
        "grouped.h",
        "grouped_bytes.h",
        "grouped_pairs.h",
        "low_rank.h",
        "matmul.h",
        "paged_attention.h",
        "product.h",
        "rows.h",
        "simd.h",
        "team.h",
        "tile.h",
    ),
)
_COMPILERS: Final = ("g++", "c++", "clang++")
_LOCK_TIMEOUT_S: Final = 300
_COMPILE_TIMEOUT_S: Final = 240

# -ffp-contract=fast: multiply-adds become one instruction. No -ffast-math: NaN and infinity keep their meaning.
# -Wno-psabi: vectors never cross the library's interface, so how they would be passed does not matter.
_FLAGS: Final = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"),
)

# -mprfchw: without it compilers fetch what is about to be written as if it were to be read; processors that lack the
# instruction skip it.
_AVX2: Final = ("-mavx2", "-mfma", "-mprfchw")
_AVX512: Final = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *_AVX2)

_X86: Final = ("x86_64", "AMD64")
LEVEL_FLAGS: Final[Mapping[str, tuple[str, ...]]] = {
    "avx512_bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "generic": (),  # what every CPU of the architecture has: SSE2, or NEON
}
"""Instruction sets and their flags, the best first."""


class KernelBuildError(Exception):
    """The kernels could not be compiled; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler found on this machine."""

    command: tuple[str, ...]
    version: str  # the first line of --version


def supported_levels() -> tuple[str, ...]:
    """Return the instruction sets that this CPU can run, the best first."""
    capability = torch.backends.cpu.get_cpu_capability()
    levels = tuple(LEVEL_FLAGS)
    if capability.startswith("AVX512"):
        return levels if {"avx512_bf16", "avx512_vnni"} <= cpu_flags() else levels[1:]
    return levels[2:] if capability == "AVX2" else levels[3:]


def find_compiler() -> Compiler:
    """Return $CXX, else the first of g++, c++, clang++. Raises KernelBuildError without one."""
    candidates: Sequence[Sequence[str]] = [(name,) for name in _COMPILERS]
    if os.environ.get("CXX"):
        candidates = [shlex.split(os.environ["CXX"])]
    for command in candidates:
        if shutil.which(command[0]) is None:
            continue
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=False)
        if result.returncode == 0:
            return Compiler(tuple(command), result.stdout.partition("\n")[0])
    tried = ", ".join(command[0] for command in candidates)
    raise KernelBuildError(
        f"no C++ compiler found (tried {tried}); install one (Debian: apt install g++) or name one in CXX"
    )


def openmp_arguments() -> tuple[str, ...]:
    """Return the arguments that compile with OpenMP and link torch's own runtime, where torch brings one.

    Named by its file, the runtime enters the library under torch's own name for it (wheels rename theirs), so that the
    loader finds the one that torch has loaded already.
    """
    folders = (Path(torch.__file__).parent / "lib", Path(torch.__file__).parent.parent / "torch.libs")
    if sys.platform == "darwin":
        bundled = folders[0] / "libomp.dylib"
        return ("-Xpreprocessor", "-fopenmp", *((str(bundled),) if bundled.exists() else ("-lomp",)))
    bundled_files = sorted(file for folder in folders for file in folder.glob("libgomp*.so*"))
    return ("-fopenmp", *(str(file) for file in bundled_files[:1]))


def library_path(level: str, compiler: Compiler, cache_root: Path | None = None) -> Path:
    """Return where the library of `level` belongs: named by everything that its content depends on."""
    return cache_dir("kernels", root=cache_root) / _library_name(level, *compiler.command, compiler.version)


def prebuilt_path(level: str) -> Path:
    """Return where an image's library of `level` is: named as in the cache, but for the compiler, which is gone."""
    return _PREBUILT / _library_name(level)


def _library_name(level: str, *compiler: str) -> str:
    digest = hashlib.sha256()
    for name in (_SOURCE.name, *_HEADERS):
        digest.update((_HERE / name).read_bytes())
    flags = (*_FLAGS, *LEVEL_FLAGS[level], *openmp_arguments())
    for part in (*compiler, *flags, torch.__version__):
        digest.update(part.encode() + b"\0")
    return f"kernels-{platform.machine()}-{level}-{digest.hexdigest()[:16]}.so"


def build(level: str | None = None, cache_root: Path | None = None) -> Path:
    """Return the library for `level` (default: the best of this CPU), compiled unless it is prebuilt or in the cache.

    Several processes may build at once: one compiles, the others wait for it. Raises KernelBuildError.
    """
    level = level or supported_levels()[0]
    if (prebuilt := prebuilt_path(level)).exists():
        return prebuilt
    compiler = find_compiler()
    path = library_path(level, compiler, cache_root)
    if path.exists():
        return path
    try:
        with FileLock(path.with_suffix(".lock"), timeout=_LOCK_TIMEOUT_S):
            if not path.exists():
                _compile(compiler, level, path)
    except Timeout as error:
        raise KernelBuildError(f"another process has held {error.lock_file} for {_LOCK_TIMEOUT_S} s") from error
    return path


def prebuild() -> tuple[Path, ...]:
    """Compile the library of every instruction set of this architecture into the package. Raises KernelBuildError."""
    compiler = find_compiler()
    _PREBUILT.mkdir(exist_ok=True)
    levels = tuple(LEVEL_FLAGS) if platform.machine() in _X86 else ("generic",)
    paths = tuple(prebuilt_path(level) for level in levels)
    for level, path in zip(levels, paths, strict=True):
        _compile(compiler, level, path)
    return paths


def _compile(compiler: Compiler, level: str, path: Path) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        output = Path(folder) / path.name
        flags = (*_FLAGS, *LEVEL_FLAGS[level])
        command = [*compiler.command, *flags, str(_SOURCE), *openmp_arguments(), "-o", str(output)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelBuildError(f"{shlex.join(command)}: {error}") from error
        if result.returncode != 0:
            raise KernelBuildError(f"{shlex.join(command)} failed:\n{result.stderr[-2000:]}")
        output.replace(path)
    _log.info("kernels.built", level=level, compiler=compiler.version, seconds=round(time.monotonic() - started, 1))


def main(arguments: Sequence[str] = ()) -> int:
    """Build for this CPU; without a compiler say so and succeed, since everything works without the kernels, slower.

    With `--prebuild` build for all CPUs into the package, and fail without a compiler.
    """
    if list(arguments) == ["--prebuild"]:
        for path in prebuild():
            sys.stdout.write(f"CPU kernels: {path}\n")
        return 0
    if arguments:
        sys.stderr.write(f"unknown arguments {shlex.join(arguments)}: there is --prebuild\n")
        return 2
    try:
        path = build()
    except KernelBuildError as error:
        sys.stderr.write(f"CPU kernels not built, attention will use torch and be slower: {error}\n")
        return 0
    sys.stdout.write(f"CPU kernels: {path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
