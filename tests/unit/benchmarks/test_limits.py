"""The roofline: what a pass over the weights and the multiply-adds allow."""

from __future__ import annotations

import pytest

from tests.benchmarks.hardware import instruction_rates
from tests.benchmarks.limits import Hardware, ModelCost, limits
from tests.benchmarks.workload import Request, Workload

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


def make_workload() -> Workload:
    runs = {
        "W1": [[Request([0] * 100, 50)] * 64],
        "W2": [[Request([0] * 128, 128)]],
        "W3": [[Request([0] * 2048, 1)]],
        "W4": [[Request([0] * 1056, 32)] * 32],
    }
    return Workload(runs, [], [], "")


def test_weights_are_those_of_the_matrices_with_the_tied_head_once() -> None:
    assert ModelCost.from_config(SMOLLM2).num_weights == 134_479_872


def test_operations_of_chunks_add_up() -> None:
    cost = ModelCost.from_config(SMOLLM2)
    assert cost.operations(10, 0, 1) + cost.operations(10, 10, 1) == cost.operations(20, 0, 2)


def test_slow_memory_binds_decoding_and_slow_arithmetic_binds_prefill() -> None:
    cost, workload = ModelCost.from_config(SMOLLM2), make_workload()
    slow_memory = limits(cost, workload, Hardware(1e9, {"bf16": 1e15}), "bf16")
    assert slow_memory["W2_itl"] == pytest.approx(134_479_872 * 2 / 1e9 * 1e3)
    assert slow_memory["W1"] == pytest.approx(64 * 50 / (100 * 134_479_872 * 2 / 1e9))  # 100 steps of 32
    slow_arithmetic = limits(cost, workload, Hardware(1e15, {"bf16": 1e11}), "bf16")
    assert slow_arithmetic["W3"] == pytest.approx(2048 * 1e11 / cost.operations(2048, 0, 1))


def test_a_shared_prefix_is_computed_once() -> None:
    cost, hardware = ModelCost.from_config(SMOLLM2), Hardware(1e15, {"bf16": 1e11})
    figures = limits(cost, make_workload(), hardware, "bf16")
    prefix = cost.operations(1024, 0, 0)
    tails = 32 * (cost.operations(32, 1024, 1) + cost.operations(31, 1056, 31))
    assert figures["W4"] == pytest.approx(32 * 32 * 1e11 / (prefix + tails))


def test_rates_of_instructions_are_measured_by_a_program_that_this_compiler_builds() -> None:
    rates = instruction_rates(threads=1)
    if not rates:
        pytest.skip("no C++ compiler")
    assert set(rates) == {"fp32", "bf16", "int8"}
    assert rates["fp32"] > 0
