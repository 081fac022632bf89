"""What a config may hold, what fills it, and that whatever passes is within the engine's ranges."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidRequest
from common.grants import Caps
from gateway import validation as check
from torchrelay.v1 import generation_pb2 as pb

LIMITS = check.ConfigLimits(context_length=100, vocab_size=50, max_outputs=4, max_stop_strings=3)
GREEDY = pb.GenerationConfig(
    temperature=0,
    top_k=0,
    top_p=1,
    min_p=0,
    repetition_penalty=1,
    no_repeat_ngram_size=0,
    num_outputs=1,
    logprobs=False,
)
UINT32 = 2**32 - 1


def resolve(
    config: pb.GenerationConfig | None = None,
    *,
    prompt: int = 10,
    defaults: pb.GenerationConfig = GREEDY,
    seed: int = 7,
) -> pb.GenerationConfig:
    return check.resolve_config(config or pb.GenerationConfig(), defaults, prompt, LIMITS, seed=seed)


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        resolve(pb.GenerationConfig(**fields))
    return raised.value


BAD: list[tuple[str, list[Any], str]] = [
    ("max_tokens", [0], "FIELD_OUT_OF_RANGE"),
    ("temperature", [math.nan, math.inf, -math.inf, -0.01, 2.01, 1e300], "FIELD_OUT_OF_RANGE"),
    ("top_p", [math.nan, math.inf, 0.0, -0.0, -1.0, 1.0000001], "FIELD_OUT_OF_RANGE"),
    ("min_p", [math.nan, math.inf, -0.1, 1.0, 2.0], "FIELD_OUT_OF_RANGE"),
    ("repetition_penalty", [math.nan, math.inf, 0.0, -1.0, 10.1], "FIELD_OUT_OF_RANGE"),
    ("no_repeat_ngram_size", [65, UINT32], "FIELD_OUT_OF_RANGE"),
    ("num_outputs", [0, 5, UINT32], "FIELD_OUT_OF_RANGE"),
    ("stop", [[""], ["a", ""], ["x" * 257], ["é" * 129], ["a", "b", "c", "d"]], "FIELD_OUT_OF_RANGE"),
    ("stop_token_ids", [[50], [0, UINT32], [1] * 65], "FIELD_OUT_OF_RANGE"),
    ("best_of", [0, 5, UINT32], "FIELD_OUT_OF_RANGE"),
    ("prompt_logprobs", [21, UINT32], "FIELD_OUT_OF_RANGE"),
]
GOOD: list[tuple[str, list[Any]]] = [
    ("max_tokens", [1, 90]),
    ("max_length", [11, 100]),
    ("temperature", [0.0, 1e-3, 2.0]),
    ("top_k", [0, 1, 50]),
    ("top_p", [1e-6, 1.0]),
    ("min_p", [0.0, 0.999]),
    ("repetition_penalty", [0.1, 1.0, 10.0]),
    ("no_repeat_ngram_size", [0, 64]),
    ("seed", [0, 2**64 - 1]),
    ("num_outputs", [1, 4]),
    ("stop", [[], ["x" * 256], ["é" * 128], ["a", "b", "c"]]),
    ("stop_token_ids", [[], [0, 49], [1] * 64]),
    ("logprobs", [False, True]),
    ("include_stop", [False, True]),
    ("best_of", [1, 4]),
    ("top_logprobs", [0]),
    ("prompt_logprobs", [0, 20]),
    ("echo", [False, True]),
]


@pytest.mark.parametrize(
    ("name", "value", "reason"), [(name, value, reason) for name, values, reason in BAD for value in values]
)
def test_a_value_out_of_range_is_refused_by_its_field(name: str, value: Any, reason: str) -> None:
    error = refusal(**{name: value})
    assert error.reason == reason
    assert [violation.field for violation in error.violations] == [f"config.{name}"]
    assert error.message == f"config.{name}: {error.violations[0].description}"
    assert "nan" not in error.message
    assert "xxx" not in error.message


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD for value in values])
def test_a_value_at_its_limit_is_taken(name: str, value: Any) -> None:
    resolved = resolve(pb.GenerationConfig(**{name: value}))
    if name != "max_length":
        assert getattr(resolved, name) == value


def test_all_bad_fields_are_reported_at_once() -> None:
    fields = {name: values[0] for name, values, _ in BAD if name != "prompt_logprobs"}  # allows max_tokens 0
    error = refusal(**fields)
    assert {violation.field for violation in error.violations} == {f"config.{name}" for name in fields}
    assert {violation.reason for violation in error.violations} == {"FIELD_OUT_OF_RANGE"}


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        ({"top_logprobs": 1}, {"top_logprobs": "FIELD_CONFLICT"}),
        ({"top_logprobs": 21, "logprobs": True}, {"top_logprobs": "FIELD_OUT_OF_RANGE"}),
        ({"best_of": 2, "num_outputs": 3}, {"best_of": "FIELD_OUT_OF_RANGE"}),
        ({"max_tokens": 0, "echo": False}, {"max_tokens": "FIELD_OUT_OF_RANGE"}),
        ({"max_tokens": 0, "echo": True, "best_of": 1}, {"best_of": "FIELD_CONFLICT"}),
        ({"max_tokens": 0, "top_logprobs": 1}, {"max_tokens": "FIELD_OUT_OF_RANGE", "top_logprobs": "FIELD_CONFLICT"}),
    ],
)
def test_reports_that_contradict_each_other_are_refused(fields: dict[str, Any], reasons: dict[str, str]) -> None:
    violations = refusal(**fields).violations
    assert {found.field.removeprefix("config."): found.reason for found in violations} == reasons


def test_a_conversation_is_not_echoed() -> None:
    with pytest.raises(InvalidRequest) as raised:
        check.resolve_config(pb.GenerationConfig(echo=True, top_p=3), GREEDY, 10, LIMITS, seed=1, is_chat=True)
    assert [violation.field for violation in raised.value.violations] == ["config.top_p", "config.echo"]


@pytest.mark.parametrize("fields", [{"echo": True}, {"prompt_logprobs": 0}])
def test_no_new_tokens_are_asked_for_where_the_prompt_is_read(fields: dict[str, Any]) -> None:
    resolved = resolve(pb.GenerationConfig(max_tokens=0, **fields))
    assert (resolved.HasField("max_tokens"), check.sampling_params(resolved, []).max_tokens) == (True, 0)


def test_reports_reach_the_engine() -> None:
    config = pb.GenerationConfig(num_outputs=2, best_of=4, logprobs=True, top_logprobs=20, include_stop=True)
    params = check.sampling_params(resolve(config), [])
    assert (params.num_outputs, params.num_best, params.top_logprobs, params.include_stop) == (4, 2, 20, True)
    assert params.prompt_logprobs is None
    assert check.sampling_params(resolve(pb.GenerationConfig(prompt_logprobs=0)), []).prompt_logprobs == 0
    assert check.sampling_params(resolve(pb.GenerationConfig(best_of=3)), []).num_best == 1


def test_max_length_becomes_max_tokens() -> None:
    resolved = resolve(pb.GenerationConfig(max_length=30), prompt=10)
    assert resolved.max_tokens == 20
    assert not resolved.HasField("max_length")


def test_max_length_and_max_tokens_exclude_each_other() -> None:
    error = refusal(max_length=30, max_tokens=5)
    assert (error.reason, error.violations[0].field) == ("FIELD_CONFLICT", "config.max_length")


@pytest.mark.parametrize("max_length", [0, 1, 10])
def test_max_length_within_the_prompt_is_refused(max_length: int) -> None:
    error = refusal(max_length=max_length)
    assert error.reason == "FIELD_OUT_OF_RANGE"
    assert error.metadata == {"field": "config.max_length", "limit": "11", "got": str(max_length)}


@pytest.mark.parametrize(
    ("fields", "field", "got"),
    [({"max_tokens": 91}, "config.max_tokens", "91"), ({"max_length": 101}, "config.max_length", "91")],
)
def test_prompt_and_output_beyond_the_context_are_refused(fields: dict[str, int], field: str, got: str) -> None:
    error = refusal(**fields)
    assert error.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert error.metadata == {"field": field, "limit": "90", "got": got}


@pytest.mark.parametrize("prompt", [100, 101, 10_000])
def test_a_prompt_without_room_for_an_answer_is_refused(prompt: int) -> None:
    with pytest.raises(InvalidRequest) as raised:
        resolve(prompt=prompt)
    assert raised.value.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert raised.value.metadata == {"field": "input", "limit": "99", "got": str(prompt)}


def test_the_longest_prompt_leaves_one_token() -> None:
    assert resolve(prompt=99).max_tokens == 1


def with_defaults(**fields: Any) -> pb.GenerationConfig:
    config = pb.GenerationConfig()
    config.CopyFrom(GREEDY)
    config.MergeFrom(pb.GenerationConfig(**fields))
    return config


def test_without_a_limit_the_answer_takes_what_is_left_up_to_the_model_s_default() -> None:
    assert resolve(prompt=10).max_tokens == 90
    assert resolve(prompt=10, defaults=with_defaults(max_tokens=16)).max_tokens == 16
    assert resolve(prompt=90, defaults=with_defaults(max_tokens=16)).max_tokens == 10


def test_unset_fields_take_the_model_s_defaults_and_set_ones_do_not() -> None:
    defaults = with_defaults(temperature=0.6, top_p=0.9, top_k=40, repetition_penalty=1.1)
    resolved = resolve(pb.GenerationConfig(top_p=1.0, top_k=0, max_tokens=4), defaults=defaults, seed=9)
    expected = with_defaults(temperature=0.6, top_p=1.0, top_k=0, repetition_penalty=1.1, max_tokens=4, seed=9)
    assert resolved == expected


def test_a_request_s_stops_replace_the_model_s() -> None:
    defaults = with_defaults(stop=["END"], stop_token_ids=[3])
    assert (list(resolve(defaults=defaults).stop), list(resolve(defaults=defaults).stop_token_ids)) == (["END"], [3])
    own = resolve(pb.GenerationConfig(stop=["\n"]), defaults=defaults)
    assert (list(own.stop), list(own.stop_token_ids)) == (["\n"], [3])
    own = resolve(pb.GenerationConfig(stop_token_ids=[5]), defaults=defaults)
    assert (list(own.stop), list(own.stop_token_ids)) == (["END"], [5])


@pytest.mark.parametrize("fields", [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_asking_for_a_filter_is_asking_to_sample(fields: dict[str, float]) -> None:
    assert resolve(pb.GenerationConfig(**fields)).temperature == 1.0
    assert resolve(pb.GenerationConfig(temperature=0, **fields)).temperature == 0.0
    assert resolve(pb.GenerationConfig(**fields), defaults=with_defaults(temperature=0.6)).temperature == 0.6


@pytest.mark.parametrize("temperature", [1e-7, 1e-300, 5e-324, -0.0])
def test_a_temperature_that_scores_cannot_be_divided_by_is_greedy(temperature: float) -> None:
    assert str(resolve(pb.GenerationConfig(temperature=temperature, top_k=3)).temperature) == "0.0"


def test_other_fields_leave_a_greedy_model_greedy() -> None:
    config = pb.GenerationConfig(repetition_penalty=1.3, no_repeat_ngram_size=2, seed=4, num_outputs=2)
    assert resolve(config).temperature == 0.0


def test_a_seed_is_drawn_only_where_none_is_given() -> None:
    assert resolve(seed=7).seed == 7
    assert resolve(pb.GenerationConfig(seed=0), seed=7).seed == 0


def test_end_of_sequence_ids_join_the_caller_s_stops() -> None:
    config = resolve(pb.GenerationConfig(stop_token_ids=[4, 2, 4]))
    assert check.sampling_params(config, [2, 3]).stop_token_ids == (2, 3, 4)


def anything(kind: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | kind


@given(
    fields=st.fixed_dictionaries(
        {
            "max_tokens": anything(st.integers(0, 200) | st.just(UINT32)),
            "max_length": anything(st.integers(0, 200)),
            "temperature": anything(st.floats() | st.floats(0, 2)),
            "top_k": anything(st.integers(0, UINT32)),
            "top_p": anything(st.floats() | st.floats(0, 1)),
            "min_p": anything(st.floats() | st.floats(0, 1)),
            "repetition_penalty": anything(st.floats() | st.floats(0, 10)),
            "no_repeat_ngram_size": anything(st.integers(0, 80)),
            "seed": anything(st.integers(0, 2**64 - 1)),
            "num_outputs": anything(st.integers(0, 6)),
            "stop": st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=4),
            "stop_token_ids": st.lists(st.integers(0, 60), max_size=4),
            "logprobs": anything(st.booleans()),
        }
    ),
    kept=st.sets(st.integers(0, 12)),
    prompt=st.integers(1, 120),
)
@settings(max_examples=500, deadline=None)
def test_what_passes_is_within_the_engine_s_ranges(fields: dict[str, Any], kept: set[int], prompt: int) -> None:
    given_fields = {name: value for index, (name, value) in enumerate(fields.items()) if index in kept}
    try:
        resolved = resolve(pb.GenerationConfig(**given_fields), prompt=prompt)
    except InvalidRequest as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert refused.violations
        assert all(violation.field.startswith(("config.", "input")) for violation in refused.violations)
        return
    params = check.sampling_params(resolved, [1])
    assert 1 <= params.max_tokens <= 100 - prompt
    assert params.temperature == 0 or 1e-6 <= params.temperature <= 2
    assert 0 <= params.top_k <= UINT32
    assert 0 < params.top_p <= 1
    assert 0 <= params.min_p < 1
    assert 0 < params.repetition_penalty <= 10
    assert 0 <= params.no_repeat_ngram_size <= 64
    assert 0 <= params.seed < 2**64
    assert 1 <= params.num_outputs <= 4
    assert all(params.stop_strings)
    assert all(0 <= token_id < 50 for token_id in params.stop_token_ids)
    assert len(set(params.stop_token_ids)) == len(params.stop_token_ids)
    for name in given_fields.keys() & {"temperature", "top_p", "min_p", "repetition_penalty", "top_k", "seed"}:
        if given_fields[name] is not None and (name != "temperature" or given_fields[name] >= 1e-6):
            assert getattr(params, name) == given_fields[name]


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        (Duration(), 0),
        (Duration(seconds=1, nanos=500_000_000), 1500),
        (Duration(nanos=999_999), 0),
        (Duration(nanos=999_999_999), 999),
        (Duration(seconds=315_576_000_000), 60_000),
    ],
)
def test_durations_become_milliseconds_cut_to_the_longest(duration: Duration, expected: int) -> None:
    assert check.milliseconds(duration, "time_limit", minimum=0, maximum=60_000) == expected


@pytest.mark.parametrize(
    "duration",
    [
        Duration(nanos=-1),
        Duration(nanos=1_000_000_000),
        Duration(nanos=2**31 - 1),
        Duration(seconds=-1),
        Duration(seconds=1, nanos=-1),
        Duration(seconds=315_576_000_001),
        Duration(seconds=2**63 - 1),
        Duration(seconds=-(2**63)),
    ],
)
def test_an_invalid_duration_is_refused(duration: Duration) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check.milliseconds(duration, "time_limit", minimum=0, maximum=60_000)
    assert (raised.value.reason, raised.value.violations[0].field) == ("FIELD_OUT_OF_RANGE", "time_limit")


def test_a_duration_below_the_least_is_refused() -> None:
    with pytest.raises(InvalidRequest) as raised:
        check.milliseconds(Duration(nanos=500), "time_limit", minimum=1)
    assert raised.value.metadata == {"field": "time_limit", "limit": "1", "got": "0"}


@pytest.mark.parametrize("key", ["a" * 128, "!~", "550e8400-e29b-41d4-a716-446655440000"])
def test_an_idempotency_key_is_printable(key: str) -> None:
    assert check.check_idempotency_key(key) == key


@pytest.mark.parametrize("key", ["a" * 129, "a b", "a\n", "\x7f", "é", "\x00"])
def test_other_idempotency_keys_are_refused(key: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check.check_idempotency_key(key)
    assert (raised.value.reason, raised.value.violations[0].field) == ("FIELD_INVALID", "idempotency_key")


def test_the_keys_of_a_calls_generations_meet_no_key_of_a_caller() -> None:
    keys = [check.idempotency_key_of("~" * 128, part) for part in (0, 1, 2, 127)]
    assert keys[0] == "~" * 128
    assert len(set(keys)) == 4
    for key in keys[1:]:
        assert key is not None
        assert len(key) <= 128
        with pytest.raises(InvalidRequest):
            check.check_idempotency_key(key)
    assert check.idempotency_key_of("a", 1) != check.idempotency_key_of("b", 1)
    assert check.idempotency_key_of("", 1) is None
    with pytest.raises(InvalidRequest):
        check.idempotency_key_of("a b", 1)


def test_an_empty_idempotency_key_is_none() -> None:
    assert check.check_idempotency_key("") is None


def test_a_model_must_be_named() -> None:
    assert check.check_model_name("tiny") == "tiny"
    with pytest.raises(InvalidRequest, match="required") as raised:
        check.check_model_name("")
    assert (raised.value.reason, raised.value.metadata) == ("FIELD_REQUIRED", {"field": "model"})


def test_token_ids_must_be_in_the_vocabulary() -> None:
    check.check_token_ids([0, 49], 50, "ids")
    check.check_token_ids([], 50, "ids")
    with pytest.raises(InvalidRequest) as raised:
        check.check_token_ids([0, 50, 7], 50, "ids")
    assert raised.value.metadata == {"field": "ids", "limit": "49"}


@pytest.mark.parametrize("reads", [{"prompt_logprobs": 0}, {"echo": True}])
def test_a_prompt_that_fills_the_context_may_be_read_without_a_new_token(reads: dict[str, Any]) -> None:
    config = pb.GenerationConfig(max_tokens=0, **reads)
    assert check.resolve_config(config, GREEDY, 100, LIMITS, seed=1).max_tokens == 0
    for num_prompt_tokens, asked, limit in ((101, config, "100"), (100, pb.GenerationConfig(**reads), "99")):
        with pytest.raises(InvalidRequest) as raised:
            check.resolve_config(asked, GREEDY, num_prompt_tokens, LIMITS, seed=1)
        assert (raised.value.reason, raised.value.metadata["limit"]) == ("CONTEXT_LENGTH_EXCEEDED", limit)


def test_a_callers_caps_tighten_the_limits() -> None:
    limits = LIMITS.within(Caps(max_tokens=7, max_outputs=2, max_context_tokens=30))
    resolved = check.resolve_config(pb.GenerationConfig(), pb.GenerationConfig(), 10, limits, seed=1)
    assert resolved.max_tokens == 7
    resolved = check.resolve_config(pb.GenerationConfig(), pb.GenerationConfig(), 28, limits, seed=1)
    assert resolved.max_tokens == 2, "what the context leaves"
    for config, field, limit in (
        (pb.GenerationConfig(max_tokens=8), "config.max_tokens", "7"),
        (pb.GenerationConfig(max_length=18), "config.max_length", "7"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            check.resolve_config(config, pb.GenerationConfig(), 10, limits, seed=1)
        assert (refused.value.reason, refused.value.metadata["field"], refused.value.metadata["limit"]) == (
            "FIELD_OUT_OF_RANGE",
            field,
            limit,
        )
    with pytest.raises(InvalidRequest) as refused:
        check.resolve_config(pb.GenerationConfig(num_outputs=3), pb.GenerationConfig(), 10, limits, seed=1)
    assert refused.value.metadata == {} or "num_outputs" in refused.value.message
    with pytest.raises(InvalidRequest) as refused:
        check.resolve_config(pb.GenerationConfig(), pb.GenerationConfig(), 30, limits, seed=1)
    assert refused.value.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert LIMITS.within(Caps()) == LIMITS


@pytest.mark.parametrize("size", [0, 128, 129])
def test_a_cache_salt_is_bounded(size: int) -> None:
    salt = b"s" * size
    if size <= 128:
        assert check.check_cache_salt(salt) == salt
        return
    with pytest.raises(InvalidRequest) as refused:
        check.check_cache_salt(salt)
    assert refused.value.metadata == {"field": "cache_salt", "limit": "128", "got": "129"}
