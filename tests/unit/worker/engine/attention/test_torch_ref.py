"""The torch back-end against attention written out in float64, one row at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders_attention import Case, by_hand, distance_bias, make_case
from worker.engine.attention.interface import AttentionBatch, AttentionOptions, LayerShape
from worker.engine.attention.torch_ref import TorchAttention

CPU = torch.device("cpu")


def attend(case: Case, options: AttentionOptions, block_size: int, fill: float = 0.0) -> torch.Tensor:
    """Put the earlier rows into the cache by hand, then attend over the step."""
    backend = TorchAttention(block_size)
    num_blocks = 1 + sum(-(-len(k) // block_size) for k in case.keys)
    shape = LayerShape(case.keys[0].shape[1], case.keys[0].shape[2], case.values[0].shape[2])
    cache = backend.allocate(shape, num_blocks, torch.float32, CPU)
    cache.keys.fill_(fill)
    cache.values.fill_(fill)
    keys, values = [], []
    for i, (k, v, query_len) in enumerate(zip(case.keys, case.values, case.query_lens, strict=True)):
        for position in range(len(k) - query_len):
            block = int(case.batch.block_tables[i, position // block_size])
            cache.keys[block, position % block_size] = k[position]
            cache.values[block, position % block_size] = v[position]
        keys.append(k[len(k) - query_len :])
        values.append(v[len(v) - query_len :])
    return backend.attend(case.query, torch.cat(keys), torch.cat(values), cache, case.batch, options)


_lens = st.lists(
    st.one_of(st.integers(1, 300), st.integers(1, 20)).flatmap(
        lambda context: st.tuples(st.just(context), st.one_of(st.just(1), st.integers(1, context)))
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=60, deadline=None)
@given(
    lens=_lens,
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (4, 1)]),
    dims=st.sampled_from([(8, 8), (8, 4)]),
    block_size=st.sampled_from([4, 16]),
    window=st.sampled_from([None, 1, 7, 1000]),
    softcap=st.sampled_from([None, 3.0]),
    has_sinks=st.booleans(),
    num_distances=st.sampled_from([None, None, 1, 21]),
    seed=st.integers(0, 1000),
)
def test_any_batch_is_what_the_formula_gives(
    lens: list[tuple[int, int]],
    heads: tuple[int, int],
    dims: tuple[int, int],
    block_size: int,
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    num_distances: int | None,
    seed: int,
) -> None:
    case = make_case(lens, *heads, *dims, block_size, seed)
    sinks = torch.linspace(-1, 2, heads[0]) if has_sinks else None
    bias = None if num_distances is None else distance_bias(heads[0], num_distances)
    options = AttentionOptions(scale=0.3, sliding_window=window, softcap=softcap, sinks=sinks, distance_bias=bias)
    output = attend(case, options, block_size)
    assert output.is_contiguous()
    torch.testing.assert_close(output.double(), by_hand(case, options), rtol=1e-4, atol=1e-5)


def test_nan_left_behind_in_a_block_does_not_reach_its_next_owner() -> None:
    lens = [(5, 1), (7, 1), (30, 1), (18, 5), (200, 1)]
    case = make_case(lens, 4, 2, 8, 8, 16, seed=1)
    options = AttentionOptions(scale=0.3)
    output = attend(case, options, 16, fill=float("nan"))
    torch.testing.assert_close(output.double(), by_hand(case, options), rtol=1e-4, atol=1e-5)


def test_two_layers_of_a_step_share_the_preparation_but_not_the_window() -> None:
    case = make_case([(20, 1), (12, 6)], 4, 2, 8, 8, 4, seed=2)
    for window in (None, 5, None):
        options = AttentionOptions(scale=0.3, sliding_window=window)
        torch.testing.assert_close(attend(case, options, 4).double(), by_hand(case, options), rtol=1e-4, atol=1e-5)


def test_a_new_batch_is_prepared_anew() -> None:
    backend = TorchAttention(4)
    cache = backend.allocate(LayerShape(1, 8, 8), 9, torch.float32, CPU)
    case = make_case([(1, 1)], 1, 1, 8, 8, 4, seed=3)
    other = replace(
        case.batch, slots=torch.tensor([30], dtype=torch.int32), block_tables=torch.tensor([[7]], dtype=torch.int32)
    )
    for batch in (case.batch, other):
        backend.attend(case.query, case.keys[0], case.values[0], cache, batch, AttentionOptions(scale=1.0))
    assert torch.equal(cache.keys[7, 2], case.keys[0][0])


def test_bfloat16_stays_bfloat16() -> None:
    backend = TorchAttention(4)
    cache = backend.allocate(LayerShape(1, 8, 8), 3, torch.bfloat16, CPU)
    case = make_case([(3, 3)], 2, 1, 8, 8, 4, seed=4)
    inputs = [tensor.to(torch.bfloat16) for tensor in (case.query, case.keys[0], case.values[0])]
    for options in (AttentionOptions(scale=0.3), AttentionOptions(scale=0.3, softcap=2.0)):
        output = backend.attend(*inputs, cache, case.batch, options)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output.double(), by_hand(case, options), rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_gpu_gives_what_the_cpu_gives() -> None:
    lens = [(5, 1), (150, 1), (30, 30), (18, 5), (200, 1), (140, 1)]
    case = make_case(lens, 6, 2, 64, 64, 16, seed=5)
    device = torch.device("cuda")
    backend = TorchAttention(16)
    cache = backend.allocate(LayerShape(2, 64, 64), 100, torch.float32, device)
    keys = torch.cat([k[len(k) - n :] for k, n in zip(case.keys, case.query_lens, strict=True)])
    batch = AttentionBatch(
        case.batch.slots.to(device),
        case.batch.block_tables.to(device),
        case.batch.query_starts.to(device),
        case.batch.context_lens.to(device),
        case.batch.max_query_len,
        case.batch.max_context_len,
    )
    options = AttentionOptions(scale=0.125)
    on_gpu = backend.attend(case.query.to(device), keys.to(device), keys.to(device), cache, batch, options)
    host = TorchAttention(16)
    host_cache = host.allocate(LayerShape(2, 64, 64), 100, torch.float32, CPU)
    on_cpu = host.attend(case.query, keys, keys, host_cache, case.batch, options)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-4)
