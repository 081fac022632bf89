"""Where the worker keeps what it can make again: compiled kernels, the demo model, digests and verdicts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_dir(*parts: str, root: Path | None = None) -> Path:
    """Return a directory of the per-user cache, created: under `root`, else $XDG_CACHE_HOME or ~/.cache."""
    if root is None:
        base = os.environ.get("XDG_CACHE_HOME", "")
        # The base directory specification: a relative path is invalid and to be ignored.
        root = (Path(base) if base.startswith("/") else Path.home() / ".cache") / "torchrelay"
    path = root.joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` so that a reader sees the old content or the new, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
