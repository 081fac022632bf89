from __future__ import annotations

import pytest
from pydantic import ValidationError

from worker.engine.settings import EngineSettings


def test_a_budget_below_the_number_of_sequences_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"token_budget \(8\) must be at least max_num_seqs \(16\)"):
        EngineSettings(token_budget=8, max_num_seqs=16)


def test_a_bound_for_the_tuned_budget_below_the_number_of_sequences_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"max_step_tokens \(8\) must be at least max_num_seqs \(16\)"):
        EngineSettings(max_step_tokens=8, max_num_seqs=16)


def test_ngrams_of_no_length_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"max_draft_ngram \(2\) must be at least min_draft_ngram \(3\)"):
        EngineSettings(min_draft_ngram=3, max_draft_ngram=2)


def test_a_given_budget_is_the_largest_step() -> None:
    assert EngineSettings(token_budget=4096, max_step_tokens=2048).most_step_tokens == 4096
    assert EngineSettings(max_step_tokens=2048).most_step_tokens == 2048


@pytest.mark.parametrize(
    "name",
    ["token_budget", "itl_target_ms", "max_step_tokens", "max_num_seqs", "block_size", "kv_cache_bytes", "num_blocks"],
)
def test_zero_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        EngineSettings(**{name: 0})


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHRELAY_ENGINE_NUM_BLOCKS", "77")
    monkeypatch.setenv("TORCHRELAY_ENGINE_ENABLE_PREFIX_CACHE", "false")
    settings = EngineSettings()
    assert (settings.num_blocks, settings.enable_prefix_cache) == (77, False)
