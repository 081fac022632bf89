"""What is asked of both: every parameter alone, with an effect on this very output, and random combinations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from common.generation import SamplingParams

NUM_TOKENS = 14


@dataclass(frozen=True)
class Case:
    """One request."""

    name: str
    prompt: tuple[int, ...]
    params: SamplingParams


def alone(prompt: Sequence[int], plain: Sequence[int]) -> list[Case]:
    """Each parameter that changes greedy output, by itself; `plain` is the output without any, of NUM_TOKENS tokens.

    Those that are of no use without an end come with one.
    """
    first, second, third, fourth, fifth, *_ = plain
    ends = {"stop_token_ids": (third, 5)}
    options: dict[str, dict[str, Any]] = {
        "nothing": {},
        "stop_token_ids": ends,
        "max_tokens": {"max_tokens": 3},
        "min_tokens": {**ends, "min_tokens": 6},
        "repetition_penalty": {"repetition_penalty": 1.4},
        "repetition_penalty below 1": {"repetition_penalty": 0.7},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1, "sequence_bias": (((first,), 12.0),)},
        "no_repeat_ngram_size of 2": {"no_repeat_ngram_size": 2, "sequence_bias": (((first,), 12.0),)},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.7},
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
        "bad_words_ids": {**ends, "bad_words_ids": ((second,), (first, fourth), (fourth, fifth, first), (third,))},
        "logit_bias": {"sequence_bias": tuple({(second,): -4.0, (fourth,): 1.5}.items())},  # each token once
        "sequence_bias": {"sequence_bias": (((first, second), -6.5), ((prompt[-1], first, fifth), 9.0))},
        "suppress_tokens": {"suppress_tokens": (first, fourth)},
        "begin_suppress_tokens": {"begin_suppress_tokens": (first, second)},
        "exponential_decay_length_penalty": {**ends, "exponential_decay_length_penalty": (4, 1.6), "min_tokens": 4},
        "forced_eos_token_id": {"forced_eos_token_id": 7},
        "presence_penalty": {"presence_penalty": 1.5},
        "frequency_penalty": {"frequency_penalty": -1.5},
    }
    return [
        Case(name, tuple(prompt), SamplingParams(**{"max_tokens": NUM_TOKENS, **fields}))
        for name, fields in options.items()
    ]


def combinations(vocab_size: int, num_requests: int = 16, longest: int = 40) -> st.SearchStrategy[list[Case]]:
    """Batches of greedy requests, each with any of the parameters."""
    ids = st.integers(3, vocab_size - 1)
    some = st.lists(ids, min_size=1, max_size=5, unique=True).map(tuple)
    phrases = st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), min_size=1, max_size=5, unique=True)
    optional: dict[str, st.SearchStrategy[Any]] = {
        "stop_token_ids": some,
        "min_tokens": st.integers(1, NUM_TOKENS),
        "repetition_penalty": st.floats(0.5, 2.0),
        "no_repeat_ngram_size": st.integers(1, 4),
        "encoder_repetition_penalty": st.floats(0.5, 2.0),
        "encoder_no_repeat_ngram_size": st.integers(1, 4),
        "bad_words_ids": phrases.map(tuple),
        "sequence_bias": phrases.flatmap(
            lambda found: st.tuples(*(st.tuples(st.just(one), st.floats(-10, 10)) for one in found))
        ),
        "suppress_tokens": some,
        "begin_suppress_tokens": some,
        "exponential_decay_length_penalty": st.tuples(st.integers(0, 8), st.floats(0.7, 2.0)),
        "forced_eos_token_id": ids,
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
    }
    prompts = st.lists(ids, min_size=1, max_size=longest).map(tuple)
    requests = st.tuples(prompts, st.fixed_dictionaries({}, optional=optional)).map(_case)
    return st.lists(requests, min_size=num_requests, max_size=num_requests)


def _case(drawn: tuple[tuple[int, ...], dict[str, Any]]) -> Case:
    prompt, fields = drawn
    if "stop_token_ids" not in fields:
        fields.pop("exponential_decay_length_penalty", None)
    if fields.get("forced_eos_token_id") in fields.get("suppress_tokens", ()):
        del fields["forced_eos_token_id"]
    return Case(" + ".join(fields), prompt, SamplingParams(**{"max_tokens": NUM_TOKENS, **fields}))


SAMPLED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.4},
    "top_k": {"top_k": 12},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.7},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01},
    "eta_cutoff": {"eta_cutoff": 0.02},
    "top_h": {"top_h": 0.6},
    "all filters": {
        "temperature": 1.5, "top_h": 0.95, "top_k": 60, "top_p": 0.97, "min_p": 0.01, "typical_p": 0.95,
        "epsilon_cutoff": 0.001, "eta_cutoff": 0.002,
    },
    "edits and filters": {
        "temperature": 0.9, "typical_p": 0.9, "eta_cutoff": 0.001, "repetition_penalty": 1.2,
        "encoder_repetition_penalty": 1.3, "sequence_bias": (((9,), 2.0), ((11,), -3.0)), "suppress_tokens": (4, 8),
    },
}  # fmt: skip
