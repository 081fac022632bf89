"""The C++ attention against plain torch, for every instruction set that this CPU runs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders_attention import distance_bias
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.attention.interface import AttentionBatch, AttentionOptions, LayerCache, LayerShape
from worker.engine.kernels.build import supported_levels

BLOCK = CpuAttention.block_size
LEVELS = supported_levels()
BACKENDS: dict[str, CpuAttention] = {}
# For tokens of which only what they leave in the cache matters: each looks at itself alone, which takes the least time.
WRITE_ONLY = AttentionOptions(scale=1.0, sliding_window=1)


def backend(level: str = LEVELS[0]) -> CpuAttention:
    if level not in BACKENDS:
        BACKENDS[level] = CpuAttention(level)
    return BACKENDS[level]


@dataclass
class Case:
    """Sequences with all their keys and values, of which the last `num_queries[i]` tokens are this step's."""

    num_queries: list[int]
    context_lens: list[int]
    query: torch.Tensor  # [num_tokens, num_heads, key_dim]
    keys: list[torch.Tensor]  # per sequence [context, num_kv_heads, key_dim]
    values: list[torch.Tensor]
    options: AttentionOptions


def make_case(
    num_queries: list[int],
    context_lens: list[int],
    *,
    heads: int = 9,
    kv_heads: int = 3,
    key_dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    options: AttentionOptions | None = None,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return Case(
        num_queries,
        context_lens,
        rand(sum(num_queries), heads, key_dim),
        [rand(n, kv_heads, key_dim) for n in context_lens],
        [rand(n, kv_heads, value_dim or key_dim) for n in context_lens],
        options or AttentionOptions(scale=key_dim**-0.5),
    )


def oracle(case: Case) -> torch.Tensor:
    """Attention sequence by sequence, in float64, over contiguous keys and values."""
    options, outputs, start = case.options, [], 0
    for n, length, key, value in zip(case.num_queries, case.context_lens, case.keys, case.values, strict=True):
        query = case.query[start : start + n].double().transpose(0, 1)
        start += n
        group = query.shape[0] // key.shape[1]
        key = key.double().transpose(0, 1).repeat_interleave(group, 0)
        value = value.double().transpose(0, 1).repeat_interleave(group, 0)
        scores = query @ key.transpose(1, 2) * options.scale
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        rows = torch.arange(length - n, length)[:, None]
        columns = torch.arange(length)[None]
        if options.distance_bias is not None:
            distances = (rows - columns).clamp(0, options.distance_bias.shape[1] - 1)
            scores = scores + options.distance_bias[:, distances].double()
        seen = columns <= rows
        if options.sliding_window is not None:
            seen &= columns > rows - options.sliding_window
        scores = scores.masked_fill(~seen, float("-inf"))
        if options.sinks is not None:
            sink = options.sinks.double().view(-1, 1, 1).expand(-1, n, 1)
            scores = torch.cat([scores, sink], -1)
        weights = scores.softmax(-1)[..., :length]
        outputs.append((weights @ value).transpose(0, 1))
    return torch.cat(outputs)


def run(case: Case, attention: CpuAttention, *, chunk: int | None = None) -> torch.Tensor:
    """The case on shuffled blocks; earlier tokens are written by earlier calls of at most `chunk` rows."""
    dtype = case.query.dtype
    shape = LayerShape(case.keys[0].shape[1], case.keys[0].shape[2], case.values[0].shape[2])
    needed = [-(-n // BLOCK) for n in case.context_lens]
    num_blocks = sum(needed) + 3
    cache = attention.allocate(shape, num_blocks, dtype, torch.device("cpu"))
    order = (torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(7)) + 1).tolist()
    tables = torch.full((len(needed), max(needed)), -1, dtype=torch.int32)  # refused if it were read
    for i, n in enumerate(needed):
        tables[i, :n] = torch.tensor([order.pop() for _ in range(n)])
    for i, (n, length) in enumerate(zip(case.num_queries, case.context_lens, strict=True)):
        history = length - n
        for start in range(0, history, chunk or max(history, 1)):
            end = min(history, start + (chunk or history))
            query = torch.randn(end - start, case.query.shape[1], shape.key_dim).to(dtype)
            batch = make_batch(tables[i : i + 1], [end - start], [end])
            attention.attend(query, case.keys[i][start:end], case.values[i][start:end], cache, batch, WRITE_ONLY)
    pairs = list(zip(case.num_queries, case.context_lens, strict=True))
    key = torch.cat([k[length - n :] for k, (n, length) in zip(case.keys, pairs, strict=True)])
    value = torch.cat([v[length - n :] for v, (n, length) in zip(case.values, pairs, strict=True)])
    batch = make_batch(tables, case.num_queries, case.context_lens)
    return attention.attend(case.query, key, value, cache, batch, case.options)


def make_batch(tables: torch.Tensor, num_queries: list[int], context_lens: list[int]) -> AttentionBatch:
    slots = [
        int(tables[i, position // BLOCK]) * BLOCK + position % BLOCK
        for i, (n, length) in enumerate(zip(num_queries, context_lens, strict=True))
        for position in range(length - n, length)
    ]
    starts = torch.tensor([0, *num_queries]).cumsum(0)
    return AttentionBatch(
        slots=torch.tensor(slots, dtype=torch.int32),
        block_tables=tables,
        query_starts=starts.to(torch.int32),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        max_query_len=max(num_queries),
        max_context_len=max(context_lens),
    )


def assert_matches_oracle(case: Case, attention: CpuAttention, *, chunk: int | None = None) -> None:
    output, expected = run(case, attention, chunk=chunk), oracle(case)
    assert output.shape == expected.shape
    assert output.dtype == case.query.dtype
    assert output.is_contiguous()
    # bfloat16: inputs are exact here, only the output is rounded, to 8 significant bits.
    tolerance = 1e-5 if case.query.dtype == torch.float32 else 0.005 * max(1.0, expected.abs().max().item())
    assert (output.double() - expected).abs().max().item() <= tolerance


@pytest.fixture(autouse=True, scope="module")
def num_torch_threads() -> None:
    """All: the kernels divide their work among them."""


DTYPES = [torch.float32, torch.bfloat16]
RAGGED = ([1, 37, 1, 16, 1, 130], [1, 37, 700, 48, 3000, 257])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
class TestEveryInstructionSet:
    def test_decode_and_prefill_rows_of_one_call_see_their_own_context(self, level: str, dtype: torch.dtype) -> None:
        assert_matches_oracle(make_case(*RAGGED, dtype=dtype), backend(level))

    def test_prefill_in_chunks(self, level: str, dtype: torch.dtype) -> None:
        assert_matches_oracle(make_case([1, 5], [90, 301], dtype=dtype), backend(level), chunk=33)

    def test_sliding_window(self, level: str, dtype: torch.dtype) -> None:
        for window in (1, 7, 16, 300):
            options = AttentionOptions(scale=0.125, sliding_window=window)
            assert_matches_oracle(make_case(*RAGGED, dtype=dtype, options=options), backend(level))

    def test_softcap(self, level: str, dtype: torch.dtype) -> None:
        for softcap in (0.5, 50.0):
            options = AttentionOptions(scale=0.5, softcap=softcap)
            assert_matches_oracle(make_case(*RAGGED, dtype=dtype, options=options), backend(level))

    def test_sinks(self, level: str, dtype: torch.dtype) -> None:
        sinks = torch.linspace(-4, 9, 9).to(dtype)
        options = AttentionOptions(scale=0.125, sinks=sinks, sliding_window=40)
        assert_matches_oracle(make_case(*RAGGED, dtype=dtype, options=options), backend(level))

    def test_bias_by_distance(self, level: str, dtype: torch.dtype) -> None:
        for scale, softcap, num_distances in ((1.0, None, 129), (0.1, None, 1), (0.2, 5.0, 20)):
            options = AttentionOptions(scale, softcap=softcap, distance_bias=distance_bias(9, num_distances))
            assert_matches_oracle(make_case(*RAGGED, dtype=dtype, options=options), backend(level))

    @pytest.mark.parametrize(("heads", "kv_heads"), [(n, 1) for n in range(1, 9)] + [(4, 4), (12, 4), (32, 2), (71, 1)])
    def test_groups_of_any_size(self, level: str, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
        case = make_case([1, 19, 1], [65, 40, 290], heads=heads, kv_heads=kv_heads, dtype=dtype)
        assert_matches_oracle(case, backend(level))

    @pytest.mark.parametrize(
        "dims", [(16, 16), (80, 80), (96, 96), (128, 128), (256, 256), (24, 8), (192, 128), (7, 13)]
    )
    def test_any_head_dimensions(self, level: str, dtype: torch.dtype, dims: tuple[int, int]) -> None:
        case = make_case([1, 9], [130, 20], heads=4, kv_heads=2, key_dim=dims[0], value_dim=dims[1], dtype=dtype)
        assert_matches_oracle(case, backend(level))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_small_batch_matches(data: st.DataObject) -> None:
    sequences = data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=6))
    kv_heads = data.draw(st.integers(1, 3))
    heads = kv_heads * data.draw(st.integers(1, 8))
    options = AttentionOptions(
        scale=data.draw(st.sampled_from([0.05, 0.25, 1.0])),
        sliding_window=data.draw(st.none() | st.integers(1, 50)),
        softcap=data.draw(st.none() | st.sampled_from([1.0, 30.0])),
        sinks=data.draw(st.none() | st.just(torch.linspace(-2, 3, heads))),
        distance_bias=data.draw(st.none() | st.integers(1, 50).map(lambda n: distance_bias(heads, n))),
    )
    case = make_case(
        [n for n, _ in sequences],
        [n + history for n, history in sequences],
        heads=heads,
        kv_heads=kv_heads,
        key_dim=data.draw(st.integers(1, 40)),
        value_dim=data.draw(st.integers(1, 40)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        seed=data.draw(st.integers(0, 1000)),
        options=options,
    )
    assert_matches_oracle(case, backend(data.draw(st.sampled_from(LEVELS))), chunk=data.draw(st.integers(1, 64)))


def one_token(case: Case, index: int) -> Case:
    """A step of one of the tokens of a case of one sequence."""
    length = case.context_lens[0] - case.num_queries[0] + index + 1
    keys, values = [case.keys[0][:length]], [case.values[0][:length]]
    query = case.query[index : index + 1]
    return replace(case, num_queries=[1], context_lens=[length], keys=keys, values=values, query=query)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
def test_a_row_is_the_same_to_the_bit_alone_in_a_batch_in_chunks_and_on_any_number_of_threads(
    level: str, dtype: torch.dtype
) -> None:
    case = make_case([1, 300, 2], [2900, 900, 1200], dtype=dtype)
    parts, start = [], 0
    for i, n in enumerate(case.num_queries):
        own = slice(i, i + 1)
        query = case.query[start : start + n]
        parts.append(
            replace(case, num_queries=[n], context_lens=case.context_lens[own], keys=case.keys[own], query=query)
        )
        parts[-1].values = case.values[own]
        start += n
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([run(part, backend(level), chunk=100) for part in parts])
        torch.set_num_threads(5)
        together = run(case, backend(level))
        split = torch.cat([run(part, backend(level)) for part in parts])
        # In tiles of one token, none of which shares widened keys with another.
        by_token = torch.cat([run(one_token(parts[1], i), backend(level)) for i in range(0, 300, 37)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)
    assert torch.equal(split, together)
    assert torch.equal(by_token, together[1:301:37])


def test_strided_rows_need_no_copy() -> None:
    case = make_case([4, 1], [30, 20])
    packed = torch.randn(5, 15, 64)  # one product of the merged projections: 9 query, 3 key, 3 value heads
    case.query = packed[:, :9]
    case.keys = [torch.cat([case.keys[0][:26], packed[:4, 9:12]]), torch.cat([case.keys[1][:19], packed[4:, 9:12]])]
    case.values = [torch.cat([case.values[0][:26], packed[:4, 12:]]), torch.cat([case.values[1][:19], packed[4:, 12:]])]
    strided = run(case, backend())
    case.query = case.query.contiguous()
    assert torch.equal(strided, run(case, backend()))
    transposed = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(strided, run(replace(case, query=transposed), backend()))


@pytest.mark.parametrize(("cache", "poison"), [("keys", "nan"), ("values", "nan"), ("values", "inf")])
def test_a_poisoned_sequence_stays_visible_and_alone(cache: str, poison: str) -> None:
    case = make_case([1, 1, 1], [40, 300, 40])
    getattr(case, cache)[1][123, 1, 5] = float(poison)
    output = run(case, backend())
    assert not output[1, 3:6, 5].isfinite().any()  # kv head 1 serves query heads 3 to 5
    assert output[0].isfinite().all()
    assert output[1, :3].isfinite().all()
    assert output[2].isfinite().all()


def test_rubbish_behind_the_context_is_never_looked_at() -> None:
    attention = backend()
    case = make_case([1], [21])
    cache = attention.allocate(LayerShape(3, 64, 64), 3, torch.float32, torch.device("cpu"))
    tables = torch.tensor([[2, 1]], dtype=torch.int32)
    for tensor in (cache.keys, cache.values):
        tensor.fill_(float("nan"))
    everything = make_batch(tables, [21], [21])
    attention.attend(torch.zeros(21, 9, 64), case.keys[0], case.values[0], cache, everything, case.options)
    output = attention.attend(case.query, case.keys[0][20:], case.values[0][20:], cache, make_batch(tables, [1], [21]),
                              case.options)  # fmt: skip
    assert (output.double() - oracle(case)).abs().max().item() < 1e-5


def test_a_window_leaves_forgotten_blocks_unread() -> None:
    """A block that every row's window has left may have been given to another sequence."""
    attention = backend()
    options = AttentionOptions(scale=0.125, sliding_window=10)
    case = make_case([64], [64], options=options)
    cache = attention.allocate(LayerShape(3, 64, 64), 6, torch.float32, torch.device("cpu"))
    tables = torch.tensor([[1, 2, 3, 4]], dtype=torch.int32)
    expected = attention.attend(
        case.query, case.keys[0], case.values[0], cache, make_batch(tables, [64], [64]), options
    )
    cache.keys[1:3] = float("nan")
    cache.values[1:3] = float("nan")
    tables[0, :2] = 0
    last = make_batch(tables, [1], [64])
    output = attention.attend(case.query[63:], case.keys[0][63:], case.values[0][63:], cache, last, options)
    assert torch.equal(output[0], expected[63])


class TestRefusals:
    """Nothing is read or written outside the cache."""

    @pytest.mark.parametrize(
        ("field", "value", "reason"),
        [
            ("slots", torch.tensor([64], dtype=torch.int32), "does not have"),
            ("slots", torch.tensor([-1], dtype=torch.int32), "does not have"),
            ("block_tables", torch.tensor([[4]], dtype=torch.int32), "does not have"),
            ("block_tables", torch.tensor([[-3]], dtype=torch.int32), "does not have"),
            ("context_lens", torch.tensor([17], dtype=torch.int32), "contradicts"),
            ("context_lens", torch.tensor([0], dtype=torch.int32), "contradicts"),
            ("query_starts", torch.tensor([0, 2], dtype=torch.int32), "contradicts"),
            ("slots", torch.tensor([16, 17], dtype=torch.int32), "shapes do not fit"),
        ],
    )
    def test_a_batch_that_names_foreign_memory(self, field: str, value: torch.Tensor, reason: str) -> None:
        attention = backend()
        cache = attention.allocate(LayerShape(3, 64, 64), 4, torch.float32, torch.device("cpu"))
        batch = replace(make_batch(torch.tensor([[1]], dtype=torch.int32), [1], [1]), **{field: value})
        with pytest.raises(ValueError, match=reason):
            attention.attend(torch.ones(1, 9, 64), torch.ones(1, 3, 64), torch.ones(1, 3, 64), cache, batch,
                             AttentionOptions(scale=1.0))  # fmt: skip
        assert not cache.keys.any()

    def test_mixed_dtypes(self) -> None:
        attention = backend()
        cache = attention.allocate(LayerShape(3, 64, 64), 4, torch.bfloat16, torch.device("cpu"))
        batch = make_batch(torch.tensor([[1]], dtype=torch.int32), [1], [1])
        with pytest.raises(ValueError, match="dtypes differ"):
            attention.attend(torch.ones(1, 9, 64), torch.ones(1, 3, 64), torch.ones(1, 3, 64), cache, batch,
                             AttentionOptions(scale=1.0))  # fmt: skip

    def test_a_dtype_without_a_kernel(self) -> None:
        with pytest.raises(ValueError, match="float32 or bfloat16"):
            backend().allocate(LayerShape(1, 8, 8), 2, torch.float16, torch.device("cpu"))


def test_an_empty_layer_cache_is_zeroed() -> None:
    cache: LayerCache = backend().allocate(LayerShape(2, 64, 32), 4096, torch.float32, torch.device("cpu"))
    assert cache.keys.shape == (4096, 2, 64, BLOCK)
    assert cache.values.shape == (4096, 2, BLOCK, 32)
    assert not cache.keys.any()


def test_kernel_and_torch_share_one_openmp_runtime() -> None:
    program = (
        "from worker.engine.attention.cpu_ext import CpuAttention\n"
        "from worker.engine.kernels.library import openmp_runtimes\n"
        "import torch\nCpuAttention()\n(torch.ones(512, 512) @ torch.ones(512, 512)).sum()\n"
        "print(len(openmp_runtimes()))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert int(result.stdout.split()[-1]) == (1 if sys.platform.startswith("linux") else 0)
