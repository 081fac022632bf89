"""What a request for beams may hold, what goes with it, and what becomes of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from common.errors import InvalidRequest
from common.generation import EarlyStopping, GrammarKind, SamplingParams, StructuredOutput, peak_kv_tokens
from common.grants import Caps
from common.registry import GenerationDefaults
from gateway import beams
from gateway import validation as check
from torchrelay.v1 import generation_pb2 as pb

LIMITS = check.ConfigLimits(context_length=100, vocab_size=50, max_outputs=16, max_stop_strings=3)
DEFAULTS = pb.GenerationConfig(temperature=0.7, top_k=50, top_p=0.9, num_outputs=1)


def resolve(limits: check.ConfigLimits = LIMITS, **fields: Any) -> pb.GenerationConfig:
    return check.resolve_config(pb.GenerationConfig(**fields), DEFAULTS, 10, limits, seed=7)


def violations(limits: check.ConfigLimits = LIMITS, **fields: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as raised:
        resolve(limits, **fields)
    return {found.field.removeprefix("config."): found.reason for found in raised.value.violations}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_beams", [0, 17, 2**32 - 1]),
        ("length_penalty", [math.nan, math.inf, -math.inf, 5.1, -5.1]),
    ],
)
def test_values_out_of_range_are_refused(name: str, values: list[Any]) -> None:
    for value in values:
        assert violations(**{"num_beams": 2, name: value})[name] == "FIELD_OUT_OF_RANGE"


def test_values_at_their_limits_are_taken() -> None:
    assert resolve(num_beams=1).num_beams == 1
    assert resolve(num_beams=16, num_outputs=16, length_penalty=-5.0).num_beams == 16
    assert resolve(num_beams=2, length_penalty=5.0).length_penalty == 5.0


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"typical_p": 0.5},
        {"epsilon_cutoff": 0.1},
        {"eta_cutoff": 0.1},
        {"top_h": 0.5},
        {"best_of": 2},
        {"logprobs": True},
        {"structured_output": pb.StructuredOutput(regex="a")},
    ],
)
def test_what_does_not_go_with_beams_is_refused_by_its_field(fields: dict[str, Any]) -> None:
    (name,) = fields
    assert violations(num_beams=2, **fields) == {name: "FIELD_CONFLICT"}
    resolve(num_beams=1, **fields)


def test_alternatives_of_tokens_are_refused_with_their_logprobs() -> None:
    conflicts = {"logprobs": "FIELD_CONFLICT", "top_logprobs": "FIELD_CONFLICT"}
    assert violations(num_beams=2, logprobs=True, top_logprobs=1) == conflicts


def test_filters_that_are_off_change_nothing() -> None:
    resolved = resolve(
        num_beams=3, temperature=0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, epsilon_cutoff=0.0, eta_cutoff=0.0
    )
    assert resolved.temperature == 0


@pytest.mark.parametrize(
    "fields", [{"length_penalty": 1.0}, {"early_stopping": pb.EARLY_STOPPING_NEVER}, {"renormalize_logits": True}]
)
def test_what_only_beams_have_is_refused_without_them(fields: dict[str, Any]) -> None:
    (name,) = fields
    assert violations(**fields) == violations(num_beams=1, **fields) == {name: "FIELD_CONFLICT"}


def test_an_unknown_way_to_stop_is_refused() -> None:
    assert violations(num_beams=2, early_stopping=9) == {"early_stopping": "UNSUPPORTED"}


def test_no_more_outputs_than_beams_and_none_without_tokens() -> None:
    assert violations(num_beams=2, num_outputs=3) == {"num_outputs": "FIELD_CONFLICT"}
    assert violations(num_beams=2, max_tokens=0, echo=True) == {"num_beams": "FIELD_CONFLICT"}


def test_beams_are_bounded_as_outputs_are_and_by_what_a_worker_decodes_together() -> None:
    assert violations(LIMITS.within(Caps(max_outputs=3)), num_beams=4) == {"num_beams": "FIELD_OUT_OF_RANGE"}
    assert violations(structs.replace(LIMITS, max_sequences=5), num_beams=6) == {"num_beams": "FIELD_OUT_OF_RANGE"}
    assert resolve(structs.replace(LIMITS, max_sequences=5), num_beams=5).num_beams == 5


def test_beams_are_not_sampled_whatever_the_model_s_default() -> None:
    assert resolve().temperature == 0.7
    resolved = resolve(num_beams=4)
    assert resolved.temperature == 0
    assert (resolved.length_penalty, resolved.early_stopping) == (1.0, pb.EARLY_STOPPING_HEURISTIC)
    plain = resolve()
    assert not plain.HasField("length_penalty")
    assert not plain.early_stopping


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (pb.EARLY_STOPPING_UNSPECIFIED, EarlyStopping.HEURISTIC),
        (pb.EARLY_STOPPING_HEURISTIC, EarlyStopping.HEURISTIC),
        (pb.EARLY_STOPPING_WHEN_FULL, EarlyStopping.WHEN_FULL),
        (pb.EARLY_STOPPING_NEVER, EarlyStopping.NEVER),
    ],
)
def test_the_search_reaches_the_engine(value: pb.EarlyStopping.ValueType, expected: EarlyStopping) -> None:
    resolved = resolve(num_beams=4, num_outputs=2, length_penalty=-0.5, early_stopping=value, renormalize_logits=True)
    params = check.sampling_params(resolved, [])
    assert (params.num_beams, params.num_outputs, params.length_penalty) == (4, 2, -0.5)
    assert (params.early_stopping, params.renormalize_logits, params.temperature) == (expected, True, 0)


def test_without_beams_the_engine_s_parameters_are_as_ever() -> None:
    assert check.sampling_params(resolve(num_beams=1), []) == check.sampling_params(resolve(), [])


SEARCHING = pb.GenerationConfig(
    num_beams=4, length_penalty=2.0, early_stopping=pb.EARLY_STOPPING_WHEN_FULL, num_outputs=1, top_k=50
)


def resolve_searching(limits: check.ConfigLimits = LIMITS, **fields: Any) -> pb.GenerationConfig:
    return check.resolve_config(pb.GenerationConfig(**fields), SEARCHING, 10, limits, seed=7)


def test_a_model_s_own_search_holds_where_nothing_speaks_against_it() -> None:
    for fields in ({}, {"num_outputs": 4}, {"max_tokens": 5, "stop": ["x"]}, {"temperature": 0.0}):
        found = resolve_searching(**fields)  # type: ignore[arg-type]
        assert (found.num_beams, found.length_penalty, found.temperature) == (4, 2.0, 0)
        assert found.early_stopping == pb.EARLY_STOPPING_WHEN_FULL
        assert check.sampling_params(found, []).num_beams == 4
    assert resolve_searching(length_penalty=-1.0).length_penalty == -1.0, "of that search"


def test_a_request_s_own_search_takes_the_rest_from_the_model() -> None:
    found = resolve_searching(num_beams=2)
    assert (found.num_beams, found.length_penalty) == (2, 2.0)
    found = resolve_searching(num_beams=2, length_penalty=0.5, early_stopping=pb.EARLY_STOPPING_HEURISTIC)
    assert (found.length_penalty, found.early_stopping) == (0.5, pb.EARLY_STOPPING_HEURISTIC)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 1},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"logprobs": True},
        {"best_of": 2},
        {"num_outputs": 5},
        {"max_tokens": 0, "echo": True},
        {"structured_output": pb.StructuredOutput(regex="a")},
    ],
)
def test_a_model_s_own_search_refuses_no_request(fields: dict[str, Any]) -> None:
    found = resolve_searching(**fields)
    assert not beams.is_asked_for(found)
    assert not found.HasField("length_penalty")
    assert found.early_stopping == pb.EARLY_STOPPING_UNSPECIFIED
    assert check.sampling_params(found, []).num_beams == 1


def test_a_model_s_own_search_is_none_where_a_caller_may_not_have_as_many_beams() -> None:
    assert resolve_searching(LIMITS.within(Caps(max_outputs=3))).num_beams == 0
    with pytest.raises(InvalidRequest) as raised:
        resolve_searching(LIMITS.within(Caps(max_outputs=3)), length_penalty=1.0)
    assert raised.value.violations[0].field == "config.length_penalty"


def test_what_a_card_says_of_beams_is_a_default() -> None:
    defaults = GenerationDefaults(num_beams=3, length_penalty=0.5, early_stopping=EarlyStopping.NEVER)
    expected = pb.GenerationConfig(num_beams=3, length_penalty=0.5, early_stopping=pb.EARLY_STOPPING_NEVER)
    assert beams.default_config(defaults) == expected
    assert beams.default_config(GenerationDefaults(top_k=3)) == pb.GenerationConfig()


def test_constrained_calls_of_tools_are_refused() -> None:
    constraint = StructuredOutput(GrammarKind.TEXT)
    with pytest.raises(InvalidRequest) as raised:
        beams.check_constraint(resolve(num_beams=2), constraint)
    assert (raised.value.reason, raised.value.violations[0].field) == ("FIELD_CONFLICT", "config.num_beams")
    beams.check_constraint(resolve(num_beams=2), None)
    beams.check_constraint(resolve(), constraint)


@given(prompt=st.integers(1, 200), max_tokens=st.integers(1, 200), num_beams=st.integers(1, 16))
def test_room_for_all_beams_is_counted(prompt: int, max_tokens: int, num_beams: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, num_beams=num_beams)
    peak = peak_kv_tokens(prompt, params, 16)
    assert peak % 16 == 0
    of_one = prompt % 16 + max_tokens
    if num_beams == 1:
        assert peak - 16 < prompt + max_tokens <= peak
    else:
        assert peak == prompt // 16 * 16 + num_beams * -(-of_one // 16) * 16
