from __future__ import annotations

import pytest
import torch

from tests.builders_engine import make_settings, tiny_model
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.batch import TokensInFlight
from worker.engine.probe import measure_ms, probe_cost
from worker.engine.runner import ModelRunner, StepOutOfMemory
from worker.engine.scheduler import Plan


class PaperMachine:
    """A clock that only steps move: so many milliseconds for each number of rows, run by run."""

    def __init__(self, step_ms: dict[int, list[float]]) -> None:
        self.now = 100.0
        self.runs: list[int] = []
        self._left = {num_rows: list(times) for num_rows, times in step_ms.items()}

    def run(self, num_rows: int) -> None:
        self.runs.append(num_rows)
        times = self._left[num_rows]
        self.now += (times.pop(0) if len(times) > 1 else times[0]) / 1000

    def clock(self) -> float:
        return self.now


def test_sizes_take_turns_and_the_shortest_time_of_each_counts() -> None:
    machine = PaperMachine({1: [90.0, 30.0, 20.0], 8: [95.0, 31.0, 25.0]})
    measured = measure_ms(machine.run, (1, 8), clock=machine.clock)
    assert measured == pytest.approx({1: 20.0, 8: 25.0})
    assert machine.runs == [1, 8] * 6


def test_a_size_that_would_not_fit_into_the_time_left_is_passed_over() -> None:
    machine = PaperMachine({1: [20.0], 128: [200.0], 32: [50.0], 512: [600.0]})
    measured = measure_ms(machine.run, (1, 128, 32, 512), clock=machine.clock, limit_s=1.0)
    assert machine.runs == [1, 128] + [1, 128, 32] * 3 + [1, 32] * 2  # 512 rows may take 800 ms, and 730 are left
    assert sorted(measured) == [1, 32, 128]


def test_of_a_slow_model_two_sizes_are_measured_once_each() -> None:
    machine = PaperMachine({1: [700.0], 128: [2000.0], 32: [900.0]})
    measured = measure_ms(machine.run, (1, 128, 32), clock=machine.clock, limit_s=1.0)
    assert measured == pytest.approx({1: 700.0, 128: 2000.0})
    assert machine.runs == [1, 128, 1, 128]


def test_a_size_that_memory_does_not_hold_is_left_out_with_larger_ones() -> None:
    machine = PaperMachine({1: [1.0], 8: [1.0], 32: [1.0]})
    tried: list[int] = []

    def run(num_rows: int) -> None:
        tried.append(num_rows)
        if num_rows >= 128:
            raise StepOutOfMemory("as told")
        machine.run(num_rows)

    assert sorted(measure_ms(run, (1, 8, 128, 32, 512), clock=machine.clock)) == [1, 8, 32]
    assert tried.count(128) == 1
    assert 512 not in tried


class RecordingRunner(ModelRunner):
    """Notes the shape of each step: rows of its chunks, and the shape of its logits."""

    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]]

    def execute(self, plan: Plan, in_flight: TokensInFlight | None = None) -> torch.Tensor:
        logits = super().execute(plan, in_flight)
        self.shapes.append((tuple(chunk.num_tokens for chunk in plan.chunks), tuple(logits.shape)))
        return logits


def test_the_probe_runs_decodes_and_beyond_them_a_prefill() -> None:
    settings = make_settings(token_budget=None, max_step_tokens=64, max_num_seqs=6, num_blocks=20)
    runner = RecordingRunner(tiny_model("llama"), TorchAttention(4), settings)
    runner.shapes = []
    cost = probe_cost(runner, settings, clock=lambda: 0.0)  # no time passes, so that none is short
    assert [num_rows for num_rows, _ in cost.points] == [1, 2, 4, 8, 32]
    assert sorted(set(runner.shapes), key=lambda shape: sum(shape[0])) == [
        ((1,), (1, 200)),
        ((1, 1), (2, 200)),
        ((1, 1, 1, 1), (4, 200)),
        ((1, 1, 1, 1, 1, 3), (5, 200)),
        ((1, 1, 1, 1, 1, 27), (5, 200)),
    ]


def test_the_probe_stays_within_a_short_context() -> None:
    settings = make_settings(token_budget=None, num_blocks=3)  # 12 tokens
    cost = probe_cost(ModelRunner(tiny_model("llama"), TorchAttention(4), settings), settings, clock=lambda: 0.0)
    assert [num_rows for num_rows, _ in cost.points] == [1, 2, 4, 8]


@pytest.mark.parametrize("speculation", [True, False])
def test_a_step_with_drafts_is_probed_where_there_can_be_one(speculation: bool) -> None:
    limits = {"token_budget": None, "max_step_tokens": 8, "max_num_seqs": 8, "num_blocks": 20}
    settings = make_settings(speculation=speculation, **limits)
    runner = RecordingRunner(tiny_model("llama"), TorchAttention(4), settings)
    runner.shapes = []
    probe_cost(runner, settings, clock=lambda: 0.0)
    assert (((4, 4), (8, 200)) in runner.shapes) == speculation


def test_what_a_step_with_drafts_takes_longer_is_part_of_the_cost() -> None:
    class PaperRunner:
        device = torch.device("cpu")
        max_model_len = 64
        max_source_tokens = 0
        vocab_size = 10
        now = 0.0

        def execute(self, plan: Plan, in_flight: TokensInFlight | None = None) -> torch.Tensor:
            self.now += 0.020 + 0.001 * plan.num_tokens + 0.007 * any(chunk.drafts for chunk in plan.chunks)
            return torch.zeros(len(plan.logit_rows), self.vocab_size)

    runner = PaperRunner()
    cost = probe_cost(runner, make_settings(token_budget=None, max_num_seqs=8), clock=lambda: runner.now)
    assert dict(cost.points) == pytest.approx({1: 21.0, 2: 22.0, 4: 24.0, 8: 28.0, 32: 52.0})
    assert cost.draft_overhead_ms == pytest.approx(7.0)
