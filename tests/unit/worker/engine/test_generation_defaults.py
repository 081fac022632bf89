"""What is taken of generation_config.json, and what is left out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from common.generation import EarlyStopping
from common.registry import GenerationDefaults
from worker.engine.generation_defaults import read_defaults

GREEDY = {"temperature": 0.0}


def test_what_transformers_has_is_taken() -> None:
    generation = {
        "min_new_tokens": 3, "min_length": 7, "typical_p": 0.9, "epsilon_cutoff": 3e-4, "eta_cutoff": 2e-3,
        "top_h": 0.4, "encoder_repetition_penalty": 1.2, "encoder_no_repeat_ngram_size": 3,
        "bad_words_ids": [[5], [6, 7]],
        "sequence_bias": [[[8], 1.5], [[8, 9], -2]], "suppress_tokens": [1, 2], "begin_suppress_tokens": [3],
        "exponential_decay_length_penalty": [4, 1.1], "forced_eos_token_id": 9, "forced_bos_token_id": 8,
    }  # fmt: skip
    found = read_defaults(generation, 50)
    assert found == GREEDY | {
        "min_tokens": 3, "min_length": 7, "typical_p": 0.9, "epsilon_cutoff": 3e-4, "eta_cutoff": 2e-3, "top_h": 0.4,
        "encoder_repetition_penalty": 1.2, "encoder_no_repeat_ngram_size": 3, "bad_words_ids": ((5,), (6, 7)),
        "sequence_bias": (((8,), 1.5), ((8, 9), -2.0)), "suppress_tokens": (1, 2), "begin_suppress_tokens": (3,),
        "exponential_decay_length_penalty": (4, 1.1), "forced_eos_token_id": 9, "forced_bos_token_id": 8,
    }  # fmt: skip
    assert msgspec.convert(found, GenerationDefaults).sequence_bias == (((8,), 1.5), ((8, 9), -2.0))


def test_a_length_counts_what_a_decoder_begins_with_and_not_a_prompt() -> None:
    assert read_defaults({"max_length": 20}, 50) == GREEDY
    assert read_defaults({"max_length": 20}, 50, num_started=1) == GREEDY | {"max_tokens": 19}
    assert read_defaults({"max_length": 20, "max_new_tokens": 5}, 50, num_started=1) == GREEDY | {"max_tokens": 5}
    assert read_defaults({"max_length": 1}, 50, num_started=1) == GREEDY


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("typical_p", 0), ("top_h", 2), ("epsilon_cutoff", 1), ("min_length", -1), ("min_length", True),
        ("bad_words_ids", [[]]), ("bad_words_ids", [[50]]), ("bad_words_ids", [5]), ("bad_words_ids", [[1]] * 257),
        ("sequence_bias", {"5": 1.0}), ("sequence_bias", [[[5], 101]]), ("sequence_bias", [[[5], "x"]]),
        ("suppress_tokens", [-1]), ("suppress_tokens", [1.0]), ("suppress_tokens", "12"), ("begin_suppress_tokens", []),
        ("exponential_decay_length_penalty", [1]), ("exponential_decay_length_penalty", [1, float("nan")]),
        ("num_beams", 0), ("num_beams", 17), ("length_penalty", 6), ("early_stopping", "true"),
        ("exponential_decay_length_penalty", [-1, 1.5]), ("forced_eos_token_id", 50), ("forced_eos_token_id", [1, 2]),
        ("forced_bos_token_id", 50),
        ("forced_bos_token_id", -1),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_left_out(name: str, value: Any) -> None:
    assert read_defaults({name: value}, 50) == GREEDY


def test_a_forced_token_that_is_suppressed_is_left_out() -> None:
    found = read_defaults({"forced_eos_token_id": [2], "forced_bos_token_id": 3, "suppress_tokens": [2, 3]}, 50)
    assert found == GREEDY | {"suppress_tokens": (2, 3)}
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        found = read_defaults({"forced_bos_token_id": 2, name: [2, 3]}, 50)
        assert found == GREEDY | {name: (2, 3)}
    last = {"forced_eos_token_id": 2, "begin_suppress_tokens": [2]}
    assert read_defaults(last, 50)["forced_eos_token_id"] == 2


def test_what_is_said_of_beams_is_taken_unless_they_are_to_be_sampled() -> None:
    generation = {"num_beams": 4, "length_penalty": 2, "early_stopping": True}
    taken = {"length_penalty": 2.0, "early_stopping": EarlyStopping.WHEN_FULL}
    assert read_defaults(generation, 50) == GREEDY | taken | {"num_beams": 4}
    assert read_defaults({**generation, "do_sample": True}, 50) == {"temperature": 1.0} | taken
    assert read_defaults({"early_stopping": "never"}, 50) == GREEDY | {"early_stopping": EarlyStopping.NEVER}
    assert read_defaults({"num_beams": 1, "early_stopping": False}, 50) == GREEDY | {
        "num_beams": 1,
        "early_stopping": EarlyStopping.HEURISTIC,
    }
