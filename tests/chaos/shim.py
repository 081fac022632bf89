"""The library that moves a process's wall clock, slows its fsync and fills its disk: built here, steered by a file."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Final

_SOURCE: Final = Path(__file__).with_name("shim.c")
_FORMAT: Final = struct.Struct("=qqqq")  # `struct control` of shim.c


def compiler() -> str | None:
    """Return a C compiler, None where there is none."""
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def build(folder: Path) -> Path:
    """Compile the library. Raises RuntimeError without a compiler."""
    program = compiler()
    if program is None:
        raise RuntimeError("clocks, fsync and full disks are injected by a small C library: install a C compiler")
    library = folder / "shim.so"
    command = [program, "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


class Shim:
    """What is wrong with one process's clock and disk; everything is right at first."""

    def __init__(self, library: Path, control: Path) -> None:
        control.write_bytes(bytes(_FORMAT.size))
        self._library = library
        self._control = control
        with control.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _FORMAT.size)
        self._values = [0, 0, 0, 0]

    @property
    def env(self) -> dict[str, str]:
        """Variables of a process that this is to act on."""
        return {"LD_PRELOAD": str(self._library), "CHAOS_SHIM": str(self._control)}

    def _set(self, index: int, value: int) -> None:
        self._values[index] = value
        self._map[:] = _FORMAT.pack(*self._values)

    def set_clock_offset(self, seconds: int) -> None:
        """Step the wall clock to so many seconds off the true time."""
        self._set(0, seconds * 1000)

    def set_fsync_delay(self, seconds: float) -> None:
        """Have each fsync take so much longer."""
        self._set(1, int(seconds * 1000))

    def set_disk_full(self, full: bool) -> None:
        """Have writes to files fail with ENOSPC."""
        self._set(2, int(full))

    def close(self) -> None:
        self._map.close()


def wrap_program(program: Path, shim: Shim, path: Path) -> Path:
    """Write a script that runs a program under the shim, for callers that take a program's path; return it."""
    words = " ".join(f"{name}='{value}'" for name, value in shim.env.items())
    path.write_text(f"#!/bin/sh\nexec env {words} '{os.fspath(program)}' \"$@\"\n")
    path.chmod(0o755)
    return path
