"""Requests that arrive together with one new prefix compute it once, whatever becomes of the first of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.builders_engine import Driver, PaperRunner, make_engine, make_request, paper_tokens
from worker.engine.types import GenerationRequest

PREFIX = [(7 * i) % 40 for i in range(40)]  # ten blocks
NUM_REQUESTS = 12


def make_requests(num_requests: int = NUM_REQUESTS, max_tokens: int = 1) -> list[GenerationRequest]:
    """The prefix and a tail of three tokens each."""
    tails = [[i % 40, (i + 9) % 40, 5] for i in range(num_requests)]
    return [make_request(f"r{i}", [*PREFIX, *tail], max_tokens=max_tokens) for i, tail in enumerate(tails)]


def make_driver(token_budget: int, **limits: int) -> tuple[Driver, PaperRunner]:
    runner = PaperRunner(num_blocks=200)
    return Driver(make_engine(runner, token_budget=token_budget, max_num_seqs=16, speculation=False, **limits)), runner


def check(driver: Driver, requests: list[GenerationRequest]) -> None:
    for request in requests:
        expected = paper_tokens(request.prompt_token_ids, request.sampling.max_tokens)
        assert driver.results[request.request_id].tokens == [expected]


@pytest.mark.parametrize("token_budget", [500, 43, 40, 39, 30, 17, 16])
def test_a_new_prefix_is_computed_once_in_however_many_chunks(token_budget: int) -> None:
    driver, runner = make_driver(token_budget)
    requests = make_requests()
    driver.add(*requests)
    driver.run()
    assert runner.num_rows == 40 + 3 * NUM_REQUESTS
    check(driver, requests)


@pytest.mark.parametrize("token_budget", [30, 17])
def test_decodes_beside_it_do_not_make_a_prefix_be_computed_twice(token_budget: int) -> None:
    driver, runner = make_driver(token_budget)
    others = [make_request(f"other{i}", [i, 1], max_tokens=30) for i in range(3)]
    driver.add(*others)
    driver.step()
    requests = make_requests()
    driver.add(*requests)
    driver.run()
    assert runner.num_rows == 40 + 3 * NUM_REQUESTS + 3 * (2 + 29)
    check(driver, [*requests, *others])


@pytest.mark.parametrize("num_steps", [1, 2])
def test_when_the_first_is_cancelled_midway_another_goes_on_from_there(num_steps: int) -> None:
    driver, runner = make_driver(token_budget=16)
    requests = make_requests()
    driver.add(*requests)
    for _ in range(num_steps):
        driver.step()
    driver.engine.abort("r0")
    driver.run()
    assert runner.num_rows == 40 + 3 * (NUM_REQUESTS - 1)
    check(driver, requests[1:])


def test_when_the_first_is_set_aside_midway_nothing_is_computed_twice() -> None:
    driver, runner = make_driver(token_budget=16)
    runner.fail_steps = {2}
    requests = make_requests()
    driver.add(*requests)
    driver.run()
    assert driver.engine.stats().num_preemptions == 1
    assert runner.num_rows == 40 + 3 * NUM_REQUESTS + 16  # the step that failed
    check(driver, requests)


def test_when_the_first_fails_another_computes_the_prefix_again() -> None:
    driver, runner = make_driver(token_budget=16)
    requests = make_requests()
    bad = replace(requests[0], prompt_token_ids=(*PREFIX, 1, 2, 39))
    runner.poisoned_token = 39
    driver.add(bad, *requests[1:])
    driver.run()
    assert driver.results["r0"].error == "NAN_LOGITS"
    assert runner.num_rows == 2 * 40 + 3 * NUM_REQUESTS
    check(driver, requests[1:])


def test_a_prefix_that_an_urgent_request_interrupts_is_computed_once() -> None:
    driver, runner = make_driver(token_budget=16)
    requests = [replace(request, priority=1) for request in make_requests()]
    driver.add(*requests)
    driver.step()
    urgent = make_request("urgent", [3] * 37, max_tokens=1)
    driver.add(urgent)
    driver.run()
    assert runner.num_rows == 40 + 3 * NUM_REQUESTS + 37
    check(driver, [*requests, urgent])
