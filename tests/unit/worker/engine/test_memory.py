"""How much memory the KV cache gets."""

from __future__ import annotations

import pytest
import torch

from tests.builders_engine import make_settings, tiny_model
from worker.engine.memory import CPU_CACHE_BYTES, NoRoomForCache, cache_bytes, remaining_bytes

GIB = 1 << 30


def test_a_cpu_gets_a_gibibyte_unless_told_otherwise() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    assert cache_bytes(model, make_settings()) == CPU_CACHE_BYTES == GIB
    assert cache_bytes(model, make_settings(kv_cache_bytes=12345)) == 12345


def test_a_gpu_gets_what_its_share_leaves() -> None:
    # 80 GiB, of which 72 may be used; 16 are, and a step takes 2.
    assert remaining_bytes(80 * GIB, 64 * GIB, 16 * GIB, 2 * GIB, 0.9) == 72 * GIB - 18 * GIB


def test_workers_on_one_gpu_have_a_share_each() -> None:
    # Each takes 0.45 of 100 GiB, whatever the other has taken already: weights are 5, and a step takes 1.
    first = remaining_bytes(100 * GIB, 95 * GIB, 5 * GIB, GIB, 0.45)
    second = remaining_bytes(100 * GIB, 95 * GIB - first - 6 * GIB, 5 * GIB, GIB, 0.45)
    assert first == second == 39 * GIB
    # A third finds less than its share: what is free but for a margin.
    assert remaining_bytes(100 * GIB, 10 * GIB, 5 * GIB, GIB, 0.45) == 7 * GIB


def test_no_room_is_told_with_its_reasons() -> None:
    with pytest.raises(
        NoRoomForCache, match=r"8192 MiB may be used \(gpu_memory_fraction 0.5\), 7168 MiB are, 9216 MiB of the device "
    ):
        remaining_bytes(16 * GIB, 9 * GIB, 7 * GIB, GIB, 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_s_cache_fits_beside_the_model() -> None:
    model = tiny_model("llama").to("cuda")
    size = cache_bytes(model, make_settings(token_budget=512, gpu_memory_fraction=0.5))
    free, total = torch.cuda.mem_get_info()
    assert 0 < size < min(free, total // 2)
