"""One run of a contestant: what its figures mean, and that a short answer is no figure."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.benchmarks.contestants.base import Contestant, Output, figures, obey, run
from tests.benchmarks.workload import Request, Workload


class Toy(Contestant):
    """Answers at once, with `missing` tokens too few."""

    def __init__(self, missing: int = 0) -> None:
        self.info = {}
        self._missing = missing

    def batch(self, requests: Sequence[Request], max_running: int) -> list[Output]:
        return [Output([7] * (request.max_tokens - self._missing)) for request in requests]

    def stream(self, request: Request) -> Output:
        return Output([7] * request.max_tokens, [float(i) for i in range(request.max_tokens)])


def test_latency_is_to_the_first_token_and_between_tokens() -> None:
    output = Output([1, 2, 3], [10.5, 10.6, 10.8])
    found = figures("W2", [Request([0], 3)], [output], 10.0, 9.9)
    assert found == pytest.approx({"ttft_ms": 500.0, "itl_ms": 150.0})


def test_rates_count_outputs_and_prompts_apart() -> None:
    requests = [Request([0] * 30, 10), Request([0] * 10, 10)]
    assert figures("W4", requests, [Output(), Output()], 0.0, 2.0) == {"out_tok_s": 10.0, "total_tok_s": 30.0}
    assert figures("W3", requests, [Output(), Output()], 0.0, 2.0) == {"prompt_tok_s": 20.0}


def test_gaps_between_tokens_are_told_where_the_engine_shows_them() -> None:
    requests = [Request([0], 3)] * 2
    outputs = [Output([1, 2, 3], [1.0, 1.1, 1.2]), Output([1, 2, 3], [3.0, 3.1, 3.6])]
    found = figures("W1", requests, outputs, 0.0, 4.0)
    assert found["ttft_p50_ms"] == pytest.approx(2000)
    assert (found["itl_p50_ms"], found["itl_p99_ms"]) == pytest.approx((100, 500))


def test_only_w1_keeps_ids_for_the_comparison() -> None:
    assert run(Toy(), "W1", [Request([0], 2)] * 10, 4)["token_ids"] == [[7, 7]] * 8
    assert run(Toy(), "W4", [Request([0], 2)] * 10, 4)["token_ids"] == []


def test_a_run_that_is_a_token_short_is_refused() -> None:
    with pytest.raises(ValueError, match="asked for 5 tokens, got 4"):
        run(Toy(missing=1), "W1", [Request([0], 5)], 1)


def test_a_first_token_is_of_another_text_and_directly_behind_a_call_to_warm_up() -> None:
    class Recorder(Toy):
        """Remembers what was asked."""

        settle_s = 0.0

        def __init__(self) -> None:
            super().__init__()
            self.asked: list[Request] = []

        def stream(self, request: Request) -> Output:
            self.asked.append(request)
            return Output([7] * request.max_tokens, [11.0 + i for i in range(request.max_tokens)], called=10.0)

    warm_up, recorder = Request([5], 2), Recorder()
    workload = Workload({"W2": [[Request([3, 1, 4, 1], 4)]]}, [warm_up], [], "")
    order = {"workload": "W2", "variant": 0, "first_token_id": 9}
    assert obey(recorder, workload, order)["figures"] == {"ttft_ms": 1000, "itl_ms": 1000}
    assert obey(recorder, workload, {"first_token": 0, "first_token_id": 9}) == {"first_token_ms": 1000}
    assert recorder.asked == [warm_up, Request([9, 1, 4, 1], 4), warm_up, Request([9, 1, 4, 1], 2)]
