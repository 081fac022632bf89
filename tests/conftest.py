"""What holds for every test: where there is no NVIDIA GPU, Triton kernels are interpreted.

Set before anything imports triton, which reads it when kernels, its own included, are defined.
"""

from __future__ import annotations

import os
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
