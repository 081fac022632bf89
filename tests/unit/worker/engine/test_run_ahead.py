"""Steps launched before the one before them has landed: the same outputs, and no token is waited for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from common.generation import FinishReason
from tests.builders_engine import (
    Driver,
    PaperRunner,
    TokenNames,
    generate,
    make_engine,
    make_request,
    make_settings,
    reference_tokens,
    tiny_model,
)
from worker.engine import sampler
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.batch import TokensInFlight
from worker.engine.graphs import GraphRunner, run_again
from worker.engine.loop import Engine
from worker.engine.runner import ModelRunner
from worker.engine.sampler import PendingTokens
from worker.engine.scheduler import Plan

WIDE = {"token_budget": 64, "max_num_seqs": 16, "speculation": False}


class Journal(PaperRunner):
    """Writes down what is launched; with `watch`, what lands as well."""

    def __init__(self, **fields: int) -> None:
        super().__init__(**fields)
        self.events: list[str] = []

    def execute(self, plan: Plan, in_flight: TokensInFlight | None = None) -> torch.Tensor:
        self.events.append(f"launch {plan.num_tokens}")
        return super().execute(plan, in_flight)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        result = PendingTokens.result

        def land(pending: PendingTokens) -> Any:
            self.events.append("land")
            return result(pending)

        monkeypatch.setattr(PendingTokens, "result", land)


def test_the_next_step_is_launched_before_a_step_lands(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Journal()
    runner.watch(monkeypatch)
    collected = generate(make_engine(runner, runs_ahead=True, **WIDE), make_request("r", [1, 2, 3], max_tokens=4))["r"]
    assert len(collected.tokens[0]) == 4
    # The last token's step is known to be the last: nothing is launched behind it.
    assert runner.events == ["launch 3", "launch 1", "land", "launch 1", "land", "launch 1", "land", "land"]


def test_what_an_unforeseen_end_computes_in_vain_is_dropped() -> None:
    plain = generate(make_engine(PaperRunner(), **WIDE), make_request("r", [1, 2, 3], max_tokens=9))["r"]
    stop = plain.tokens[0][4]
    runner = Journal()
    request = make_request("r", [1, 2, 3], max_tokens=9, stop_token_ids=(stop,))
    collected = generate(make_engine(runner, runs_ahead=True, **WIDE), request)["r"]
    assert collected.tokens[0] == plain.tokens[0][: plain.tokens[0].index(stop) + 1]
    assert collected.reasons == [FinishReason.STOP]
    assert runner.num_rows == 3 + len(collected.tokens[0])  # of these the last one in vain


@pytest.mark.parametrize(
    "fields",
    [{"repetition_penalty": 1.3}, {"num_beams": 2}, {"num_outputs": 2}, {"prompt_logprobs": 0}],
    ids=lambda fields: next(iter(fields)),
)
def test_a_step_lands_first_where_the_next_one_depends_on_its_tokens(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Journal()
    runner.watch(monkeypatch)
    generate(make_engine(runner, runs_ahead=True, **WIDE), make_request("r", [1, 2, 3], max_tokens=3, **fields))
    assert runner.events[:2] == ["launch 3", "land"]


def test_a_request_that_comes_back_under_an_aborted_id_gets_nothing_of_the_old_one() -> None:
    engine = make_engine(PaperRunner(), runs_ahead=True, **WIDE)
    driver = Driver(engine)
    driver.add(make_request("r", [1, 2, 3], max_tokens=9))
    driver.step()  # a step of it is in flight
    engine.abort("r")
    driver.step()
    driver.results.clear()
    driver.add(make_request("r", [7, 8, 9], max_tokens=5))
    expected = generate(make_engine(PaperRunner(), **WIDE), make_request("r", [7, 8, 9], max_tokens=5))
    assert driver.run()["r"].tokens == expected["r"].tokens


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_blocks_that_fill_with_a_pending_token_are_shared_later(temperature: float) -> None:
    """Their hash takes the token's id, which is not known when the step is planned."""
    engine = make_engine(PaperRunner(), runs_ahead=True, **WIDE)
    fields = {"temperature": temperature, "seed": 5}
    first = generate(engine, make_request("a", [1, 2, 3], max_tokens=14, **fields))["a"]
    again = generate(engine, make_request("b", [1, 2, 3, *first.tokens[0]], max_tokens=2))["b"]
    assert again.usage is not None
    assert again.usage.cached_prompt_tokens == 16


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=20), min_size=1, max_size=4),
    top_ps=st.lists(st.sampled_from([0.3, 0.9, 0.99, 1.0]), min_size=4, max_size=4),
    temperature=st.sampled_from([0.5, 2.0]),
    stops=st.sampled_from([(), (7, 8, 9)]),
    num_blocks=st.integers(17, 30),
    logprobs=st.booleans(),
)
def test_rows_that_need_more_candidates_are_computed_again(
    prompts: list[list[int]],
    top_ps: list[float],
    temperature: float,
    stops: tuple[int, ...],
    num_blocks: int,
    logprobs: bool,
) -> None:
    """The device had gone on with another token than the one that is drawn once somebody looks."""
    fields = {"temperature": temperature, "stop_token_ids": stops, "logprobs": logprobs, "max_tokens": 12}
    requests = [make_request(f"r{i}", p, seed=i, top_p=top_ps[i], **fields) for i, p in enumerate(prompts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "CANDIDATES", 2)
        ahead = make_engine(PaperRunner(num_blocks=num_blocks), runs_ahead=True, max_num_seqs=3, speculation=False)
        results = generate(ahead, *requests)
        for request in requests:
            alone = generate(make_engine(PaperRunner(num_blocks=200), speculation=False), request)[request.request_id]
            collected = results[request.request_id]
            assert collected.tokens == alone.tokens
            assert collected.reasons == alone.reasons
            assert collected.logprobs[0] == pytest.approx(alone.logprobs[0])


@pytest.mark.parametrize("is_recorded", [False, True])
def test_a_real_model_gives_what_it_gives_alone(is_recorded: bool) -> None:
    model: PreTrainedModel = tiny_model("llama", num_hidden_layers=2)
    requests = [
        make_request(f"r{n}", [(7 * i + n) % 190 + 3 for i in range(n)], max_tokens=12) for n in (1, 17, 40, 5, 29)
    ]
    expected = [reference_tokens(model, request.prompt_token_ids, request.sampling) for request in requests]
    limits = make_settings(block_size=4, num_blocks=40, token_budget=24, max_num_seqs=4)
    inner = ModelRunner(model, TorchAttention(4), limits)
    runner = GraphRunner(inner, run_again, 4, 4, 24) if is_recorded else inner
    results = generate(Engine(runner, limits, TokenNames, runs_ahead=True), *requests)
    assert [results[request.request_id].tokens[0] for request in requests] == expected
