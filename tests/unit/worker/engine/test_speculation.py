from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.generation import SamplingParams
from tests.builders_engine import make_settings
from worker.engine.cost import UNMEASURED, CostModel
from worker.engine.sequence import Sequence
from worker.engine.speculation import Speculator, allot_drafts, num_accepted

# Weights cost 20 ms; rows are nearly free up to 8, then a millisecond each.
WEIGHTS_BOUND = CostModel.fit({1: 20.0, 8: 20.7, 64: 76.7})
LINEAR = CostModel.fit({1: 1.0, 100: 100.0})


# -- which drafts stand -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drafts", "chosen", "expected"),
    [
        ([], [], 0),
        ([4, 5, 6], [4, 5, 6], 3),
        ([4, 5, 6], [4, 9, 6], 1),
        ([4, 5, 6], [9, 5, 6], 0),
        ([4, 5, 6], [4, 5], 2),
    ],
)
def test_drafts_stand_up_to_the_first_that_was_not_chosen(drafts: list[int], chosen: list[int], expected: int) -> None:
    assert num_accepted(array("i", drafts), chosen) == expected


# -- how many are worth their rows ------------------------------------------------------------


def test_a_lone_sequence_drafts_where_rows_are_nearly_free() -> None:
    assert allot_drafts([[0.5, 0.25, 0.12, 0.06, 0.03, 0.015, 0.007]], 1, 8, WEIGHTS_BOUND) == [6]


def test_drafts_end_where_rows_begin_to_cost() -> None:
    assert allot_drafts([[0.7**k for k in range(1, 12)]], 1, 12, WEIGHTS_BOUND) == [7]
    assert allot_drafts([[0.99**k for k in range(1, 12)]], 1, 12, WEIGHTS_BOUND) == [11]


def test_nobody_drafts_where_each_row_costs_as_much_as_a_step() -> None:
    assert allot_drafts([[1.0, 1.0]] * 10, 10, 20, LINEAR) == [0] * 10


def test_a_large_batch_drafts_only_what_is_likely() -> None:
    chances = [[0.95, 0.9], [0.5, 0.25], []] * 10  # 42.7 ms for 30 tokens: a row of 1 ms must bring 0.77
    assert allot_drafts(chances, 30, 34, WEIGHTS_BOUND) == [2, 0, 0] * 10


def test_a_step_that_prefills_too_charges_drafts_what_rows_cost_there() -> None:
    assert allot_drafts([[0.9]], 1, 8, WEIGHTS_BOUND) == [1]
    steep = CostModel.fit({1: 20.0, 8: 20.7, 64: 76.7, 65: 96.7})
    assert allot_drafts([[0.9]], 64, 8, steep) == [0]


def test_the_likeliest_drafts_come_first_when_few_are_allowed() -> None:
    assert allot_drafts([[0.5, 0.4], [0.9, 0.45], [0.3]], 3, 3, UNMEASURED) == [1, 2, 0]


def test_drafts_must_bring_in_what_a_step_with_drafts_costs_more() -> None:
    graph = CostModel.fit({1: 5.0, 64: 5.0}, draft_overhead_ms=9.0)
    assert allot_drafts([[0.9, 0.8]], 1, 8, graph) == [0]  # 2.7 tokens in 14 ms, 1 in 5
    assert allot_drafts([[0.9, 0.8, 0.7]], 1, 8, graph) == [3]  # 3.4


@given(
    chances=st.lists(st.lists(st.floats(0, 1), max_size=6).map(lambda c: sorted(c, reverse=True)), min_size=1),
    num_other_rows=st.integers(0, 50),
    max_drafts=st.integers(0, 20),
    measured=st.dictionaries(st.integers(1, 100), st.floats(0.1, 100), min_size=1),
    overhead=st.floats(0, 10),
)
def test_drafts_keep_their_bounds_and_never_lower_what_a_step_yields(
    chances: list[list[float]], num_other_rows: int, max_drafts: int, measured: dict[int, float], overhead: float
) -> None:
    cost = CostModel.fit(measured, overhead)
    num_rows = len(chances) + num_other_rows
    nums = allot_drafts(chances, num_rows, max_drafts, cost)
    assert sum(nums) <= max_drafts
    assert all(0 <= num <= len(of_sequence) for num, of_sequence in zip(nums, chances, strict=True))
    if any(nums):
        alone = cost.step_ms(len(chances))
        tokens = len(chances) + sum(sum(c[:num]) for num, c in zip(nums, chances, strict=True))
        spent = alone + cost.step_ms(num_rows + sum(nums)) - cost.step_ms(num_rows) + overhead
        assert tokens / spent >= len(chances) / alone * (1 - 1e-9)


# -- who drafts -------------------------------------------------------------------------------


def make_decode(token_ids: list[int], num_output_tokens: int = 0, **params: object) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 50, **params})
    split = len(token_ids) - num_output_tokens
    return Sequence("s", token_ids[:split], sampling, emitted=token_ids[split:])


def make_speculator(cost: CostModel = UNMEASURED, max_model_len: int = 100, **limits: int) -> Speculator:
    return Speculator(make_settings(**limits), cost, max_model_len)


def drafted(speculator: Speculator, *decodes: Sequence, max_drafts: int = 20) -> dict[int, list[int]]:
    return {i: ids.tolist() for i, ids in speculator.draft(decodes, len(decodes), max_drafts).items()}


def test_sequences_draft_from_their_own_text() -> None:
    decodes = [make_decode([1, 2, 3, 1, 2]), make_decode([4, 5, 6]), make_decode([7, 8, 9, 7])]
    assert drafted(make_speculator(max_draft_tokens=3), *decodes) == {0: [3, 1, 2], 2: [8, 9, 7]}


def test_nothing_is_drafted_beyond_the_last_token_there_can_be() -> None:
    speculator = make_speculator(max_model_len=8)
    periodic = [1, 2, 1, 2, 1]
    assert drafted(speculator, make_decode(periodic, max_tokens=4)) == {0: [2, 1]}  # the third follows from the logits
    assert drafted(speculator, make_decode(periodic, 3, max_tokens=5)) == {0: [2]}
    assert drafted(speculator, make_decode(periodic, 3, max_tokens=4)) == {}
    assert drafted(speculator, make_decode(periodic, max_tokens=50)) == {0: [2, 1]}  # the context ends the output


def test_sequences_with_penalties_do_not_draft() -> None:
    for params in ({"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 3}):
        assert drafted(make_speculator(), make_decode([1, 2, 1, 2, 1], **params)) == {}


def test_sequences_are_not_even_looked_at_where_no_draft_could_pay() -> None:
    decode = make_decode([1, 2, 1, 2, 1])
    assert drafted(make_speculator(LINEAR), decode) == {}
    assert drafted(make_speculator(), decode, max_drafts=0) == {}
    assert decode.lookup is None
