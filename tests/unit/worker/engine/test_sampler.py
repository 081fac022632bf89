"""The sampler against transformers' logits processors, applied to the whole vocabulary in its order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.generation import SamplingParams
from tests.reference_sampling import processors_of
from tests.waits import Waits
from worker.engine.edits import edit_scores
from worker.engine.filters import Filters, filter_candidates
from worker.engine.kernels.build import supported_levels
from worker.engine.kernels.library import Kernels
from worker.engine.noise import gumbel, ordered_hash, row_key
from worker.engine.sampler import Sampler
from worker.engine.sequence import Sequence

CPU = torch.device("cpu")


def make_row(prompt: list[int], output: list[int] | None = None, **params: Any) -> Sequence:
    return Sequence("s", prompt, SamplingParams(**{"max_tokens": 10, **params}), emitted=output or [])


def transformers_scores(logits: torch.Tensor, row: Sequence) -> torch.Tensor:
    """[vocab_size], -inf for what transformers drops."""
    ids = row.token_ids.tolist()
    processors = processors_of(row.sampling, ids[: row.num_prompt_tokens])
    return processors(torch.tensor([ids]), logits[None])[0]


def reference_token(logits: torch.Tensor, row: Sequence) -> int:
    """What the row must get: the largest of transformers' score plus the documented noise, over all tokens."""
    scores = transformers_scores(logits.float(), row)
    if row.sampling.temperature == 0:
        return int(scores.argmax())
    key = torch.tensor([row_key(row.sampling.seed, row.output_index, row.num_tokens)], dtype=torch.int32)
    noise = gumbel(ordered_hash(key, torch.arange(len(scores), dtype=torch.int32)))[0]
    return int((scores.double() + noise).argmax())


def can_be_made(params: SamplingParams) -> bool:
    """Whether transformers takes it: a penalty for ends needs some, and nothing forced may be suppressed."""
    return (
        bool(params.stop_token_ids) or params.exponential_decay_length_penalty is None
    ) and params.forced_eos_token_id not in params.suppress_tokens


_ids = st.integers(0, 30)
_ids_of_row = st.lists(_ids, min_size=1, max_size=3)
_phrases = st.lists(st.lists(_ids, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple)


def rarely(*values: Any) -> st.SearchStrategy[Any]:
    """The first of them, which is off, in most rows: they are tried alone and in pairs, besides all together."""
    return st.sampled_from([values[0]] * (2 * len(values)) + list(values))


_rows = st.builds(
    make_row,
    prompt=st.lists(_ids, min_size=1, max_size=30),
    output=st.lists(_ids, max_size=9),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 0, 1, 5, 50, 300, 5000]),
    top_p=st.sampled_from([1.0, 1.0, 0.1, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.5]),
    top_h=rarely(0.0, 0.1, 0.5, 1.0),
    typical_p=rarely(1.0, 0.1, 0.6, 0.95, 0.9999),
    epsilon_cutoff=rarely(0.0, 1e-5, 3e-3, 0.2),
    eta_cutoff=rarely(0.0, 1e-5, 3e-3, 0.2),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.7, 1.4]),
    no_repeat_ngram_size=st.sampled_from([0, 0, 1, 2, 3]),
    encoder_repetition_penalty=rarely(1.0, 0.7, 1.6),
    encoder_no_repeat_ngram_size=rarely(0, 1, 2, 3),
    presence_penalty=rarely(0.0, -1.5, 0.7),
    frequency_penalty=rarely(0.0, -0.3, 1.1),
    stop_token_ids=st.lists(_ids, max_size=3, unique=True).map(tuple),
    min_tokens=rarely(0, 3, 8),
    bad_words_ids=st.just(()) | _phrases,
    sequence_bias=st.just(())
    | st.dictionaries(_ids_of_row.map(tuple), st.floats(-9, 9), max_size=5).map(lambda found: tuple(found.items())),
    suppress_tokens=st.just(()) | _ids_of_row.map(tuple),
    begin_suppress_tokens=st.just(()) | _ids_of_row.map(tuple),
    exponential_decay_length_penalty=st.none() | st.tuples(st.integers(0, 7), st.sampled_from([0.8, 1.0, 1.3, 4.0])),
    forced_eos_token_id=st.none() | st.none() | _ids,
    seed=st.integers(0, (1 << 64) - 1),
).filter(lambda row: can_be_made(row.sampling))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(_rows, min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.1, 1.0, 5.0]),  # nearly flat to peaked
    vocab_size=st.sampled_from([31, 256, 257, 3000]),
    may_wait=st.booleans(),
)
def test_every_row_of_a_mixed_batch_gets_the_token_that_transformers_gives(
    rows: list[Sequence], seed: int, scale: float, vocab_size: int, may_wait: bool
) -> None:
    logits = torch.randn(len(rows), vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    before = logits.clone()
    sampled = Sampler(CPU, may_wait=may_wait).sample(logits, rows)
    for i, row in enumerate(rows):
        if not transformers_scores(logits[i], make_row(**greedy(row))).isfinite().any():
            assert i in sampled.forbidden_rows
        else:
            assert i not in sampled.forbidden_rows
            assert sampled.token_ids[i] == reference_token(logits[i], row), row.sampling
    assert torch.equal(logits, before)
    assert sampled.invalid_rows == []


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(_rows, min_size=1, max_size=6), seed=st.integers(0, 1000), vocab_size=st.sampled_from([31, 300]))
def test_every_score_is_edited_as_transformers_edits_it(rows: list[Sequence], seed: int, vocab_size: int) -> None:
    logits = torch.randn(len(rows), vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    scores = logits.clone()
    edit_scores(scores, rows)
    for i, row in enumerate(rows):
        torch.testing.assert_close(scores[i], transformers_scores(logits[i], make_row(**greedy(row))))


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(_rows.filter(lambda row: row.sampling.temperature > 0), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    num_candidates=st.sampled_from([110, 256, 700]),
)
def test_what_is_known_to_be_kept_is_what_transformers_keeps(
    rows: list[Sequence], seed: int, scale: float, num_candidates: int
) -> None:
    logits = torch.randn(len(rows), 700, generator=torch.Generator().manual_seed(seed)) * scale
    rows = [make_row([1], **{name: getattr(row.sampling, name) for name in FILTERS}) for row in rows]
    filters = Filters.of([row.sampling for row in rows], CPU)
    scores = logits / filters.temperature
    top, ids = scores.topk(num_candidates)
    keep, is_complete = filter_candidates(scores, top.double(), filters)
    if num_candidates == 700:
        assert bool(is_complete.all())
    for i in is_complete.nonzero()[:, 0].tolist():
        kept = transformers_scores(logits[i], rows[i]).isfinite().nonzero()[:, 0].tolist()
        assert sorted(ids[i][keep[i]].tolist()) == kept or is_on_edge(scores[i], rows[i].sampling), rows[i].sampling


def is_on_edge(scores: torch.Tensor, params: SamplingParams) -> bool:
    """Whether float32, in which transformers adds probabilities, decides which token is the last within top_p."""
    probs = scores.double().softmax(-1).sort(descending=True).values
    return bool(params.top_p < 1 and ((probs.cumsum(-1) - probs - params.top_p).abs() < 1e-6).any())


FILTERS = ("temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def greedy(row: Sequence) -> dict[str, Any]:
    """How to make the same row without temperature and filters."""
    ids = row.token_ids.tolist()
    params = {name: getattr(row.sampling, name) for name in SamplingParams.__struct_fields__}
    return {
        **params,
        "temperature": 0.0,
        "prompt": ids[: row.num_prompt_tokens],
        "output": ids[row.num_prompt_tokens :],
    }


@pytest.mark.parametrize(
    "params",
    [{}, {"top_k": 300}, {"top_k": 9999}, {"top_p": 0.97}, {"min_p": 0.5}, {"top_k": 2500, "top_p": 0.5, "min_p": 0.1}],
    ids=str,
)
def test_filters_wider_than_the_candidates_lose_no_token(params: dict[str, Any]) -> None:
    num_rows = 60
    logits = torch.randn(num_rows, 3000, generator=torch.Generator().manual_seed(4)) * 0.1
    rows = [make_row([1], temperature=1.0, seed=seed, **params) for seed in range(num_rows)]
    expected = [reference_token(logits[i], row) for i, row in enumerate(rows)]
    assert Sampler(CPU).sample(logits, rows).token_ids == expected
    largest = logits.topk(256).indices
    assert any(token not in largest[i] for i, token in enumerate(expected)), "the candidates were enough"


_rows_of_prefix_filters = st.builds(
    make_row,
    prompt=st.lists(_ids, min_size=1, max_size=30),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 5, 50, 300, 5000]),
    top_p=st.sampled_from([1.0, 0.1, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.7, 1.4]),
    no_repeat_ngram_size=st.sampled_from([0, 0, 1, 2, 3]),
    seed=st.integers(0, (1 << 64) - 1),
)


@settings(max_examples=60, deadline=None)
@given(row=_rows_of_prefix_filters, seed=st.integers(0, 1000), vocab_size=st.sampled_from([300, 3000]))
def test_ties_are_filtered_as_transformers_filters_them(row: Sequence, seed: int, vocab_size: int) -> None:
    # bf16 logits on a coarse grid have ties everywhere, also at the edge of top_k. With top_p, which of two equal
    # tokens falls out is arbitrary in transformers too: it must only be one that is not less probable.
    logits = torch.randint(0, 12, (1, vocab_size), generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    token = Sampler(CPU).sample(logits, [row]).token_ids[0]
    kept = transformers_scores(logits[0].float(), row)
    if row.sampling.temperature == 0 or row.sampling.top_p == 1:
        assert token == reference_token(logits[0], row)
    else:
        unfiltered = transformers_scores(logits[0].float(), make_row(list(row.token_ids), **_without_top_p(row)))
        assert unfiltered[token] >= kept[kept.isfinite()].min()


def _without_top_p(row: Sequence) -> dict[str, Any]:
    params = row.sampling
    names = ("temperature", "top_k", "repetition_penalty", "no_repeat_ngram_size")
    return {name: getattr(params, name) for name in names}


def test_greedy_takes_the_first_of_equal_logits_as_torch_does() -> None:
    logits = torch.zeros(2, 500)
    logits[:, [7, 300]] = 3.0
    rows = [make_row([1]), make_row([1], repetition_penalty=1.2)]
    assert Sampler(CPU).sample(logits, rows).token_ids == [int(logits[0].argmax())] * 2 == [7, 7]


@pytest.mark.parametrize(
    "params",
    [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 2.0, "top_k": 4}],
    ids=["plain", "top_k", "top_p", "min_p", "hot"],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(params: dict[str, Any]) -> None:
    num_draws, vocab_size = 4000, 400
    logits = torch.full((vocab_size,), -30.0)
    logits[[3, 50, 111, 222, 399]] = torch.tensor([0.45, 0.25, 0.15, 0.1, 0.05]).log()
    rows = [make_row([1], **{"temperature": 1.0, **params}, seed=seed) for seed in range(num_draws)]
    drawn = torch.tensor(Sampler(CPU).sample(logits.expand(num_draws, -1), rows).token_ids)
    expected = transformers_scores(logits, rows[0]).softmax(-1)
    counts = torch.bincount(drawn, minlength=vocab_size)
    assert counts[expected < 1e-9].sum() == 0
    likely = expected > 1e-9
    chi2 = ((counts[likely] - num_draws * expected[likely]) ** 2 / (num_draws * expected[likely])).sum()
    assert chi2 < 18.5  # 4 degrees of freedom at most: exceeded once in 1,000 seeds, and these are fixed


def test_a_flat_distribution_is_drawn_from_the_whole_vocabulary() -> None:
    num_draws, vocab_size = 600, 5000
    rows = [make_row([1], temperature=1.0, seed=seed) for seed in range(num_draws)]
    drawn = torch.tensor(Sampler(CPU).sample(torch.zeros(num_draws, vocab_size), rows).token_ids)
    quarters = torch.bincount(drawn // (vocab_size // 4), minlength=4)
    assert ((quarters - num_draws / 4) ** 2 / (num_draws / 4)).sum() < 16.3  # 3 degrees of freedom, 0.1 %


def test_the_draw_does_not_depend_on_the_row_or_on_the_neighbours() -> None:
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1))
    row = make_row([4, 5], temperature=1.0, seed=99)
    alone = Sampler(CPU).sample(logits, [row]).token_ids[0]
    others = [make_row([1], temperature=0.5, top_k=3), make_row([2]), make_row([1, 1], repetition_penalty=2.0)]
    batch = torch.cat([torch.randn(3, 5000), logits])
    assert Sampler(CPU).sample(batch, [*others, row]).token_ids[3] == alone


def test_outputs_and_positions_draw_differently() -> None:
    rows = [
        Sequence("s", [1] * n, SamplingParams(max_tokens=9, temperature=1.0), output_index=i)
        for n in (1, 2)
        for i in (0, 1)
    ]
    assert len(set(Sampler(CPU).sample(torch.zeros(4, 9000), rows).token_ids)) == 4


def test_nan_and_infinity_are_reported_for_their_rows_alone() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    logits[1, 17] = float("nan")
    logits[3] = float("inf")
    rows = [make_row([1], temperature=t, logprobs=True) for t in (0.0, 0.0, 1.0, 1.0, 1.0)]
    sampled = Sampler(CPU).sample(logits, rows)
    assert sampled.invalid_rows == [1, 3]
    for i in (0, 2, 4):
        assert sampled.token_ids[i] == reference_token(logits[i], rows[i])


def test_logprobs_are_of_the_raw_logits_and_only_for_rows_that_ask() -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(3))
    rows = [
        make_row([1], temperature=0.3, top_k=2, logprobs=True),
        make_row([1]),
        make_row([5, 6], repetition_penalty=3.0, logprobs=True),
    ]
    sampled = Sampler(CPU).sample(logits, rows)
    assert sampled.logprobs.keys() == {0, 2}
    for i in (0, 2):
        assert sampled.logprobs[i] == pytest.approx(float(logits[i].log_softmax(-1)[sampled.token_ids[i]]), abs=1e-6)


def test_an_empty_step_samples_nothing() -> None:
    assert Sampler(CPU).sample(torch.zeros(0, 10), []).token_ids == []


def test_tokens_beyond_the_logits_are_not_penalised() -> None:
    # Some checkpoints embed more ids than their head scores.
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    row = make_row([1, 7, 7, 7], repetition_penalty=4.0, no_repeat_ngram_size=2)
    assert Sampler(CPU).sample(logits, [row]).token_ids == [0]


@pytest.mark.parametrize(
    "params",
    [
        {"sequence_bias": (((1,), 2.0), ((3,), 5.0), ((2,), -1.0), ((7, 1), 9.0))},
        {"repetition_penalty": 4.0},
        {"bad_words_ids": ((3,), (1,))},
        {"encoder_repetition_penalty": 0.5},
        {"presence_penalty": 0.5, "frequency_penalty": 1.0},
    ],
)
def test_an_edit_of_a_token_beyond_the_logits_meets_no_other(params: dict[str, Any]) -> None:
    """Not the first one of the row behind it, nor does it shift the values of the row's own."""
    logits = torch.tensor([[1.0, 2.0, 0.5], [3.0, 1.0, 2.0]])
    row, plain = make_row([1, 3, 7], [1, 1, 3], **params), make_row([0], repetition_penalty=1.0, min_tokens=1)
    scores = logits.clone()
    edit_scores(scores, [row, plain])
    wide = torch.cat([logits, torch.zeros(2, 5)], dim=1)  # with scores for all ids
    edit_scores(wide, [row, plain])
    assert torch.equal(scores, wide[:, :3])
    assert torch.equal(scores[1], logits[1])


@pytest.mark.parametrize(
    ("output", "params"),
    [([2], {"max_tokens": 2, "suppress_tokens": (3,)}), ([], {"max_tokens": 1, "begin_suppress_tokens": (3,)})],
)
def test_a_forced_token_that_is_suppressed_is_forbidden_as_the_rest(output: list[int], params: dict[str, Any]) -> None:
    """As transformers' processors leave it, in whose order what is suppressed comes last."""
    row = make_row([1], output, forced_eos_token_id=3, **params)
    scores = torch.zeros(1, 5)
    edit_scores(scores, [row])
    assert scores.eq(float("-inf")).all()


@pytest.mark.parametrize("num_tokens", [40, 200, 400])  # 10 ** 400 is no float
def test_a_penalty_that_has_grown_for_long_leaves_numbers(num_tokens: int) -> None:
    params = {"max_tokens": 500, "stop_token_ids": (1, 2, 3), "exponential_decay_length_penalty": (0, 10.0)}
    scores = torch.tensor([[50.0, 0.5, 0.0, 1e9]])
    edit_scores(scores, [make_row([0], [0] * num_tokens, **params)])
    assert scores[0, 0] == 50
    assert 1e28 < scores[0, 1] <= 1e30
    assert scores[0, 2] == 0
    assert 1e28 < scores[0, 3] <= 1.001e30


class TestWithoutWaiting:
    """As on a GPU: what is chosen is the same, and nobody looks at it before the end."""

    def rows(self) -> list[Sequence]:
        return [
            make_row([1, 2, 3]),
            make_row([1, 2, 3], logprobs=True),
            make_row([4, 5, 4], temperature=1.0, seed=3, repetition_penalty=1.2, no_repeat_ngram_size=2),
            make_row([4, 5, 6], temperature=0.7, seed=4, top_p=0.5, top_k=40, logprobs=True),
            make_row([7], temperature=1.0, seed=5),
        ]

    def test_no_operation_waits_for_the_device(self) -> None:
        logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(1)) * 5
        results = []
        for may_wait, waits in ((False, Waits()), (True, Waits())):
            with waits:
                results.append(Sampler(CPU, may_wait=may_wait).sample(logits, self.rows()))
            assert bool(waits.seen) == may_wait
        assert results[0] == results[1]

    def test_rows_that_need_more_candidates_are_drawn_again_with_their_logprobs(self) -> None:
        logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(2)) * 0.1  # nearly flat
        rows = [
            make_row([1], temperature=1.0, seed=1, top_p=0.9, logprobs=True),
            make_row([1], logprobs=True),
            make_row([2], temperature=1.0, seed=2, top_k=2000, repetition_penalty=0.8, logprobs=True),
        ]
        expected = Sampler(CPU).sample(logits, rows)
        sampled = Sampler(CPU, may_wait=False).sample(logits, rows)
        assert sampled.token_ids == expected.token_ids
        assert sampled.logprobs == pytest.approx(expected.logprobs)
        of_tokens = logits.log_softmax(-1)[torch.arange(3), torch.tensor(expected.token_ids)]
        assert list(sampled.logprobs.values()) == pytest.approx(of_tokens.tolist(), abs=1e-5)

    def test_invalid_logits_are_told(self) -> None:
        logits = torch.zeros(3, 500)
        logits[1, 7] = float("nan")
        rows = [make_row([1], temperature=1.0, top_p=0.5, seed=i) for i in range(3)]
        assert Sampler(CPU, may_wait=False).sample(logits, rows).invalid_rows == [1]

    def test_invalid_logits_of_greedy_rows_are_told(self) -> None:
        logits = torch.zeros(4, 500)
        logits[0, 3] = 1
        logits[1, 7] = float("nan")
        logits[2] = float("-inf")
        logits[3, 9] = float("inf")
        for kernel in (None, Kernels().argmax):
            sampled = Sampler(CPU, kernel).sample(logits, [make_row([1]) for _ in range(4)])
            assert sampled.invalid_rows == [1, 2, 3]
            assert sampled.token_ids[:2] == [3, 7]
            assert sampled.token_ids[3] == 9


@pytest.mark.parametrize("level", supported_levels())
def test_the_kernels_find_the_same_largest_scores_as_torch(level: str) -> None:
    argmax = Kernels(level).argmax
    generator = torch.Generator().manual_seed(11)
    for width in (1, 7, 16, 288, 49152):
        scores = torch.randn(9, width, generator=generator)
        scores[1] = 0.5  # ties: the first
        scores[2] = float("-inf")
        scores[3, width // 2] = float("inf")
        scores[4, width - 1] = float("nan")
        scores[4, 0] = float("inf")
        scores[5, width // 3 :] = scores[5, : width - width // 3].max() + 1
        found = argmax(scores).tolist()
        invalid = [2, 3, 4]  # largest scores that are not finite
        assert [row for row, token_id in enumerate(found) if token_id < 0] == invalid
        found = [~token_id if row in invalid else token_id for row, token_id in enumerate(found)]
        assert found == scores.argmax(-1).tolist(), width
    assert argmax(torch.empty(0, 5)).tolist() == []
