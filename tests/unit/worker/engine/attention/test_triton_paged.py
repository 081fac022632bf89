"""The Triton kernels against the torch back-end: compiled where there is a GPU, else through Triton's interpreter."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.builders_attention import Case, by_hand, distance_bias, make_case
from tests.builders_engine import TokenNames, generate, make_request, make_settings, reference_tokens, tiny_model
from tests.builders_models import tiny_module
from tests.builders_triton import DEVICE
from worker.engine.attention import triton_paged
from worker.engine.attention.interface import AttentionBatch, AttentionOptions, LayerCache, LayerShape
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.attention.triton_paged import TritonAttention
from worker.engine.kernels.triton import attention as kernels
from worker.engine.loadcheck import check_module
from worker.engine.loop import Engine
from worker.engine.runner import ModelRunner

BLOCK = TritonAttention.block_size
# (context, new rows): decodes on one and on many tiles, few new rows, a prompt, a chunk behind a cached prefix.
RAGGED = [(5, 1), (90, 1), (30, 30), (70, 5), (33, 2)]
# Of fp32 sums in another order; of rounding inputs' products and the output to 8 or 11 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def cached(backend: TritonAttention, case: Case, dtype: torch.dtype, rubbish: float) -> LayerCache:
    """A cache that holds the earlier rows, with rubbish everywhere else."""
    num_blocks = 1 + sum(-(-len(k) // BLOCK) for k in case.keys)
    shape = LayerShape(case.keys[0].shape[1], case.keys[0].shape[2], case.values[0].shape[2])
    cache = backend.allocate(shape, num_blocks, dtype, torch.device("cpu"))
    cache.keys.fill_(rubbish)
    cache.values.fill_(rubbish)
    for i, (k, v, query_len) in enumerate(zip(case.keys, case.values, case.query_lens, strict=True)):
        for position in range(len(k) - query_len):
            block = int(case.batch.block_tables[i, position // BLOCK])
            cache.keys[block, :, position % BLOCK] = k[position]
            cache.values[block, :, position % BLOCK] = v[position]
    return LayerCache(cache.keys.to(DEVICE), cache.values.to(DEVICE))


def on_device(batch: AttentionBatch) -> AttentionBatch:
    tensors = {
        name: getattr(batch, name).to(DEVICE) for name in ("slots", "block_tables", "query_starts", "context_lens")
    }
    return replace(batch, **tensors)


def new_rows(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = list(zip(case.keys, case.values, case.query_lens, strict=True))
    return torch.cat([k[len(k) - n :] for k, _, n in pairs]), torch.cat([v[len(v) - n :] for _, v, n in pairs])


def rounded(case: Case, dtype: torch.dtype) -> Case:
    """The case in numbers that the format holds, so that only the kernel rounds."""
    return replace(
        case,
        keys=[k.to(dtype).float() for k in case.keys],
        values=[v.to(dtype).float() for v in case.values],
        query=case.query.to(dtype).float(),
    )


def attend(
    case: Case,
    options: AttentionOptions,
    dtype: torch.dtype = torch.float32,
    num_shares: int | None = None,
    rubbish: float = float("nan"),
) -> torch.Tensor:
    backend = TritonAttention(num_shares)
    key, value = (tensor.to(DEVICE, dtype) for tensor in new_rows(case))
    if options.sinks is not None:
        options = replace(options, sinks=options.sinks.to(DEVICE))
    query = case.query.to(DEVICE, dtype)
    return backend.attend(
        query, key, value, cached(backend, case, dtype, rubbish), on_device(case.batch), options
    ).cpu()


def by_torch(case: Case, options: AttentionOptions) -> torch.Tensor:
    backend = TorchAttention(BLOCK)
    shape = LayerShape(case.keys[0].shape[1], case.keys[0].shape[2], case.values[0].shape[2])
    num_blocks = 1 + sum(-(-len(k) // BLOCK) for k in case.keys)
    cache = backend.allocate(shape, num_blocks, torch.float32, torch.device("cpu"))
    for i, (k, v, query_len) in enumerate(zip(case.keys, case.values, case.query_lens, strict=True)):
        for position in range(len(k) - query_len):
            block = int(case.batch.block_tables[i, position // BLOCK])
            cache.keys[block, position % BLOCK] = k[position]
            cache.values[block, position % BLOCK] = v[position]
    key, value = new_rows(case)
    return backend.attend(case.query, key, value, cache, case.batch, options)


def error(
    case: Case, options: AttentionOptions, dtype: torch.dtype = torch.float32, num_shares: int | None = None
) -> float:
    """The largest difference to torch's answer, relative to the largest value; infinite for a NaN."""
    case = rounded(case, dtype)
    output, expected = attend(case, options, dtype, num_shares), by_torch(case, options)
    assert output.shape == expected.shape
    assert output.dtype == dtype
    assert output.is_contiguous()
    worst = (output.double() - expected).abs().max().item()
    return worst / max(1.0, expected.abs().max().item()) if worst == worst else float("inf")


OPTIONS = {
    "plain": AttentionOptions(scale=0.3),
    "window": AttentionOptions(scale=0.3, sliding_window=7),
    "wide window": AttentionOptions(scale=0.3, sliding_window=64),
    "softcap": AttentionOptions(scale=0.3, softcap=3.0),
    "sinks": AttentionOptions(scale=0.3, sinks=torch.linspace(-1, 9, 6)),
    "bias": AttentionOptions(scale=0.3, distance_bias=distance_bias(6)),
    "all": AttentionOptions(0.3, 20, 5.0, torch.linspace(-1, 2, 6), distance_bias(6)),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_in_every_format(name: str, dtype: torch.dtype) -> None:
    case = make_case(RAGGED, 6, 2, 16, 16, BLOCK, seed=1)
    assert error(case, OPTIONS[name], dtype, 3 if dtype == torch.float32 else 1) <= TOLERANCE[dtype]


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (9, 3), (71, 1), (130, 1)])
def test_groups_of_any_size_share_a_tile(heads: tuple[int, int]) -> None:
    case = make_case([(40, 1), (18, 2)], *heads, 16, 16, BLOCK, seed=2)
    assert error(case, OPTIONS["plain"], num_shares=2) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (256, 256), (192, 128), (7, 13)])
def test_any_head_dimensions(dims: tuple[int, int]) -> None:
    case = make_case([(40, 1), (50, 19)], 4, 2, *dims, BLOCK, seed=3)
    options = AttentionOptions(scale=dims[0] ** -0.5)
    assert error(case, options) <= TOLERANCE[torch.float32]
    assert error(case, options, torch.bfloat16) <= TOLERANCE[torch.bfloat16]


# Rows that fill a tile up and see nothing divide nothing by nothing; they are not stored, and numpy warns of them.
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
@settings(max_examples=12, deadline=None)
@example([(40, 35), (38, 1), (1, 1), (1, 1)], (1, 1), (8, 8), 1, None, False, None, 0)
@given(
    lens=st.lists(
        st.integers(1, 90).flatmap(lambda n: st.tuples(st.just(n), st.one_of(st.just(1), st.integers(1, n)))),
        min_size=1,
        max_size=4,
    ),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (4, 1)]),
    dims=st.sampled_from([(8, 8), (20, 12), (16, 32)]),
    window=st.none() | st.integers(1, 100),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    has_sinks=st.booleans(),
    num_shares=st.sampled_from([None, 1, 2, 5]),
    seed=st.integers(0, 1000),
)
def test_any_ragged_batch_is_what_torch_gives(
    lens: list[tuple[int, int]],
    heads: tuple[int, int],
    dims: tuple[int, int],
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    num_shares: int | None,
    seed: int,
) -> None:
    sinks = torch.linspace(-2, 3, heads[0]) if has_sinks else None
    options = AttentionOptions(scale=0.3, sliding_window=window, softcap=softcap, sinks=sinks)
    assert (
        error(make_case(lens, *heads, *dims, BLOCK, seed), options, num_shares=num_shares) <= TOLERANCE[torch.float32]
    )


def test_float32_is_multiplied_exactly() -> None:
    """TF32 would round to 10 bits: these products need all 24."""
    case = make_case([(90, 1), (40, 33)], 4, 2, 64, 64, BLOCK, seed=4)
    options = AttentionOptions(scale=0.125)
    worst = (attend(case, options).double() - by_hand(case, options)).abs().max().item()
    assert worst < 1e-6


def test_a_prompt_in_chunks_is_the_prompt_at_once() -> None:
    whole = make_case([(75, 75)], 6, 2, 16, 16, BLOCK, seed=5)
    backend, options = TritonAttention(), AttentionOptions(scale=0.3)
    expected = attend(whole, options)
    cache = cached(backend, whole, torch.float32, float("nan"))
    outputs = []
    for start, end in [(0, 1), (1, 33), (33, 40), (40, 75)]:
        chunk = replace(
            whole.batch,
            slots=whole.batch.slots[start:end],
            query_starts=torch.tensor([0, end - start], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            max_query_len=end - start,
            max_context_len=end,
        )
        rows = [t[start:end].to(DEVICE) for t in (whole.query, whole.keys[0], whole.values[0])]
        outputs.append(backend.attend(*rows, cache, on_device(chunk), options).cpu())
    assert (torch.cat(outputs) - expected).abs().max().item() < 1e-6


def test_rows_of_a_merged_product_need_no_copy() -> None:
    case = make_case([(30, 4), (20, 1)], 6, 2, 16, 16, BLOCK, seed=6)
    key, value = new_rows(case)
    packed = torch.cat([case.query, key, value], dim=1).to(DEVICE)  # as one product of all three projections gives it
    parts = packed.split([6, 2, 2], dim=1)
    assert not parts[0].is_contiguous()
    backend = TritonAttention()
    cache = cached(backend, case, torch.float32, 0.0)
    output = backend.attend(*parts, cache, on_device(case.batch), OPTIONS["plain"])
    torch.testing.assert_close(output.cpu(), attend(case, OPTIONS["plain"]), rtol=0, atol=0)


def test_rows_of_padding_write_to_the_scratch_block_and_disturb_nobody() -> None:
    case = make_case([(30, 1), (20, 1)], 6, 2, 16, 16, BLOCK, seed=7)
    backend, options = TritonAttention(), OPTIONS["plain"]
    alone = attend(case, options)
    key, value = new_rows(case)
    width = case.batch.block_tables.shape[1]
    padded = AttentionBatch(
        slots=torch.cat([case.batch.slots, torch.zeros(2, dtype=torch.int32)]),
        block_tables=torch.cat([case.batch.block_tables, torch.zeros(2, width, dtype=torch.int32)]),
        query_starts=torch.arange(5, dtype=torch.int32),
        context_lens=torch.cat([case.batch.context_lens, torch.ones(2, dtype=torch.int32)]),
        max_query_len=1,
        max_context_len=4096,  # of a captured launch: the longest that it serves
    )
    rows = [torch.cat([t, t[:2]]).to(DEVICE) for t in (case.query, key, value)]
    cache = cached(backend, case, torch.float32, float("nan"))
    output = backend.attend(*rows, cache, on_device(padded), options).cpu()
    torch.testing.assert_close(output[:2], alone, rtol=1e-6, atol=1e-6)
    assert output.isfinite().all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU goes on with what it finds there")
def test_tokens_of_no_sequence_give_numpy_nothing_to_warn_of(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(30, 1), (20, 1)], 6, 2, 16, 16, BLOCK, seed=7)
    backend = TritonAttention()
    cache = cached(backend, case, torch.float32, 0.0)
    slots = torch.cat([case.batch.slots, torch.zeros(2, dtype=torch.int32)])
    rows = [torch.cat([t, t[:2]]) for t in (case.query, *new_rows(case))]
    expected = attend(case, OPTIONS["plain"])
    empty = torch.empty

    def used_before(*size: object, dtype: torch.dtype, **options: object) -> torch.Tensor:
        made: torch.Tensor = empty(*size, dtype=dtype, **options)  # type: ignore[call-overload]
        return made.fill_(1e36) if dtype.is_floating_point else made

    monkeypatch.setattr(torch, "empty", used_before)
    output = backend.attend(*rows, cache, replace(case.batch, slots=slots), OPTIONS["plain"])
    assert torch.equal(output[:2], expected)
    assert not output[2:].any()


def test_blocks_that_every_window_has_left_are_not_read() -> None:
    """They may belong to another sequence by now."""
    case = make_case([(70, 1), (70, 5)], 6, 2, 16, 16, BLOCK, seed=8)
    options = OPTIONS["window"]
    expected = attend(case, options)
    key, value = new_rows(case)
    backend = TritonAttention()
    cache = cached(backend, case, torch.float32, 0.0)
    for i in range(2):
        forgotten = case.batch.block_tables[i, :3].long().to(DEVICE)
        cache.keys[forgotten] = float("nan")
        cache.values[forgotten] = float("nan")
    rows = [t.to(DEVICE) for t in (case.query, key, value)]
    output = backend.attend(*rows, cache, on_device(case.batch), options)
    assert torch.equal(output.cpu(), expected)


class TestShares:
    """Into how many parts a decode's context is cut."""

    @staticmethod
    def shares(num_seqs: int, max_context_len: int, num_processors: int = 132) -> int:
        backend, device = TritonAttention(), torch.device("cpu")
        backend._num_processors[device] = num_processors
        shape = LayerShape(8, 128, 128)
        tile = triton_paged.decode_tile(shape, 4, torch.bfloat16)
        return backend._shares(device, num_seqs, shape, 4, tile, max_context_len)

    def test_a_single_long_context_fills_the_device(self) -> None:
        assert self.shares(1, 8192) == 64

    def test_a_large_batch_fills_it_by_itself(self) -> None:
        assert [self.shares(n, 8192) for n in (8, 16, 32, 128, 256)] == [8, 4, 1, 1, 1]

    def test_a_short_context_has_no_more_than_two_tiles_each(self) -> None:
        assert [self.shares(1, n) for n in (1, 128, 129, 1000)] == [1, 1, 2, 8]

    def test_what_a_program_does_follows_from_how_many_there_are(self) -> None:
        shape = LayerShape(8, 128, 128)
        tiles = [triton_paged.decode_tile(shape, 4, torch.bfloat16, load) for load in (0.1, 2.0, 8.0)]
        assert [(tile.tokens, tile.num_warps) for tile in tiles] == [(32, 4), (64, 4), (32, 1)]
        crowded = triton_paged.decode_tile(shape, 64, torch.bfloat16, 8.0)  # too much for one warp's registers
        assert (crowded.rows, crowded.num_warps) == (64, 4)


class TestRefusals:
    def test_shapes_that_do_not_fit(self) -> None:
        case = make_case([(3, 3)], 6, 2, 16, 16, BLOCK, seed=9)
        backend = TritonAttention()
        cache = backend.allocate(LayerShape(2, 16, 16), 3, torch.float32, torch.device("cpu"))
        key, value = new_rows(case)
        with pytest.raises(ValueError, match="shapes do not fit"):
            backend.attend(case.query, key[:2], value, cache, case.batch, OPTIONS["plain"])
        with pytest.raises(ValueError, match="shapes do not fit"):
            backend.attend(case.query[:, :5], key, value, cache, case.batch, OPTIONS["plain"])
        assert not cache.keys.any()

    def test_formats_that_differ(self) -> None:
        case = make_case([(3, 3)], 6, 2, 16, 16, BLOCK, seed=9)
        backend = TritonAttention()
        cache = backend.allocate(LayerShape(2, 16, 16), 3, torch.bfloat16, torch.device("cpu"))
        with pytest.raises(ValueError, match="dtypes differ"):
            backend.attend(case.query, *new_rows(case), cache, case.batch, OPTIONS["plain"])

    def test_a_format_without_a_kernel(self) -> None:
        with pytest.raises(ValueError, match="or float16, not"):
            TritonAttention().allocate(LayerShape(1, 8, 8), 2, torch.float64, torch.device("cpu"))

    @pytest.mark.parametrize("num_shares", [0, 65])
    def test_a_number_of_shares_out_of_range(self, num_shares: int) -> None:
        with pytest.raises(ValueError, match="num_shares must be 1 to 64"):
            TritonAttention(num_shares)


# -- whole models -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "deepseek_v3"])
def test_families_with_softcap_sinks_and_other_value_dims_pass_the_load_check(family: str) -> None:
    check_module(tiny_module(family, num_hidden_layers=2).to(DEVICE), TritonAttention())


def test_greedy_output_is_what_each_request_alone_gets_from_transformers() -> None:
    """Requests join and leave, prompts are cut into chunks, and the cache is too small for all."""
    model = tiny_model("mistral", num_hidden_layers=2).to(DEVICE)
    requests = [make_request(f"r{n}", [(7 * i + n) % 190 + 3 for i in range(n)], max_tokens=5) for n in (3, 40, 20)]
    expected = [reference_tokens(model, r.prompt_token_ids, r.sampling) for r in requests]
    limits = make_settings(block_size=16, num_blocks=5, token_budget=32)
    engine = Engine(ModelRunner(model, TritonAttention(), limits), limits, TokenNames)
    results = generate(engine, *requests)
    assert [results[r.request_id].tokens[0] for r in requests] == expected


# -- the tests above can fail -------------------------------------------------------------------

# What is changed, and into what.
MUTANTS = {
    "a window one token wider": ("> positions - window", ">= positions - window"),
    "a row that does not see itself": ("tokens[None, :] <= positions", "tokens[None, :] < positions"),
    "a tile that misses its last token": ("first_position + QUERIES)", "first_position + QUERIES - 1)"),
    "rows that see what comes after them": ("tl.minimum(end, first_position + 1) - begin", "end - begin"),
    "shares that do not meet": ("begin = first_token + share", "begin = first_token + (share > 0) + share"),
    "a sink that counts twice": ("total += tl.exp2(sink - peak)", "total += 2 * tl.exp2(sink - peak)"),
    "values of another kv head": ("values += kv_head", "values += 0 * kv_head"),
    "keys one slot off": ("* PAGE + slot % PAGE", "* PAGE + (slot + 1) % PAGE"),
}


def load_mutant(path: Path, original: str, mutated: str) -> ModuleType:
    source = Path(kernels.__file__).read_text()
    assert source.count(original) == 1, "the mutant must change one place"
    path.write_text(source.replace(original, mutated))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_kernel_is_noticed(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(70, 1), (40, 20)], 6, 2, 16, 16, BLOCK, seed=10)
    name = f"mutant_{abs(hash(mutant))}"
    module = load_mutant(tmp_path / f"{name}.py", *MUTANTS[mutant])
    for kernel in ("attend_kernel", "merge_kernel", "store_kernel"):
        monkeypatch.setattr(triton_paged, kernel, getattr(module, kernel))
    try:
        assert any(error(case, OPTIONS[name], num_shares=2) > 1e-3 for name in ("plain", "window", "sinks"))
    finally:
        del sys.modules[name]


@settings(max_examples=60, deadline=None)
@given(
    lens=st.lists(st.integers(0, 40), min_size=1, max_size=140),
    num_skipped=st.integers(0, 9),
    num_queries=st.sampled_from([1, 8, 32]),
)
@example(lens=[1] * 139 + [300], num_skipped=4, num_queries=1)  # more tiles than one program writes at a time
def test_every_tile_of_a_long_sequence_is_found_once(lens: list[int], num_skipped: int, num_queries: int) -> None:
    expected = [(seq, tile) for seq, n in enumerate(lens) if n > num_skipped for tile in range(-(-n // num_queries))]
    num_tiles = sum(lens) // num_queries + min(len(lens), sum(lens) // (num_skipped + 1))
    starts = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0).to(DEVICE, torch.int32)
    tiles = torch.full((num_tiles + 1, 2), 77, dtype=torch.int32, device=DEVICE)
    kernels.tile_kernel[(len(lens),)](tiles, starts, num_tiles, num_skipped, QUERIES=num_queries, OVERLAPS=False)
    found = [tuple(pair) for pair in tiles.tolist()]
    assert found[: len(expected)] == expected  # there is room for all
    assert all(seq == -1 for seq, _ in found[len(expected) : num_tiles])
    assert found[num_tiles] == (77, 77)


def test_sequences_without_rows_and_rows_without_a_sequence_are_padding() -> None:
    case = make_case(RAGGED, 4, 2, 16, 16, BLOCK, seed=4)
    plain = attend(case, AttentionOptions(scale=0.3))
    batch, num_rows = case.batch, len(case.query)
    padded = replace(
        case.batch,
        slots=torch.cat([batch.slots, torch.zeros(9, dtype=torch.int32)]),
        block_tables=torch.cat([batch.block_tables, torch.zeros_like(batch.block_tables[:3])]),
        query_starts=torch.cat([batch.query_starts, torch.full((3,), num_rows, dtype=torch.int32)]),
        context_lens=torch.cat([batch.context_lens, torch.zeros(3, dtype=torch.int32)]),
        max_query_len=num_rows + 9,
        max_context_len=1000,
    )
    backend, cache = TritonAttention(), cached(TritonAttention(), case, torch.float32, float("nan"))
    rows = [torch.cat([x, torch.full((9, *x.shape[1:]), 3.0)]).to(DEVICE) for x in (case.query, *new_rows(case))]
    output = backend.attend(*rows, cache, on_device(padded), AttentionOptions(scale=0.3)).cpu()
    assert torch.allclose(output[:num_rows], plain, atol=1e-5)
