"""`make parity` on a small scale."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.builders_models import write_tiny_model
from tests.parity import beams, check, run
from tests.parity.cases import NUM_TOKENS, Case, alone
from worker.engine.beams import BeamSearch
from worker.engine.history import TokenHistory
from worker.engine.loop import Engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def llama(folder: Path) -> tuple[Engine, PreTrainedModel]:
    return run.load(folder)


def test_each_parameter_alone_and_combined_gives_the_tokens_of_generate(llama: tuple[Engine, PreTrainedModel]) -> None:
    greedy = run.compare_greedy(*llama, num_prompts=1, num_batches=2)
    assert greedy.wrong == []
    assert greedy.near_ties == []
    assert greedy.num_same > 16 * 2


def test_beams_find_the_sequences_of_generate(llama: tuple[Engine, PreTrainedModel]) -> None:
    searched = run.compare_beams(*llama, num_prompts=1, num_batches=1)
    assert searched.wrong == []
    assert searched.near_ties == []
    assert searched.num_same > 48 + 16


def test_strings_end_beams_as_in_generate(llama: tuple[Engine, PreTrainedModel], folder: Path) -> None:
    engine, model = llama
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    (prompt,) = run.random_prompts(model, [20])
    plain = Case("", tuple(prompt), run.SamplingParams(max_tokens=NUM_TOKENS, num_beams=4, num_outputs=4))
    ((outputs, _),) = beams.found(engine, [plain])
    texts = [tokenizer.decode(ids) for ids, _ in outputs]
    letters = [letter for text in texts for letter in text if letter.isascii() and letter.isprintable()]
    ended = 0
    for stop in (letters[0], letters[len(letters) // 2], letters[-1]):
        params = msgspec.structs.replace(plain.params, stop_strings=(stop,))
        ((found, _),) = beams.found(engine, [Case("", tuple(prompt), params)])
        wanted = beams.expected(model, plain, stop_strings=[stop], tokenizer=tokenizer)
        assert [ids for ids, _ in found] == [ids for ids, _ in wanted]
        assert [score for _, score in found] == pytest.approx([score for _, score in wanted], abs=1e-4)
        ended += sum(len(ids) < NUM_TOKENS for ids, _ in found)
    assert ended > 0


def test_a_search_without_length_penalty_is_noticed(
    llama: tuple[Engine, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BeamSearch, "_by_length", lambda self, score, num_tokens=None: score)
    engine, model = llama
    searched = beams.Beams()
    (prompt,) = run.random_prompts(model, [31])
    searched.compare(engine, model, beams.searches(prompt, model.config.vocab_size)[:8])
    assert len(searched.wrong) >= 4


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
