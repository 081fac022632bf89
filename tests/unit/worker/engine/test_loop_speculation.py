"""Speculation changes how many steps an output takes, and nothing else."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from common.generation import FinishReason, OutputDelta, SamplingParams, Usage
from tests.builders_engine import (
    Collected,
    Driver,
    PaperRunner,
    generate,
    make_engine,
    make_request,
    make_sequence,
    tiny_model,
)
from worker.engine.blocks import BlockPool
from worker.engine.scheduler import Chunk, Plan, Scheduler
from worker.engine.types import GenerationRequest

WIDE = {"token_budget": 64, "max_num_seqs": 16}


class ScriptedRunner(PaperRunner):
    """Greedy output goes round a list of tokens: the token behind `cycle[i]` is `cycle[i + 1]`."""

    def __init__(self, cycle: list[int], **fields: int) -> None:
        super().__init__(**fields)
        self.next_of = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))

    def _logits(self, tokens: Any) -> Any:
        logits = super()._logits(tokens)
        logits[self.next_of.get(tokens[-1], 0)] += 100
        return logits


def outcome(collected: Collected) -> tuple[Any, ...]:
    return (
        collected.tokens,
        collected.texts,
        [[round(logprob, 4) for logprob in logprobs] for logprobs in collected.logprobs],
        collected.reasons,
        collected.stop_matches,
        collected.error,
    )


# -- several tokens a step --------------------------------------------------------------------


def test_a_step_gives_all_tokens_that_were_guessed_right_and_one_more() -> None:
    runner = ScriptedRunner([1, 2, 3, 4, 5])
    driver = Driver(make_engine(runner, max_draft_tokens=4, **WIDE))
    driver.add(make_request("r", [1, 2, 3, 4, 5, 1], max_tokens=12))
    deltas = [delta for _ in range(4) for output in driver.step().outputs for delta in output.deltas]
    assert [delta.token_ids for delta in deltas] == [(2,), (3, 4, 5, 1, 2), (3, 4, 5, 1, 2), (3,)]
    assert [delta.first_token_index for delta in deltas] == [0, 1, 6, 11]
    assert deltas[1] == OutputDelta(0, 1, (3, 4, 5, 1, 2), "3 4 5 1 2 ")
    assert driver.results["r"].reasons == [FinishReason.LENGTH]
    assert driver.results["r"].usage == Usage(6, 0, 12)
    assert driver.engine.stats().generated_tokens == 12


def test_a_wrong_guess_costs_a_row_and_nothing_else() -> None:
    runner = ScriptedRunner([1, 2, 3, 4, 5])
    driver = Driver(make_engine(runner, max_draft_tokens=3, **WIDE))
    driver.add(make_request("r", [2, 3, 9, 9, 1], max_tokens=4))  # 2 3 stood before 9 9, but 4 5 follows
    deltas = [delta for _ in range(3) for output in driver.step().outputs for delta in output.deltas]
    assert [delta.token_ids for delta in deltas] == [(2,), (3, 4), (5,)]  # after 2: drafts 3 9, and 9 is not chosen
    assert runner.num_draft_rows == 2


def test_nothing_is_drafted_when_speculation_is_off() -> None:
    runner = ScriptedRunner([1, 2, 3])
    generate(make_engine(runner, speculation=False, **WIDE), make_request("r", [1, 2, 3, 1], max_tokens=20))
    assert (runner.num_steps, runner.num_draft_rows) == (20, 0)


@pytest.mark.parametrize(
    ("params", "num_tokens", "reason", "match", "text"),
    [
        ({"max_tokens": 7}, 7, FinishReason.LENGTH, None, "2 3 4 5 1 2 3 "),
        ({"stop_token_ids": (5,)}, 4, FinishReason.STOP, 5, "2 3 4 "),
        ({"stop_strings": ("4 5",)}, 4, FinishReason.STOP, "4 5", "2 3 "),
        ({"stop_strings": ("1 2 3 9",), "max_tokens": 8}, 8, FinishReason.LENGTH, None, "2 3 4 5 1 2 3 4 "),
    ],
)
def test_an_output_that_ends_among_accepted_tokens_drops_those_behind_its_end(
    params: dict[str, Any], num_tokens: int, reason: FinishReason, match: str | int | None, text: str
) -> None:
    runner = ScriptedRunner([1, 2, 3, 4, 5])
    engine = make_engine(runner, **WIDE)
    collected = generate(engine, make_request("r", [1, 2, 3, 4, 5, 1], **{"max_tokens": 30, **params}))["r"]
    assert collected.tokens == [([2, 3, 4, 5, 1] * 2)[:num_tokens]]
    assert (collected.reasons, collected.stop_matches, collected.texts) == ([reason], [match], [text])
    assert collected.usage == Usage(6, 0, num_tokens)
    assert runner.num_steps < num_tokens


def test_every_token_of_a_step_has_its_own_logprob() -> None:
    request = make_request("r", [1, 2, 3, 1], max_tokens=12, logprobs=True, temperature=0.7, seed=4)
    runner = PaperRunner(memory=1)
    speculated = generate(make_engine(runner, **WIDE), request)["r"]
    plain = generate(make_engine(PaperRunner(memory=1), speculation=False), request)["r"]
    assert runner.num_draft_rows > 0
    assert len(speculated.logprobs[0]) == 12
    assert outcome(speculated) == outcome(plain)


# -- what drafts may take ---------------------------------------------------------------------


def test_logits_are_never_needed_of_more_rows_than_there_may_be_sequences() -> None:
    rows: list[int] = []

    class Counting(ScriptedRunner):
        def execute(self, plan: Any, in_flight: Any = None) -> Any:
            rows.append(len(plan.logit_rows))
            assert plan.num_tokens <= 20
            return super().execute(plan, in_flight)

    runner = Counting([1, 2, 3], num_blocks=60)
    requests = [make_request(f"r{i}", [1, 2, 3, 1], max_tokens=8 + 8 * i) for i in range(3)]
    generate(make_engine(runner, token_budget=20, max_num_seqs=7), *requests)
    assert max(rows) == 7


def test_a_draft_never_takes_a_block_from_another_sequence() -> None:
    runner = ScriptedRunner([1, 2, 3], num_blocks=9, max_model_len=32)
    engine = make_engine(runner, **WIDE)
    requests = [make_request(f"r{i}", [i + 5, 1, 2, 3, 1], max_tokens=8) for i in range(2)]  # 4 blocks each, of 8
    driver = Driver(engine)
    driver.add(*requests)
    driver.run()
    assert runner.num_draft_rows > 0
    assert engine.stats().num_preemptions == 0


def test_blocks_that_only_drafts_needed_are_free_after_the_step() -> None:
    runner = ScriptedRunner([1, 2, 3, 4, 5])
    engine = make_engine(runner, **WIDE)
    driver = Driver(engine)
    driver.add(make_request("r", [2, 3, 9, 9, 9, 9, 9, 9, 9, 9, 1], max_tokens=10))
    for _ in range(2):
        driver.step()
    assert runner.num_draft_rows == 8
    assert len(driver.results["r"].tokens[0]) == 3  # one draft stood
    assert engine.stats().num_free_blocks == 32 - 4  # 14 tokens


def test_accepted_tokens_fill_blocks_that_later_requests_hit() -> None:
    runner = ScriptedRunner([1, 2, 3, 4, 5])
    engine = make_engine(runner, **WIDE)
    first = generate(engine, make_request("a", [1, 2, 3, 4, 5, 1], max_tokens=15))["a"]
    assert runner.num_steps < 8
    history = [1, 2, 3, 4, 5, 1, *first.tokens[0]]
    collected = generate(engine, make_request("b", [*history, 7, 7], max_tokens=2))["b"]
    assert collected.usage == Usage(23, 20, 2)  # the 21st token was never computed


def test_short_memory_gives_back_what_drafts_took() -> None:
    runner = ScriptedRunner([1, 2, 3, 4, 5])
    runner.fail_steps = {2}
    requests = [make_request(f"r{i}", [9 + i, 1, 2, 3, 4, 5, 1], max_tokens=15) for i in range(2)]
    driver = Driver(make_engine(runner, **WIDE))
    driver.add(*requests)
    driver.step()
    driver.step()
    assert runner.num_draft_rows > 0
    assert driver.engine.stats().num_preemptions == 1
    assert driver.engine.stats().num_free_blocks == 32 - 2  # the other one has seven tokens in the cache
    driver.run()
    assert all(collected.tokens == [[2, 3, 4, 5, 1] * 3] for collected in driver.results.values())


@pytest.mark.parametrize("seed", [None, 11, 20])
def test_a_prompt_that_several_outputs_begin_with_drafts_nothing(seed: int | None) -> None:
    """Its last token alone in a step looks like a decode, but others share its block and take its logits."""
    runner = ScriptedRunner([1, 2, 3, 4, 5])
    engine = make_engine(runner, token_budget=8)
    sampling = {"num_outputs": 2, "max_tokens": 4, "temperature": 0.0 if seed is None else 25.0, "seed": seed or 0}
    request = make_request("r", [1, 2, 3, 4, 5, 0, 0, 0, 1], **sampling)
    driver = Driver(engine)
    driver.add(request)
    driver.step()
    driver.step()
    assert [len(tokens) for tokens in driver.results["r"].tokens] == [1, 1]
    assert runner.num_draft_rows == 0
    driver.run()
    assert runner.num_draft_rows > 0
    plain = make_engine(ScriptedRunner([1, 2, 3, 4, 5]), token_budget=8, speculation=False)
    assert driver.results["r"].tokens == generate(plain, request)["r"].tokens
    assert seed is not None or driver.results["r"].tokens == [[2, 3, 4, 5]] * 2


def test_forks_take_the_logits_of_their_parents_last_token() -> None:
    parent, other = make_sequence(8, "a"), make_sequence(8, "b")
    parent.forks = [make_sequence(8, "a", output_index=1)]
    chunks = (Chunk(other, 1, is_last=True), Chunk(parent, 3, is_last=True, drafts=array("i", [7, 8])))
    assert Plan(chunks, 4).sampled_indices == [0, 1, 2, 3, 1]


# -- invalid logits ---------------------------------------------------------------------------


def test_nan_in_a_row_that_does_not_count_ends_nothing() -> None:
    runner = ScriptedRunner([1, 2, 3, 4, 5])
    runner.poisoned_token = 9
    collected = generate(make_engine(runner, **WIDE), make_request("r", [2, 3, 9, 9, 1], max_tokens=8))["r"]
    assert runner.num_draft_rows > 0
    assert (collected.tokens, collected.error) == ([[2, 3, 4, 5, 1, 2, 3, 4]], None)


def test_nan_in_the_middle_of_what_was_guessed_ends_the_request_where_it_would_without_drafts() -> None:
    ends = []
    for speculation in (True, False):
        runner = ScriptedRunner([1, 2, 3, 4, 5])
        runner.poisoned_token = 4
        engine = make_engine(runner, speculation=speculation, **WIDE)
        driver = Driver(engine)
        driver.add(make_request("bad", [3, 4, 5, 1, 2, 9, 1], max_tokens=20), make_request("good", [9, 8, 7]))
        driver.run()
        assert driver.results["good"].error is None
        ends.append((driver.results["bad"].tokens, driver.results["bad"].error))
        again = generate(engine, make_request("again", [3, 4, 5, 1, 2, 9, 1, 2], max_tokens=1))["again"]
        assert again.usage is not None
        assert again.usage.cached_prompt_tokens == 0
    assert ends[0] == ends[1] == ([[2, 3, 4]], "NAN_LOGITS")


# -- any workload -----------------------------------------------------------------------------

_sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.0, 0.2, 0.8]),
    top_k=st.sampled_from([0, 3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.0, 1.3]),
    no_repeat_ngram_size=st.sampled_from([0, 0, 0, 2]),
    seed=st.integers(0, 1 << 40),
    num_outputs=st.integers(1, 2),
    stop_token_ids=st.sampled_from([(), (7, 8)]),
    stop_strings=st.sampled_from([(), ("1 2", "5 "), ("11 1",)]),
    logprobs=st.booleans(),
)
_prompts = st.lists(st.integers(0, 9), min_size=1, max_size=30).map(tuple)


@st.composite
def _workloads(draw: st.DrawFn) -> list[tuple[int, GenerationRequest]]:
    """Requests with the step before which they arrive; some are takeovers."""
    return [
        (
            draw(st.integers(0, 10)),
            GenerationRequest(
                f"r{i}",
                draw(_prompts),
                draw(_sampling),
                priority=draw(st.integers(0, 1)),
                deadline=draw(st.sampled_from([None, None, None, 14.0])),
            ),
        )
        for i in range(draw(st.integers(1, 6)))
    ]


def run_workload(
    runner: PaperRunner,
    workload: list[tuple[int, GenerationRequest]],
    aborts: dict[int, str],
    **limits: Any,
) -> Driver:
    driver = Driver(make_engine(runner, **limits))
    for step in range(20):
        driver.now = float(step)
        driver.add(*[request for arrival, request in workload if arrival == step])
        if aborts.get(step) in driver.results:
            driver.engine.abort(aborts[step])
        driver.step()
    driver.run(max_steps=2000)
    return driver


@settings(max_examples=80, deadline=None)
@given(
    workload=_workloads(),
    memory=st.sampled_from([1, 1, 2, None]),
    vocab_size=st.sampled_from([4, 12, 40]),
    num_blocks=st.integers(17, 40),
    token_budget=st.integers(8, 40),
    max_num_seqs=st.integers(1, 8),
    max_draft_tokens=st.integers(1, 9),
    aborts=st.dictionaries(st.integers(0, 15), st.sampled_from([f"r{i}" for i in range(6)]), max_size=2),
    fail_steps=st.sets(st.integers(2, 40), max_size=1),
    poisoned=st.sampled_from([None, None, 3]),
    runs_ahead=st.booleans(),
)
@example(  # the prompt's last token stands alone in a step, and two outputs begin with it
    workload=[(0, make_request("r0", [0] * 15 + [1, 0], num_outputs=2, max_tokens=2))],
    memory=1,
    vocab_size=4,
    num_blocks=17,
    token_budget=8,
    max_num_seqs=2,
    max_draft_tokens=1,
    aborts={},
    fail_steps=set(),
    poisoned=None,
    runs_ahead=False,
)
@example(  # a step with a draft is launched while the prompt's first part is in flight
    workload=[(0, make_request("r0", [0] * 20, max_tokens=2))],
    memory=1,
    vocab_size=4,
    num_blocks=17,
    token_budget=19,
    max_num_seqs=2,
    max_draft_tokens=1,
    aborts={},
    fail_steps=set(),
    poisoned=None,
    runs_ahead=True,
)
def test_any_workload_gives_each_request_what_it_gets_without_speculation(
    workload: list[tuple[int, GenerationRequest]],
    memory: int | None,
    vocab_size: int,
    num_blocks: int,
    token_budget: int,
    max_num_seqs: int,
    max_draft_tokens: int,
    aborts: dict[int, str],
    fail_steps: set[int],
    poisoned: int | None,
    runs_ahead: bool,
) -> None:
    def in_vocabulary(request: GenerationRequest) -> GenerationRequest:
        return replace(request, prompt_token_ids=tuple(i % vocab_size for i in request.prompt_token_ids))

    def make_runner(**fields: int) -> PaperRunner:
        runner = PaperRunner(max_model_len=64, vocab_size=vocab_size, memory=memory, **fields)
        runner.poisoned_token = poisoned
        return runner

    workload = [(arrival, in_vocabulary(request)) for arrival, request in workload]
    runner = make_runner(num_blocks=num_blocks)
    runner.fail_steps = fail_steps
    limits = {"token_budget": token_budget, "max_num_seqs": max_num_seqs, "max_draft_tokens": max_draft_tokens}
    limits["runs_ahead"] = runs_ahead
    results = run_workload(runner, workload, aborts, **limits).results
    for _, request in workload:
        plain = make_engine(make_runner(num_blocks=200), speculation=False)
        alone = generate(plain, replace(request, deadline=None))[request.request_id]
        collected = results[request.request_id]
        if {collected.error, alone.error} & {"NAN_LOGITS", "ALL_TOKENS_FORBIDDEN"}:  # the model's fault, or its own
            early = {FinishReason.CANCELLED, FinishReason.TIME_LIMIT}
            assert collected.error == alone.error or early & set(collected.reasons)
        elif collected.error is not None:
            assert collected.error == "OUT_OF_MEMORY"
        elif {FinishReason.CANCELLED, FinishReason.TIME_LIMIT} & set(collected.reasons):
            assert all(a == b[: len(a)] for a, b in zip(collected.tokens, alone.tokens, strict=True))
        else:
            assert outcome(collected) == outcome(alone)
            assert collected.usage is not None
            assert collected.usage.completion_tokens == sum(map(len, alone.tokens))


@settings(max_examples=40, deadline=None)
@given(
    prompt=_prompts,
    sampling=_sampling,
    memory=st.sampled_from([1, 2]),
    cuts=st.tuples(st.integers(0, 30), st.integers(0, 30)),
)
def test_a_takeover_in_the_middle_of_what_was_guessed_goes_on_alike(
    prompt: tuple[int, ...], sampling: SamplingParams, memory: int, cuts: tuple[int, int]
) -> None:
    request = GenerationRequest("r", prompt, sampling)
    whole = generate(make_engine(PaperRunner(memory=memory), **WIDE), request)["r"]
    # A cut at the end leaves the end to be found again.
    emitted = tuple(tuple(ids[:cut]) for ids, cut in zip(whole.tokens, cuts, strict=False))
    resumed = generate(make_engine(PaperRunner(memory=memory), **WIDE), replace(request, emitted=emitted))["r"]
    assert resumed.tokens == whole.tokens
    assert resumed.reasons == whole.reasons
    assert resumed.stop_matches == whole.stop_matches
    assert resumed.usage == whole.usage
    assert all(text.endswith(rest) for text, rest in zip(whole.texts, resumed.texts, strict=True))


# -- a real model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """Small weights: its greedy output soon repeats itself."""
    return tiny_model("llama", vocab_size=24)


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 0.8, "top_k": 4},
    {"temperature": 0.5, "top_p": 0.9, "num_outputs": 2},
    {"repetition_penalty": 1.2},
    {"no_repeat_ngram_size": 3, "temperature": 0.6},
    {"temperature": 0.4, "min_p": 0.1, "logprobs": True},
]


@pytest.mark.parametrize("num_blocks", [30, 200])
def test_a_model_gives_the_same_tokens_with_speculation_and_without(llama: PreTrainedModel, num_blocks: int) -> None:
    requests = [
        make_request(
            f"r{i}", [(k * k + i) % 7 + 3 for k in range(5 + 9 * i)], max_tokens=60, seed=i + 0x9876543210, **params
        )
        for i, params in enumerate(MIXED)
    ]
    results, steps = [], []
    for speculation in (True, False):
        engine = make_engine(llama, speculation=speculation, num_blocks=num_blocks, token_budget=64, max_num_seqs=24)
        results.append({name: collected.tokens for name, collected in generate(engine, *requests).items()})
        steps.append(engine.stats().num_steps)
    assert results[0] == results[1]
    assert steps[0] < steps[1]


# -- the tests above can fail -----------------------------------------------------------------


def _accept_all(drafts: Any, chosen: Any) -> int:
    return len(chosen)


def _accept_one_too_many(drafts: Any, chosen: Any) -> int:
    good = [d == c for d, c in zip(drafts, chosen, strict=False)]
    return min(len(chosen), (good.index(False) if False in good else len(good)) + 1)


@pytest.mark.parametrize("accept", [_accept_all, _accept_one_too_many])
def test_accepting_what_was_not_chosen_is_noticed(
    accept: Callable[[Any, Any], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.engine.loop.num_accepted", accept)
    request = make_request("r", [2, 3, 9, 9, 1], max_tokens=30)
    with pytest.raises(AssertionError):
        test_a_wrong_guess_costs_a_row_and_nothing_else()
    runner = ScriptedRunner([1, 2, 3, 4, 5])
    with pytest.raises(AssertionError, match="reads a slot that is not its own"):
        generate(make_engine(runner, **WIDE), request)


def test_counting_a_draft_as_computed_too_often_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    accept_drafts = Scheduler.accept_drafts
    monkeypatch.setattr(Scheduler, "accept_drafts", lambda self, s, num: accept_drafts(self, s, num + 1))
    with pytest.raises((AssertionError, IndexError)):
        generate(make_engine(ScriptedRunner([1, 2, 3]), **WIDE), make_request("r", [1, 2, 3, 1], max_tokens=20))


def test_sharing_a_block_that_holds_drafts_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    add_drafts = Scheduler._add_drafts

    def add_and_register(self: Scheduler, chunks: list[Chunk], num_decodes: int, speculator: Any) -> None:
        add_drafts(self, chunks, num_decodes, speculator)
        for chunk in chunks:
            tokens, hashes = chunk.sequence.token_ids + chunk.drafts, []
            self._pool.extend_hashes(hashes, tokens, len(tokens) // self._pool.block_size, b"")
            for block_id, block_hash in zip(chunk.sequence.block_ids, hashes, strict=False):
                self._pool.register(block_id, block_hash)

    # The output behind 2 is 3 4; the draft 3 9 9 9 fills a block, of which 9 9 9 is overwritten.
    requests = [make_request("a", [2, 3, 9, 9, 9, 9, 1], max_tokens=6)]
    requests.append(make_request("b", [*requests[0].prompt_token_ids, 2, 3, 9, 9, 9, 9]))

    def run() -> None:
        engine = make_engine(ScriptedRunner([1, 2, 3, 4, 5]), **WIDE)
        for request in requests:
            generate(engine, request)

    run()
    monkeypatch.setattr(Scheduler, "_add_drafts", add_and_register)
    with pytest.raises(AssertionError):
        run()


def test_a_pool_keeps_its_blocks_though_drafts_fill_it() -> None:
    runner = ScriptedRunner([1, 2], num_blocks=7, max_model_len=24)
    engine = make_engine(runner, **WIDE)
    assert isinstance(engine._pool, BlockPool)
    results = generate(engine, *[make_request(f"r{i}", [1, 2, 1], max_tokens=18) for i in range(3)])
    assert [collected.tokens for collected in results.values()] == [[[2, 1] * 9]] * 3
    assert engine.stats().num_preemptions > 0
