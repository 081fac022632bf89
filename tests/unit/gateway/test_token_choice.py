"""Fields that change scores, filter tokens or keep an output from ending: ranges, conflicts, and what is in force."""

from __future__ import annotations

import math
from typing import Any

import pytest

from common.errors import InvalidRequest
from common.generation import GrammarKind, SamplingParams, StructuredOutput
from common.registry import GenerationDefaults
from gateway import token_choice
from gateway import validation as check
from torchrelay.v1 import generation_pb2 as pb

LIMITS = check.ConfigLimits(context_length=100, vocab_size=50, max_outputs=4, max_stop_strings=3)
OFF = pb.GenerationConfig(num_outputs=1)
NOT_NUMBERS = [math.nan, math.inf, -math.inf]


def ids(*sequences: list[int]) -> list[pb.TokenIds]:
    return [pb.TokenIds(ids=sequence) for sequence in sequences]


def biases(*pairs: tuple[list[int], float]) -> list[pb.SequenceBias]:
    return [pb.SequenceBias(token_ids=sequence, bias=bias) for sequence, bias in pairs]


def decay(start: int, factor: float) -> pb.ExponentialDecay:
    return pb.ExponentialDecay(start=start, factor=factor)


def resolve(config: pb.GenerationConfig, defaults: pb.GenerationConfig = OFF, *, prompt: int = 0, **limits: Any) -> Any:
    """Without `prompt` it has ten tokens; where a first one is forced, the only number behind which it can be."""
    prompt = prompt or (1 if "forced_bos_token_id" in f"{config}{defaults}" else 10)
    known = check.ConfigLimits(100, 50, max_outputs=4, max_stop_strings=3, **limits)
    return check.resolve_config(config, defaults, prompt, known, seed=7)


def refusal(config: pb.GenerationConfig, **options: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        resolve(config, **options)
    return raised.value


BAD: list[tuple[str, list[Any]]] = [
    ("typical_p", [*NOT_NUMBERS, 0.0, -0.1, 1.0001]),
    ("epsilon_cutoff", [*NOT_NUMBERS, -0.1, 1.0]),
    ("eta_cutoff", [*NOT_NUMBERS, -0.1, 1.0]),
    ("top_h", [*NOT_NUMBERS, -0.1, 1.0001]),
    ("presence_penalty", [*NOT_NUMBERS, -2.01, 2.01]),
    ("frequency_penalty", [*NOT_NUMBERS, -2.01, 2.01]),
    ("bad_words", [[""], ["x" * 257], ["é" * 129], ["a"] * 129]),
    ("bad_words_ids", [ids([]), ids([50]), ids([1] * 65), ids([1]) * 257]),
    ("logit_bias", [{50: 1.0}, {1: 100.1}, {1: -100.1}, *({1: value} for value in NOT_NUMBERS)]),
    ("logit_bias", [dict.fromkeys(range(1025), 0)]),
    ("sequence_bias", [biases(([], 1)), biases(([50], 1)), biases(([1], 101)), biases(([1], math.nan))]),
    ("sequence_bias", [biases(([1], 1)) * 257]),
    ("suppress_tokens", [[50], [1] * 1025]),
    ("begin_suppress_tokens", [[50], [1] * 1025]),
    ("forced_eos_token_id", [50, 2**32 - 1]),
    ("forced_bos_token_id", [50, 2**32 - 1]),
    ("encoder_repetition_penalty", [*NOT_NUMBERS, 0.0, -1.0, 10.1]),
    ("encoder_no_repeat_ngram_size", [65, 2**32 - 1]),
]  # fmt: skip
GOOD: list[tuple[str, list[Any]]] = [
    ("ignore_eos", [False, True]),
    ("typical_p", [1e-9, 1.0]),
    ("epsilon_cutoff", [0.0, 0.999]),
    ("eta_cutoff", [0.0, 0.999]),
    ("top_h", [0.0, 1e-9, 1.0]),
    ("presence_penalty", [-2.0, 0.0, 2.0]),
    ("frequency_penalty", [-2.0, 0.0, 2.0]),
    ("bad_words", [["x" * 256], ["a"] * 128]),
    ("bad_words_ids", [ids([49]), ids([1] * 64), ids([1]) * 256]),
    ("logit_bias", [{0: 100.0}, {49: -100.0}]),
    ("sequence_bias", [biases(([49], 100)), biases(([1] * 64, -100))]),
    ("suppress_tokens", [[49], [1] * 1024]),
    ("begin_suppress_tokens", [[49], [1] * 1024]),
    ("exponential_decay_length_penalty", [decay(0, 1e-3), decay(2**32 - 1, 10.0)]),
    ("forced_eos_token_id", [0, 49]),
    ("forced_bos_token_id", [0, 49]),
    ("encoder_repetition_penalty", [1e-3, 10.0]),
    ("encoder_no_repeat_ngram_size", [0, 64]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD for value in values])
def test_a_value_out_of_range_is_refused_by_its_field(name: str, value: Any) -> None:
    error = refusal(pb.GenerationConfig(**{name: value}))
    assert {violation.field for violation in error.violations} == {f"config.{name}"}
    assert error.violations[0].reason == "FIELD_OUT_OF_RANGE"


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD for value in values])
def test_a_value_at_its_limit_is_in_force_as_it_was_given(name: str, value: Any) -> None:
    assert getattr(resolve(pb.GenerationConfig(**{name: value})), name) == value


@pytest.mark.parametrize("factor", [*NOT_NUMBERS, 0.0, -1.0, 10.1])
def test_a_factor_out_of_range_is_refused_by_its_path(factor: float) -> None:
    error = refusal(pb.GenerationConfig(exponential_decay_length_penalty=decay(1, factor)))
    assert error.violations[0].field == "config.exponential_decay_length_penalty.factor"


def test_all_bad_fields_are_reported_at_once() -> None:
    error = refusal(pb.GenerationConfig(top_p=2.0, **{name: values[0] for name, values in BAD}))
    assert {violation.field for violation in error.violations} == {
        "config.top_p",
        *(f"config.{name}" for name, _ in BAD),
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"sequence_bias": biases(([], 101.0)) * 257},
        {"bad_words_ids": ids([]) * 257},
        {"logit_bias": dict.fromkeys(range(1025), 101.0)},
    ],
)
def test_what_is_too_long_is_not_looked_into(fields: dict[str, Any]) -> None:
    """Of what is wrong with them, only that is said."""
    (violation,) = refusal(pb.GenerationConfig(**fields)).violations
    assert "at most" in violation.description
    assert "taken" in violation.description


def test_a_sequence_is_biased_once() -> None:
    error = refusal(pb.GenerationConfig(sequence_bias=biases(([1, 2], 1), ([1, 2], 3))))
    assert (error.reason, error.violations[0].field) == ("FIELD_CONFLICT", "config.sequence_bias")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 0),
        ({"min_tokens": 4}, 4),
        ({"min_length": 10}, 0),  # the prompt has as many
        ({"min_length": 15}, 5),
        ({"min_length": 15, "min_tokens": 3}, 5),
        ({"min_length": 15, "min_tokens": 7}, 7),
        ({"min_length": 18, "min_tokens": 8}, 8),  # of max_tokens 8
    ],
)
def test_lengths_become_a_least_number_of_tokens(fields: dict[str, int], expected: int) -> None:
    resolved = resolve(pb.GenerationConfig(max_tokens=8, **fields))
    assert resolved.min_tokens == expected
    assert resolved.HasField("min_tokens") == (expected > 0)
    assert not resolved.HasField("min_length")
    assert check.sampling_params(resolved, [2]).min_tokens == expected


@pytest.mark.parametrize(
    ("fields", "limit"), [({"min_tokens": 9}, 8), ({"min_length": 19}, 18), ({"min_length": 2**32 - 1}, 18)]
)
def test_an_output_cannot_be_longer_than_it_may(fields: dict[str, int], limit: int) -> None:
    error = refusal(pb.GenerationConfig(max_tokens=8, **fields))
    (name,) = fields
    assert error.reason == "FIELD_OUT_OF_RANGE"
    assert error.metadata == {"field": f"config.{name}", "limit": str(limit), "got": str(fields[name])}


def test_what_only_the_model_asks_for_gives_way_to_a_shorter_output() -> None:
    defaults = pb.GenerationConfig(min_tokens=20, min_length=90)
    assert resolve(pb.GenerationConfig(max_tokens=5), defaults).min_tokens == 5
    assert resolve(pb.GenerationConfig(max_tokens=50), defaults).min_tokens == 50
    assert resolve(pb.GenerationConfig(max_tokens=85), defaults).min_tokens == 80
    assert resolve(pb.GenerationConfig(max_tokens=85, min_length=30), defaults).min_tokens == 20


@pytest.mark.parametrize("options", [{"has_eos": False}, {}], ids=["a model without an end", "ignore_eos"])
def test_a_penalty_for_ends_needs_one(options: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"exponential_decay_length_penalty": decay(1, 1.5), "ignore_eos": not options}
    error = refusal(pb.GenerationConfig(**asked), **options)
    assert (error.reason, error.violations[0].field) == ("FIELD_CONFLICT", "config.exponential_decay_length_penalty")
    assert resolve(pb.GenerationConfig(**asked, stop_token_ids=[4]), **options).HasField(
        "exponential_decay_length_penalty"
    )
    # Where only the model asks for it, there is nothing to tell the caller.
    defaults = pb.GenerationConfig(exponential_decay_length_penalty=decay(1, 1.5))
    quiet = resolve(pb.GenerationConfig(ignore_eos=not options), defaults, **options)
    assert not quiet.HasField("exponential_decay_length_penalty")


FORCED: list[tuple[str, str]] = [  # a token's place, and a list that would keep it from there
    ("forced_eos_token_id", "suppress_tokens"),
    ("forced_bos_token_id", "suppress_tokens"),
    ("forced_bos_token_id", "begin_suppress_tokens"),
]


@pytest.mark.parametrize(("forced", "suppressed"), FORCED)
def test_a_forced_token_must_not_be_suppressed(forced: Any, suppressed: str) -> None:
    error = refusal(pb.GenerationConfig(**{forced: 3, suppressed: [2, 3]}))
    assert (error.reason, error.violations[0].field) == ("FIELD_CONFLICT", f"config.{forced}")
    assert suppressed in error.message


@pytest.mark.parametrize(("forced", "suppressed"), FORCED)
def test_what_the_model_forces_or_suppresses_gives_way_to_the_caller_s(forced: Any, suppressed: str) -> None:
    found = resolve(pb.GenerationConfig(**{forced: 3}), pb.GenerationConfig(**{suppressed: [2, 3]}))
    assert (getattr(found, forced), getattr(found, suppressed)) == (3, [2])
    forcing = pb.GenerationConfig(**{forced: 3})
    found = resolve(pb.GenerationConfig(**{suppressed: [2, 3]}), forcing)
    assert not found.HasField(forced)
    assert getattr(found, suppressed) == [2, 3]
    kept = resolve(pb.GenerationConfig(**{suppressed: [2]}), forcing)
    assert (getattr(kept, forced), getattr(kept, suppressed)) == (3, [2])


def test_a_first_token_is_forced_behind_one_token_alone() -> None:
    error = refusal(pb.GenerationConfig(forced_bos_token_id=3), prompt=2)
    assert (error.reason, error.violations[0].field) == ("FIELD_CONFLICT", "config.forced_bos_token_id")
    assert "this one has 2" in error.message
    assert not resolve(pb.GenerationConfig(), pb.GenerationConfig(forced_bos_token_id=3), prompt=2).HasField(
        "forced_bos_token_id"
    )


def test_the_last_token_may_be_one_that_is_not_the_first() -> None:
    config = pb.GenerationConfig(forced_eos_token_id=3, begin_suppress_tokens=[3])
    assert resolve(config).forced_eos_token_id == 3


@pytest.mark.parametrize("fields", [{"typical_p": 0.5}, {"epsilon_cutoff": 0.1}, {"eta_cutoff": 0.1}, {"top_h": 0.5}])
def test_asking_for_a_filter_is_asking_to_sample(fields: dict[str, float]) -> None:
    assert resolve(pb.GenerationConfig(**fields)).temperature == 1.0
    assert resolve(pb.GenerationConfig(temperature=0, **fields)).temperature == 0.0


def test_a_request_s_lists_replace_the_model_s() -> None:
    defaults = pb.GenerationConfig(
        bad_words_ids=ids([1]), sequence_bias=biases(([1], 1)), suppress_tokens=[1], begin_suppress_tokens=[1],
        exponential_decay_length_penalty=decay(9, 2.0), logit_bias={1: 1.0},
    )  # fmt: skip
    assert resolve(pb.GenerationConfig(max_tokens=4), defaults).suppress_tokens == [1]
    own: dict[str, Any] = {
        "bad_words_ids": ids([2]),
        "sequence_bias": biases(([2], 2)),
        "suppress_tokens": [2],
        "begin_suppress_tokens": [2],
        "exponential_decay_length_penalty": decay(0, 3.0),
        "logit_bias": {2: 2.0},
    }
    resolved = resolve(pb.GenerationConfig(**own), defaults)
    assert {name: getattr(resolved, name) for name in own} == own


def test_the_engine_gets_every_parameter() -> None:
    config = pb.GenerationConfig(
        max_tokens=9, min_tokens=2, typical_p=0.9, epsilon_cutoff=0.1, eta_cutoff=0.2, top_h=0.3, presence_penalty=0.4,
        frequency_penalty=0.5, bad_words=["no"], bad_words_ids=ids([1, 2], [3]), logit_bias={4: 1.5, 5: -2.0},
        sequence_bias=biases(([4], 1.0), ([6, 7], 3.0)), suppress_tokens=[8], begin_suppress_tokens=[9],
        exponential_decay_length_penalty=decay(3, 1.5), forced_eos_token_id=10, encoder_repetition_penalty=1.6,
        encoder_no_repeat_ngram_size=3, stop_token_ids=[11], forced_bos_token_id=12,
    )  # fmt: skip
    params = check.sampling_params(resolve(config), [2], [[20], [3]])
    assert params == SamplingParams(
        max_tokens=9, temperature=1.0, min_tokens=2, typical_p=0.9, epsilon_cutoff=0.1, eta_cutoff=0.2, top_h=0.3,
        presence_penalty=0.4, frequency_penalty=0.5, bad_words_ids=((1, 2), (3,), (20,)),
        sequence_bias=(((4,), 2.5), ((6, 7), 3.0), ((5,), -2.0)), suppress_tokens=(8,), begin_suppress_tokens=(9,),
        exponential_decay_length_penalty=(3, 1.5), forced_eos_token_id=10, encoder_repetition_penalty=1.6,
        encoder_no_repeat_ngram_size=3, stop_token_ids=(2, 11), seed=7, forced_bos_token_id=12,
    )  # fmt: skip


def test_ignored_ends_do_not_end() -> None:
    config = resolve(pb.GenerationConfig(ignore_eos=True, stop_token_ids=[4]))
    assert check.sampling_params(config, [2, 3]).stop_token_ids == (4,)


def test_a_model_s_defaults_are_shown_where_they_change_anything() -> None:
    assert token_choice.default_config(GenerationDefaults(temperature=0.5)) == pb.GenerationConfig()
    defaults = GenerationDefaults(
        min_length=5, typical_p=0.9, bad_words_ids=((1, 2),), sequence_bias=(((3,), 1.0),), suppress_tokens=(4,),
        begin_suppress_tokens=(5,), exponential_decay_length_penalty=(6, 1.5), forced_eos_token_id=0, top_h=0.5,
        forced_bos_token_id=0,
    )  # fmt: skip
    assert token_choice.default_config(defaults) == pb.GenerationConfig(
        min_length=5, typical_p=0.9, bad_words_ids=ids([1, 2]), sequence_bias=biases(([3], 1.0)), suppress_tokens=[4],
        begin_suppress_tokens=[5], exponential_decay_length_penalty=decay(6, 1.5), forced_eos_token_id=0, top_h=0.5,
        forced_bos_token_id=0,
    )  # fmt: skip


@pytest.mark.parametrize("forced", ["forced_eos_token_id", "forced_bos_token_id"])
def test_no_token_is_forced_where_an_output_must_match(forced: Any) -> None:
    constraint = StructuredOutput(GrammarKind.REGEX, "a+")
    asked = pb.GenerationConfig(**{forced: 3})
    with_format = pb.GenerationConfig(**{forced: 3}, structured_output=pb.StructuredOutput(regex="a+"))
    for config, other in ((with_format, "config.structured_output"), (asked, "input.chat.tools")):
        with pytest.raises(InvalidRequest) as raised:
            token_choice.settle_constraint(resolve(config), config, constraint)
        assert raised.value.reason == "FIELD_CONFLICT"
        assert [one.field for one in raised.value.violations] == [f"config.{forced}", other]
    # What only the model asks for gives way, and what is in force says so.
    forcing = pb.GenerationConfig(**{forced: 3})
    for config in (pb.GenerationConfig(), pb.GenerationConfig(structured_output=pb.StructuredOutput(regex="a+"))):
        resolved = resolve(config, forcing)
        token_choice.settle_constraint(resolved, config, constraint)
        assert not resolved.HasField(forced)
    unconstrained = resolve(asked)
    token_choice.settle_constraint(unconstrained, asked, None)
    assert getattr(unconstrained, forced) == 3
