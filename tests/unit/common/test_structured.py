"""Which constraints compile, which are refused and why, and what a compiled one takes."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

from common.generation import GrammarKind, StructuredOutput
from common.grammar_messages import told_without
from common.structured import MAX_BYTES, MAX_CHOICES, GrammarError, compile_grammar, make_tokenizer
from tests.builders_models import VOCAB_SIZE, write_tokenizer
from tests.structured.schemas import drawn_schemas, known_schemas

EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LLTokenizer:
    """A byte a token, narrower than the logits."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return make_tokenizer((folder / "tokenizer.json").read_bytes(), VOCAB_SIZE, (EOS,))


def spec_of(kind: GrammarKind, value: Any) -> StructuredOutput:
    if kind is GrammarKind.CHOICES:
        return StructuredOutput(kind, choices=tuple(value))
    return StructuredOutput(kind, value if isinstance(value, str) else json.dumps(value))


def takes(tokenizer: LLTokenizer, spec: StructuredOutput, text: str) -> bool:
    """Whether the whole text matches."""
    matcher = compile_grammar(spec, tokenizer)
    ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def schema(value: Any) -> StructuredOutput:
    return spec_of(GrammarKind.JSON_SCHEMA, value)


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        (
            schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
            '{"a": 1}',
            '{"a":1}',
        ),
        (schema({"type": "array", "items": {"type": "integer"}}), "[1, 2]", "[ 1, 2]"),
        # A name spelled in another way would pass by what holds for it.
        (schema({"properties": {"a": {"type": "integer"}}}), '{"b": "x"}', '{"\\u0061": "x"}'),
        (schema({"type": "string", "maxLength": 2}), '"😀é"', '"😀éa"'),
        (schema({"type": "string", "pattern": r"^\d$"}), '"5"', '"५"'),
        (schema({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}), "0.5", "0.0"),
        (schema({"oneOf": [{"type": "integer"}, {"const": "x"}]}), '"x"', '"y"'),
        (schema({"description": "read over", "type": "null", "anything": 1}), "null", "0"),
        (StructuredOutput(GrammarKind.JSON_OBJECT), '{"a": [null]}', "[]"),
        (spec_of(GrammarKind.REGEX, r"a/b\d"), "a/b5", "a/b५"),
        (spec_of(GrammarKind.REGEX, "^a$"), "a", "aa"),
        (spec_of(GrammarKind.REGEX, ""), "", "a"),
        (spec_of(GrammarKind.CHOICES, ["a.c", "ab"]), "a.c", "abc"),
        (spec_of(GrammarKind.CHOICES, ["a", "ab"]), "ab", "abb"),
        (spec_of(GrammarKind.LARK, 'start: "temperature=" %json {"const": 1}'), "temperature=1", "temperature=2"),
    ],
    ids=str,
)
def test_what_a_constraint_takes(tokenizer: LLTokenizer, spec: StructuredOutput, good: str, bad: str) -> None:
    assert takes(tokenizer, spec, good)
    assert not takes(tokenizer, spec, bad)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6), st.text(max_size=8))
def test_choices_take_just_themselves(tokenizer: LLTokenizer, choices: list[str], other: str) -> None:
    spec = spec_of(GrammarKind.CHOICES, choices)
    assert all(takes(tokenizer, spec, choice) for choice in choices)
    assert takes(tokenizer, spec, other) == (other in choices)


BOUNDS = [-3.5, -3, -0.5, 0, 0.25, 1, 3, 3.05, 3.5, 4, 10, 10.25]


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["number", "integer"]),
    st.tuples(st.sampled_from(["minimum", "exclusiveMinimum"]), st.sampled_from(BOUNDS)),
    st.tuples(st.sampled_from(["maximum", "exclusiveMaximum"]), st.sampled_from(BOUNDS)),
)
def test_a_number_outside_its_bounds_is_never_taken(
    tokenizer: LLTokenizer, kind: str, low: tuple[str, float], high: tuple[str, float]
) -> None:
    value = {"type": kind, low[0]: low[1], high[0]: high[1]}
    try:
        matcher = compile_grammar(schema(value), tokenizer)
    except GrammarError:
        return
    for number in (*BOUNDS, -0.0, 3.49, 3.51, -3.51, 9.99):
        above = number >= low[1] if low[0] == "minimum" else number > low[1]
        below = number <= high[1] if high[0] == "maximum" else number < high[1]
        for text in {str(number), f"{number:.2f}"}:
            copy, ids = matcher.deep_copy(), tokenizer.tokenize_str(text)
            is_taken = copy.try_consume_tokens(ids) == len(ids) and copy.is_accepting()
            assert not is_taken or (above and below), (value, text)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (spec_of(GrammarKind.REGEX, "a" * (MAX_BYTES + 1)), "GRAMMAR_TOO_LARGE"),
        (spec_of(GrammarKind.CHOICES, map(str, range(MAX_CHOICES + 1))), "GRAMMAR_TOO_LARGE"),
        (schema({"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 2}]}), "GRAMMAR_TOO_COMPLEX"),
        (schema({"type": "number", "multipleOf": 1e-9 + 1}), "GRAMMAR_TOO_COMPLEX"),
        (schema({"type": "number", "exclusiveMinimum": 3, "maximum": 3.5}), "GRAMMAR_INVALID"),
        (schema({"minimum": -3.5, "exclusiveMaximum": -3}), "GRAMMAR_INVALID"),
        (schema({"exclusiveMinimum": 0, "allOf": [{"maximum": 0.5}]}), "GRAMMAR_INVALID"),
        (schema({"enum": [{"a": ["\x00"]}]}), "GRAMMAR_INVALID"),
        (schema({"properties": {"\x7f\x1b": {}}}), "GRAMMAR_INVALID"),
        (schema({"properties": {"a": {"minProperties": 2, "required": ["b"]}}}), "GRAMMAR_INVALID"),
        (spec_of(GrammarKind.LARK, "start: %json"), "GRAMMAR_INVALID"),
        (spec_of(GrammarKind.LARK, 'start: "a" @other'), "GRAMMAR_INVALID"),
        (spec_of(GrammarKind.LARK, 'start: %json {"x-guidance": {"lenient": true}}'), "GRAMMAR_INVALID"),
        (spec_of(GrammarKind.LARK, "start: <[5000000]>"), "GRAMMAR_INVALID"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_refused(tokenizer: LLTokenizer, spec: StructuredOutput, reason: str) -> None:
    with pytest.raises(GrammarError) as raised:
        compile_grammar(spec, tokenizer)
    assert raised.value.reason == reason
    assert len(str(raised.value)) < 300
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "keyword",
    [
        *("uniqueItems", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas"),
        *("dependencies", "propertyNames", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef"),
        *("not", "if", "then", "else"),
    ],
)
def test_a_keyword_that_would_be_read_over_is_named(tokenizer: LLTokenizer, keyword: str) -> None:
    with pytest.raises(GrammarError, match=keyword.replace("$", "\\$")):
        compile_grammar(schema({"type": ["array", "object"], keyword: {}}), tokenizer)


SECRET = "Xyzzyplugh"
REPEATING = [
    *(
        spec_of(GrammarKind.REGEX, text.replace("S", SECRET))
        for text in ("(S", "(?=S)b", "[S", r"\p{S}", r"S\1", "S(\n")
    ),
    *(
        schema(value)
        for value in (
            {"type": SECRET},
            {"format": SECRET, "type": "string"},
            {"$ref": f"http://{SECRET}/s"},
            {"$ref": f"#/$defs/{SECRET}"},
            {"minimum": SECRET, "type": "integer"},
            {"pattern": f"({SECRET}", "type": "string"},
            {"properties": {SECRET: {"not": {}}}},
            {"patternProperties": {f"({SECRET}": {}}, "type": "object"},
        )
    ),
    *(
        spec_of(GrammarKind.LARK, text.replace("S", SECRET))
        for text in (
            "start: S",
            'start: "S" ]',
            "start: /(S/",
            "S!",
            "start: @S",
            "start: <S>",
            'start: "a"\n// S\na[S=1]: /b/',
        )
    ),
    spec_of(GrammarKind.LARK, 'start: %json {"type": "' + SECRET + '"}'),
    spec_of(GrammarKind.LARK, 'start: %regex {"' + SECRET + '": 1}'),
]


@pytest.mark.parametrize("spec", REPEATING, ids=lambda value: value.text)
def test_a_refusal_does_not_repeat_what_was_written(tokenizer: LLTokenizer, spec: StructuredOutput) -> None:
    with pytest.raises(GrammarError) as raised:
        compile_grammar(spec, tokenizer)
    assert SECRET.lower() not in str(raised.value).lower()
    assert re.search(r"[a-z]{4}", str(raised.value)), "and yet says what is wrong"


def test_words_of_the_caller_are_left_out_wherever_they_stand() -> None:
    told = told_without("something new about internationalisation here", "x internationalisation y")
    assert told == "something new about ... here"
    assert (
        told_without("additionalProperties is wrong", '{"additionalProperties": 7}') == "additionalProperties is wrong"
    )
    assert len(told_without("so much " * 100, "")) < 300


def test_common_schemas_are_taken(tokenizer: LLTokenizer) -> None:
    for wanted in [*known_schemas(), *drawn_schemas(seed=7, count=30)]:
        compile_grammar(StructuredOutput(GrammarKind.JSON_SCHEMA, wanted.text), tokenizer)


def test_a_tokenizer_without_fixed_bytes_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    content = (tmp_path / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="no end-of-sequence id"):
        make_tokenizer(content, VOCAB_SIZE, ())
    changed = json.loads(content)
    changed["model"] = {"type": "WordPiece", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]", "max_input_chars_per_word": 9}
    changed["model"]["continuing_subword_prefix"] = "##"
    changed["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(ValueError, match="fixed bytes"):
        make_tokenizer(json.dumps(changed).encode(), VOCAB_SIZE, (EOS,))


@pytest.mark.parametrize(
    "schema",
    [
        '{"properties": {"multipleOf": true}}',
        '{"const": {"multipleOf": true}}',
        '{"multipleOf": true}',
        '{"type": "integer", "minimum": 1' + "0" * 400 + "}",
        '{"type": "integer", "multipleOf": 1' + "0" * 400 + "}",
    ],
)
def test_odd_numbers_are_taken_or_refused(schema: str, tokenizer: LLTokenizer) -> None:
    with contextlib.suppress(GrammarError):
        assert compile_grammar(StructuredOutput(GrammarKind.JSON_SCHEMA, schema), tokenizer) is not None
