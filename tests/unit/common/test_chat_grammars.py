"""Grammars of chats: what they let through, what not, and that what they let through is read as it was meant."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from common.chat_grammars import closed
from common.deltas import merge_tool_calls
from common.generation import ChatParsing, GrammarKind, StructuredOutput, ToolGrammar
from common.structured import compile_grammar, make_tokenizer
from worker.chat.parser import ChatParser
from worker.engine.types import Parts

SCHEMAS = {
    "f": {"type": "object", "properties": {"a": {"enum": ["x", 1]}}, "required": ["a"], "additionalProperties": False},
    "g": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS = tuple((name, json.dumps(schema)) for name, schema in SCHEMAS.items())
MARKS = ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>")


@cache
def tokenizer_of(*, marks: str) -> tuple[Tokenizer, LLTokenizer]:
    """Bytes, and marks as special tokens, as tokens like others, or not at all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    if marks != "none":
        tokenizer.add_tokens([AddedToken(mark, special=marks == "special") for mark in MARKS])
    end = tokenizer.token_to_id("</s>")
    return tokenizer, make_tokenizer(tokenizer.to_str().encode(), tokenizer.get_vocab_size(), (end,))


def grammar(
    format_: str = "hermes",
    *,
    must: bool = False,
    parallel: bool = True,
    main: StructuredOutput | None = None,
    reasoning: str = "",
    inside: bool = False,
    tools: bool = True,
) -> StructuredOutput:
    main = main or StructuredOutput(GrammarKind.TEXT)
    calls = ToolGrammar(format_, TOOLS, must, parallel) if tools else None
    return StructuredOutput(main.kind, main.text, main.choices, calls, reasoning, inside)


def takes(spec: StructuredOutput, text: str, marks: str = "none") -> bool:
    """Whether the grammar takes a text to its end, and it may end there."""
    tokenizer, tokens = tokenizer_of(marks=marks)
    matcher = compile_grammar(spec, tokens)
    return all(matcher.consume_token(token_id) for token_id in tokenizer.encode(text).ids) and matcher.is_accepting()


HERMES = (
    '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>',
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
)
LLAMA = ('{"name": "f", "parameters": {"a": 1}}', '{"name": "g", "parameters": {}}')
CALLS = {
    "hermes": (HERMES[0], "\n".join(HERMES)),
    "generic": (HERMES[1], "\n".join(HERMES)),
    "llama3": (LLAMA[0], "; ".join(LLAMA)),
    "mistral": (
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]',
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
    ),
    "mistral11": ('[TOOL_CALLS]f[ARGS]{"a": 1}', '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}'),
}


@pytest.mark.parametrize("marks", ["none", "plain", "special"])
@pytest.mark.parametrize("format_", CALLS)
def test_calls_are_taken_as_a_model_writes_them(format_: str, marks: str) -> None:
    one, two = CALLS[format_]
    for must in (False, True):
        for parallel in (False, True):
            spec = grammar(format_, must=must, parallel=parallel)
            assert takes(spec, one, marks)
            assert takes(spec, two, marks) == parallel
    assert not takes(grammar(format_, must=True), "text", marks)
    assert takes(grammar(format_), "text", marks)
    if format_ != "llama3":
        assert takes(grammar(format_), f"first {one}", marks)
        assert takes(grammar(format_), f"first {two} last", marks)


@pytest.mark.parametrize("marks", ["none", "special"])
@pytest.mark.parametrize("format_", CALLS)
@pytest.mark.parametrize(("good", "bad"), [("f", "h"), ('"a"', '"b"'), ("1", "2"), ('"x"', '"y"'), ("{}", "[]")])
def test_no_other_calls_are_taken(format_: str, marks: str, good: str, bad: str) -> None:
    for text in CALLS[format_]:
        if good in text:
            changed = text.replace(good, bad)
            assert not takes(grammar(format_), changed, marks), changed
            assert not takes(grammar(format_, must=True), changed, marks), changed


@pytest.mark.parametrize("marks", ["none", "special"])
def test_reasoning_comes_first_and_may_talk_of_calls(marks: str) -> None:
    call = HERMES[0]
    thought = f"I <b> could {call[:20]} ..."
    for spec in (grammar(reasoning="think"), grammar(reasoning="think", must=True)):
        if marks == "none":  # no token but the model's own begins a call in the middle of a thought
            assert takes(spec, f"<think>{thought}</think>\n\n{call}", marks)
        assert takes(spec, f"<think>so</think>\n\n{call}", marks)
        assert takes(spec, call, marks)
    inside = grammar(reasoning="think", inside=True, must=True)
    assert takes(inside, f"so</think>\n\n{call}", marks)
    assert not takes(inside, f"so</think>\n\nno {call}", marks)
    assert not takes(inside, call, marks)


def test_what_an_answer_must_match_comes_behind_its_reasoning() -> None:
    choice = StructuredOutput(GrammarKind.CHOICES, choices=("yes", "no"))
    spec = grammar(tools=False, main=choice, reasoning="think", inside=True)
    assert takes(spec, "{hm</think>\n\nyes")
    assert not takes(spec, "{hm</think>\n\nmaybe")
    assert not takes(spec, "yes")
    optional = grammar(tools=False, main=choice, reasoning="think")
    assert takes(optional, "no")
    assert takes(optional, "<think></think>no")


@pytest.mark.parametrize(
    "main",
    [
        StructuredOutput(GrammarKind.LARK, 'start: "yes"'),
        StructuredOutput(GrammarKind.REGEX, "yes"),
        StructuredOutput(GrammarKind.CHOICES, choices=("yes",)),
    ],
)
def test_what_an_answer_must_match_may_be_written_in_any_way(main: StructuredOutput) -> None:
    for spec in (grammar(main=main), grammar(tools=False, main=main, reasoning="think")):
        assert takes(spec, "yes")
        assert not takes(spec, "no")


@pytest.mark.parametrize("format_", CALLS)
def test_an_answer_calls_or_matches(format_: str) -> None:
    schema = StructuredOutput(GrammarKind.JSON_SCHEMA, '{"type": "object", "properties": {"ok": {"type": "boolean"}}}')
    spec = grammar(format_, main=schema)
    assert takes(spec, '{"ok": true}')
    assert takes(spec, CALLS[format_][1])
    assert not takes(spec, "text")
    assert not takes(spec, f"text {CALLS[format_][0]}")


def walk(spec: StructuredOutput, marks: str, seed: int, eager: Sequence[str]) -> str:
    """Write what the grammar allows at random, now and then the beginning of a call, to its end."""
    tokenizer, tokens = tokenizer_of(marks=marks)
    matcher: LLMatcher = compile_grammar(spec, tokens)
    rng = random.Random(seed)
    end = tokenizer.token_to_id("</s>")
    ids: list[int] = []
    wish = list(tokenizer.encode(eager[0]).ids) if seed % 3 == 0 else []
    for _ in range(400):
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits).tolist()
        if matcher.is_accepting() and (rng.random() < 0.05 or allowed in ([end], [])):
            break
        if not wish and rng.random() < 0.05:
            wish = list(tokenizer.encode(rng.choice(eager)).ids)
        token_id = wish.pop(0) if wish else rng.choice([i for i in allowed if i != end] or allowed)
        if token_id not in allowed:
            wish = []
            token_id = rng.choice([i for i in allowed if i != end] or allowed)
        assert matcher.consume_token(token_id)
        ids.append(token_id)
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("marks", ["none", "special"])
@pytest.mark.parametrize("format_", CALLS)
@pytest.mark.parametrize("must", [False, True])
def test_whatever_is_let_through_is_read_as_valid_calls(format_: str, marks: str, must: bool) -> None:
    num_calls = 0
    for seed in range(12):
        spec = grammar(format_, must=must, reasoning="think" if seed % 2 else "")
        text = walk(spec, marks, seed, [CALLS[format_][0], "</think>"])
        parser = ChatParser(
            ChatParsing(reasoning_format=spec.reasoning_format, tool_format=format_, tool_names=("f", "g"))
        )
        parts = Parts()
        for character in text:
            parts += parser.push(character)
        parts += parser.flush()
        whole = merge_tool_calls(parts.calls)[: parser.num_calls]
        for call in whole:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        num_calls += len(whole)
    assert num_calls, "some did call"


def test_arguments_have_no_room_for_what_is_not_named() -> None:
    schema = {"type": "object", "properties": {"a": {}}}
    assert closed(schema) == {**schema, "additionalProperties": False}
    for open_one in ({**schema, "additionalProperties": True}, {"type": "object"}, {**schema, "$ref": "#/$defs/x"}):
        assert closed(open_one) == open_one
