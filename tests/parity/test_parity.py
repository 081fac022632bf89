"""`make parity` on a small scale."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.builders_models import write_tiny_model
from tests.parity import check, run
from tests.parity.cases import NUM_TOKENS, alone
from worker.engine.history import TokenHistory
from worker.engine.loop import Engine


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, PreTrainedModel]:
    return run.load(write_tiny_model(tmp_path_factory.mktemp("llama"), "llama"))


def test_each_parameter_alone_and_combined_gives_the_tokens_of_generate(llama: tuple[Engine, PreTrainedModel]) -> None:
    greedy = run.compare_greedy(*llama, num_prompts=1, num_batches=2)
    assert greedy.wrong == []
    assert greedy.near_ties == []
    assert greedy.num_same > 16 * 2


def test_each_parameter_alone_changes_something(llama: tuple[Engine, PreTrainedModel]) -> None:
    engine, model = llama
    (prompt,) = run.random_prompts(model, [60])
    plain = check.reference_tokens(model, prompt, run.SamplingParams(max_tokens=NUM_TOKENS))
    nothing, *cases = alone(prompt, plain)
    outputs = [tokens for tokens, _ in check.run_together(engine, [nothing, *cases])]
    assert outputs[0] == plain
    unchanged = [case.name for case, tokens in zip(cases, outputs[1:], strict=True) if tokens == plain]
    assert unchanged == []


def test_single_draws_have_the_distribution_after_transformers_processors(
    llama: tuple[Engine, PreTrainedModel],
) -> None:
    p_values = run.compare_sampled(*llama, num_draws=400)
    assert min(p_values.values()) > 0.01 / len(p_values)  # fixed seeds


def test_the_examples_of_gpt2_give_what_generate_gives(tmp_path: Path) -> None:
    engine, model = run.load(run.write_gpt2(tmp_path / "gpt2", num_layers=2))
    assert {
        text: run.compare_example(engine, model, options) for text, options in run.EXAMPLES.items()
    } == dict.fromkeys(run.EXAMPLES, True)


def test_a_forgotten_processor_is_noticed(
    llama: tuple[Engine, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TokenHistory, "banned_ids", lambda self: [])
    engine, model = llama
    greedy = run.compare_greedy(engine, model, num_prompts=1, num_batches=1)
    names = {text.partition(",")[0] for text in greedy.wrong}
    assert {"no_repeat_ngram_size", "no_repeat_ngram_size of 2"} <= names
