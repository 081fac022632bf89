"""The Triton kernels compile for a Hopper GPU: the interpreter takes programs that the compiler refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.builders_triton import triton

SHARED_BYTES_OF_A_PROGRAM = 227 << 10  # the most on compute capability 9.0


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    assert triton.__version__
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    result = subprocess.run(
        [sys.executable, "-m", "tests.unit.worker.engine.hopper"],
        cwd=Path(__file__).parents[4],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    parsed: dict[str, list[dict[str, Any]]] = json.loads(result.stdout.splitlines()[-1])
    return parsed


@pytest.mark.long
def test_every_kernel_becomes_machine_code_that_fits_a_multiprocessor(report: dict[str, list[dict[str, Any]]]) -> None:
    kernels = [kernel for case in report.values() for kernel in case]
    assert {kernel["kernel"] for kernel in kernels} == {
        "tile_kernel",
        "store_kernel",
        "attend_kernel",
        "merge_kernel",
        "_rms_norm_kernel",
        "_gated_kernel",
        "_rotary_kernel",
        "_part_kernel",
        "_join_kernel",
        "_quantize_kernel",
        "_vector_kernel",
    }
    assert all(kernel["is_machine_code"] for kernel in kernels)
    assert max(kernel["shared_bytes"] for kernel in kernels) <= SHARED_BYTES_OF_A_PROGRAM


@pytest.mark.parametrize("case", ["llama", "one share", "narrow values"])
def test_prefills_of_half_precision_use_hopper_s_wide_products(
    case: str, report: dict[str, list[dict[str, Any]]]
) -> None:
    decode, prefill = (kernel for kernel in report[case] if kernel["kernel"] == "attend_kernel")
    assert prefill["wgmma"]
    assert not decode["wgmma"]  # too few rows


def test_float32_is_not_rounded_to_tf32(report: dict[str, list[dict[str, Any]]]) -> None:
    assert not any(kernel["tf32"] for kernel in report["float32"])


def test_a_kernel_that_begins_early_waits_before_it_touches_what_others_write(
    report: dict[str, list[dict[str, Any]]],
) -> None:
    for case, kernels in report.items():
        for kernel in kernels:
            before, _, behind = kernel["accesses"].partition("w")
            assert before.startswith("l"), kernel  # the next one may begin at once
            assert "w" not in behind
            assert "s" in behind
            # Weights are nobody's to write, and are all that is read before.
            assert set(before[1:]) == ({"r"} if kernel["kernel"] == "_vector_kernel" else set()), (case, kernel)
