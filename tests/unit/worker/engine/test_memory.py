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
    assert remaining_bytes(80 * GIB, 64 * GIB, 2 * GIB, 0.9) == 72 * GIB - 18 * GIB


def test_no_room_is_told_with_its_reasons() -> None:
    with pytest.raises(
        NoRoomForCache, match=r"8192 MiB may be used \(gpu_memory_fraction 0.5\), 7168 MiB are, and a step "
    ):
        remaining_bytes(16 * GIB, 9 * GIB, GIB, 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_s_cache_fits_beside_the_model() -> None:
    model = tiny_model("llama").to("cuda")
    size = cache_bytes(model, make_settings(token_budget=512, gpu_memory_fraction=0.5))
    free, total = torch.cuda.mem_get_info()
    assert 0 < size < min(free, total // 2)
