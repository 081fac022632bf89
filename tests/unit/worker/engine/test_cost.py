from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders_engine import make_settings
from worker.engine.cost import UNMEASURED, CostModel, StepBudget

# 20 ms for the weights, then a millisecond a row: about what a small model takes on two cores.
LINEAR = CostModel.fit({1: 21.0, 8: 28.0, 32: 52.0, 128: 148.0, 512: 532.0})


def make_budget(cost: CostModel, **limits: object) -> StepBudget:
    return StepBudget(make_settings(**{"token_budget": None, "block_size": 16, "max_num_seqs": 64, **limits}), cost)


@pytest.mark.parametrize(
    ("num_rows", "ms"), [(0, 21.0), (1, 21.0), (4, 24.0), (8, 28.0), (20, 40.0), (512, 532.0), (1024, 1064.0)]
)
def test_costs_are_on_lines_between_and_beyond_the_measured(num_rows: int, ms: float) -> None:
    assert LINEAR.step_ms(num_rows) == pytest.approx(ms)


def test_a_flat_stretch_does_not_go_on_beyond_the_measured() -> None:
    cost = CostModel.fit({1: 100.0, 2: 100.0})
    assert (cost.step_ms(2), cost.step_ms(20)) == (100.0, 1000.0)


def test_a_disturbed_measurement_is_cut_to_what_a_larger_step_took() -> None:
    assert CostModel.fit({8: 90.0, 1: 20.0, 32: 50.0}).points == ((1, 20.0), (8, 50.0), (32, 50.0))


_measured = st.dictionaries(st.integers(1, 600), st.floats(0.01, 1000), min_size=1, max_size=8)


@given(_measured, st.integers(0, 3000))
def test_no_step_costs_more_than_a_larger_one(measured: dict[int, float], num_rows: int) -> None:
    cost = CostModel.fit(measured)
    assert cost.step_ms(num_rows) <= cost.step_ms(num_rows + 1) * (1 + 1e-12)
    for rows, ms in measured.items():
        assert cost.step_ms(rows) <= ms * (1 + 1e-12)


@given(_measured, st.floats(0.01, 2000), st.integers(1, 3000))
def test_the_most_rows_within_a_time_are_within_it_and_one_more_is_not(
    measured: dict[int, float], ms: float, limit: int
) -> None:
    cost = CostModel.fit(measured)
    num_rows = cost.most_rows(ms, limit)
    assert 0 <= num_rows <= limit
    assert num_rows == 0 or cost.step_ms(num_rows) <= ms
    assert num_rows == limit or cost.step_ms(num_rows + 1) > ms


def test_rows_are_efficient_where_larger_steps_save_nearly_nothing() -> None:
    assert LINEAR.efficient_rows(2048) == 512
    assert CostModel.fit({1: 5.0, 8: 5.1, 128: 6.0, 512: 30.0}).efficient_rows(2048) == 128
    assert UNMEASURED.efficient_rows(2048) == 2048


def test_a_given_budget_holds_for_every_step() -> None:
    budget = make_budget(LINEAR, token_budget=96)
    assert [budget.most_tokens(n) for n in (0, 1, 64)] == [96, 96, 96]


def test_a_step_with_decodes_stays_within_the_target() -> None:
    budget = make_budget(LINEAR, itl_target_ms=100)
    assert [budget.most_tokens(n) for n in (1, 30, 64)] == [80, 80, 148]  # 64 decodes alone take 84 ms, twice: 168


def test_a_step_without_decodes_may_be_larger() -> None:
    assert make_budget(LINEAR, itl_target_ms=100).most_tokens(0) == 512
    assert make_budget(LINEAR, itl_target_ms=1064).most_tokens(0) == 1024


def test_a_prompt_gets_on_where_even_decodes_miss_the_target() -> None:
    slow = CostModel.fit({1: 700.0, 128: 2100.0})  # 11 ms a row
    assert make_budget(slow, itl_target_ms=100).most_tokens(1) == 64  # 1,400 ms
    linear = CostModel.fit({1: 100.0, 2: 200.0})
    assert make_budget(linear, itl_target_ms=100).most_tokens(1) == 17  # a block beside the decode


@given(_measured, st.integers(0, 8), st.floats(0.1, 1000))
def test_a_budget_is_within_the_bounds_and_leaves_every_decode_its_row(
    measured: dict[int, float], num_decodes: int, target_ms: float
) -> None:
    settings = make_settings(
        token_budget=None, block_size=16, max_num_seqs=8, max_step_tokens=200, itl_target_ms=target_ms
    )
    num_tokens = StepBudget(settings, CostModel.fit(measured)).most_tokens(num_decodes)
    assert max(num_decodes, 1) <= num_tokens <= 200
