"""Answers taken apart: what each format's parts are, however the text is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.deltas import merge_tool_calls
from common.generation import ChatParsing, ToolCallDelta
from worker.chat.json_scan import ValueScanner
from worker.chat.parser import ChatParser
from worker.engine.types import Parts

HERMES = ChatParsing(tool_format="hermes")
GENERIC = ChatParsing(tool_format="generic")
LLAMA = ChatParsing(tool_format="llama3", tool_names=("f", "g"))
MISTRAL = ChatParsing(tool_format="mistral")
THINK = ChatParsing(reasoning_format="think", tool_format="hermes")
IN_THOUGHT = ChatParsing(reasoning_format="think", in_reasoning=True)


def pieces_of(text: str, cuts: Iterable[int]) -> list[str]:
    """Cut a text at these places, modulo its length."""
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def parsed(parsing: ChatParsing, pieces: Iterable[str]) -> tuple[Parts, int]:
    """Return the parts with each call's pieces joined, and how many calls were whole."""
    parser = ChatParser(parsing)
    parts = Parts()
    for piece in pieces:
        parts += parser.push(piece)
    parts += parser.flush()
    return parts._replace(calls=merge_tool_calls(parts.calls)), parser.num_calls


def call(index: int, name: str, arguments: str) -> ToolCallDelta:
    return ToolCallDelta(index, name, arguments)


CASES: dict[str, tuple[ChatParsing, str, Parts, int]] = {
    "two calls behind text": (
        HERMES,
        'Sure.\n<tool_call>\n{"name": "f", "arguments": {"a": "x}<\\"", "b": [1, {"c": 2}]}}\n</tool_call>\n'
        '<tool_call>{"arguments": {}, "name": "g"}</tool_call>',
        Parts("Sure.", "", (call(0, "f", '{"a": "x}<\\"", "b": [1, {"c": 2}]}'), call(1, "g", "{}"))),
        2,
    ),
    "generic is as hermes": (
        GENERIC,
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        Parts(calls=(call(0, "f", "{}"),)),
        1,
    ),
    "further keys": (
        HERMES,
        '<tool_call>{"id": 7, "type": "function", "name": "f", "arguments": {"x": null}, "more": [true]}</tool_call>',
        Parts(calls=(call(0, "f", '{"x": null}'),)),
        1,
    ),
    "arguments in a string": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        Parts(calls=(call(0, "f", '{"a": 1}'),)),
        1,
    ),
    "half a surrogate pair": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": "\\ud800"}</tool_call>',
        Parts(calls=(call(0, "f", '"\\ud800"'),)),
        1,
    ),
    "no arguments": (HERMES, '<tool_call>{"name": "f"}</tool_call>', Parts(calls=(call(0, "f", "{}"),)), 1),
    "text behind a call": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {}} junk </tool_call> done',
        Parts(" done", "", (call(0, "f", "{}"),)),
        1,
    ),
    "a call cut off": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": 1',
        Parts(calls=(call(0, "f", '{"a": 1'),)),
        0,
    ),
    "a call without its last mark": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": 1}}\n',
        Parts(calls=(call(0, "f", '{"a": 1}'),)),
        1,
    ),
    "no call at all": (HERMES, "a <tool_call> is {not json", Parts("a <tool_call> is {not json"), 0),
    "no call, then one": (
        HERMES,
        'a <tool_call>[1] <tool_call>{"name": "f"}</tool_call>',
        Parts("a <tool_call>[1]", "", (call(0, "f", "{}"),)),
        1,
    ),
    "a nameless call": (
        HERMES,
        'x <tool_call>{"arguments": {}}</tool_call>',
        Parts('x <tool_call>{"arguments": {}}</tool_call>'),
        0,
    ),
    "a name without end": (HERMES, '<tool_call>{"name": ' + "[" * 2000, Parts('<tool_call>{"name": ' + "[" * 2000), 0),
    "arguments twice": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {}, "arguments": {"a": 1}, "parameters": {}}</tool_call>',
        Parts(calls=(call(0, "f", "{}"),)),
        1,
    ),
    "mistral's array goes wrong": (
        MISTRAL,
        '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"x": 1}] and text',
        Parts('{"x": 1}] and text', "", (call(0, "f", "{}"),)),
        1,
    ),
    "a name that is no text": (HERMES, '<tool_call>{"name": 7}', Parts('<tool_call>{"name": 7}'), 0),
    "half a mark": (HERMES, "x <tool_", Parts("x <tool_"), 0),
    "llama": (
        LLAMA,
        '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
        Parts(calls=(call(0, "f", '{"a": 1}'), call(1, "g", "{}"))),
        2,
    ),
    "llama with its mark": (
        LLAMA,
        '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}\n',
        Parts(calls=(call(0, "f", '{"a": 1}'),)),
        1,
    ),
    "llama calls what is not there": (
        LLAMA,
        '{"name": "h", "parameters": {}}',
        Parts('{"name": "h", "parameters": {}}'),
        0,
    ),
    "llama answers in JSON": (LLAMA, ' {"a": 5} ', Parts(' {"a": 5} '), 0),
    "llama answers in text": (LLAMA, ' hello {"name": "f"}', Parts(' hello {"name": "f"}'), 0),
    "llama writes a program": (LLAMA, "<|python_tag|>print(1)", Parts("<|python_tag|>print(1)"), 0),
    "llama calls, then talks": (
        LLAMA,
        '{"name": "f"} and so on',
        Parts(" and so on", "", (call(0, "f", "{}"),)),
        1,
    ),
    "mistral's array": (
        MISTRAL,
        'ok [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        Parts("ok", "", (call(0, "f", '{"a": 1}'), call(1, "g", "{}"))),
        2,
    ),
    "mistral's names": (
        MISTRAL,
        '[TOOL_CALLS]f[ARGS]{"a": "]"}[TOOL_CALLS]g[CALL_ID]abc[ARGS] {}',
        Parts(calls=(call(0, "f", '{"a": "]"}'), call(1, "g", "{}"))),
        2,
    ),
    "mistral without the second mark": (MISTRAL, '[TOOL_CALLS]f{"a": 1}', Parts(calls=(call(0, "f", '{"a": 1}'),)), 1),
    "mistral's object": (MISTRAL, '[TOOL_CALLS]{"name": "f"}', Parts(calls=(call(0, "f", "{}"),)), 1),
    "mistral makes no sense": (MISTRAL, "a [TOOL_CALLS] no sense {", Parts("a [TOOL_CALLS] no sense {"), 0),
    "mistral's array of nothing": (MISTRAL, 'a [TOOL_CALLS] [{"x": 1}]', Parts('a [TOOL_CALLS] [{"x": 1}]'), 0),
    "reasoning, then a call": (
        THINK,
        '<think>\nhm <tool_call>\n</think>\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        Parts("", "hm <tool_call>", (call(0, "f", "{}"),)),
        1,
    ),
    "no reasoning": (THINK, "\nat once <think>", Parts("\nat once <think>"), 0),
    "reasoning that is cut off": (THINK, "<think>cut\n", Parts("", "cut"), 0),
    "reasoning that the prompt began": (IN_THOUGHT, "so\n\n</think>\n\nHi\n</think>", Parts("Hi\n</think>", "so"), 0),
    "no thought": (IN_THOUGHT, "\n\n</think>\n\nHi", Parts("Hi"), 0),
    "newlines only": (IN_THOUGHT, "\n\n", Parts(), 0),
}


@pytest.mark.parametrize(("parsing", "text", "parts", "num_calls"), CASES.values(), ids=CASES.keys())
def test_what_an_answer_is_taken_apart_into(parsing: ChatParsing, text: str, parts: Parts, num_calls: int) -> None:
    assert parsed(parsing, [text]) == (parts, num_calls)
    assert parsed(parsing, text) == (parts, num_calls), "one character at a time"


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 200), max_size=8))
@settings(deadline=None)
def test_the_cuts_between_pieces_make_no_difference(name: str, cuts: list[int]) -> None:
    parsing, text, parts, num_calls = CASES[name]
    assert parsed(parsing, pieces_of(text, cuts)) == (parts, num_calls)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
calls = st.lists(
    st.tuples(st.sampled_from(["f", "g"]), st.dictionaries(st.text(max_size=5), json_values, max_size=3)), max_size=3
)


def written(parsing: ChatParsing, made: list[tuple[str, dict[str, Any]]], *, ascii_only: bool) -> str:
    """Return the calls as a model writes them."""

    def text(value: object) -> str:
        return json.dumps(value, ensure_ascii=ascii_only)

    match parsing.tool_format:
        case "hermes":
            return "\n".join(
                f"<tool_call>\n{text({'name': name, 'arguments': arguments})}\n</tool_call>" for name, arguments in made
            )
        case "llama3":
            return "; ".join(text({"name": name, "parameters": arguments}) for name, arguments in made)
        case _:
            return "".join(f"[TOOL_CALLS]{name}[ARGS]{text(arguments)}" for name, arguments in made)


@given(st.sampled_from([HERMES, LLAMA, MISTRAL]), calls, st.lists(st.integers(0, 400), max_size=6), st.booleans())
@example(HERMES, [("f", {"</tool_call>": "<tool_call>"})], [30], True)
@example(MISTRAL, [("f", {"a": "[TOOL_CALLS]"})], [], False)
@settings(deadline=None, max_examples=300)
def test_calls_come_out_as_they_were_meant(
    parsing: ChatParsing, made: list[tuple[str, dict[str, Any]]], cuts: list[int], ascii_only: bool
) -> None:
    parts, num_calls = parsed(parsing, pieces_of(written(parsing, made, ascii_only=ascii_only), cuts))
    assert [(c.name, json.loads(c.arguments)) for c in parts.calls] == made
    assert ([c.index for c in parts.calls], num_calls, parts.text) == (list(range(len(made))), len(made), "")


soup = st.lists(
    st.sampled_from(
        [
            "<tool_call>",
            "</tool_call>",
            "[TOOL_CALLS]",
            "[ARGS]",
            "<|python_tag|>",
            "<think>",
            "</think>",
            "{",
            "}",
            '"',
            "[",
            "]",
            *('"name"', ":", ",", " ", "\n", "f", "\\", '{"name": "f"', '"arguments": {'),
        ]
    ),
    max_size=12,
).map("".join)


@given(st.sampled_from([HERMES, LLAMA, MISTRAL, THINK, IN_THOUGHT]), soup, st.lists(st.integers(0, 99), max_size=5))
@settings(deadline=None, max_examples=500)
def test_any_text_is_read_to_its_end_and_alike_in_any_pieces(parsing: ChatParsing, text: str, cuts: list[int]) -> None:
    whole = parsed(parsing, [text])
    assert parsed(parsing, pieces_of(text, cuts)) == whole
    if not whole[0].calls and not parsing.reasoning_format:
        assert whole[0].text == text, "where there is no call, no character is lost"


def test_text_is_passed_on_as_soon_as_it_cannot_be_a_mark() -> None:
    parser = ChatParser(HERMES)
    assert [parser.push(piece).text for piece in ("Hi", " <to", "a", " there <tool", "s>")] == [
        "Hi",
        "",
        " <toa",
        " there",
        " <tools>",
    ]


def test_arguments_are_passed_on_as_they_come() -> None:
    parser = ChatParser(HERMES)
    pieces = ["<tool_call>", '{"name": "f",', ' "arguments": {"a"', ': "x', 'y"}', "}", "</tool_call>"]
    assert [parser.push(piece).calls for piece in pieces] == [
        (),
        (call(0, "f", ""),),
        (call(0, "", '{"a"'),),
        (call(0, "", ': "x'),),
        (call(0, "", 'y"}'),),
        (),
        (),
    ]


@pytest.mark.parametrize(("parsing", "mark"), [(HERMES, "<tool_call>"), (MISTRAL, "[TOOL_CALLS]")])
def test_marks_in_vain_are_not_read_again_without_end(
    parsing: ChatParsing, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes the scanner over what follows it; a text of nothing but such marks must not take it over all of it."""
    num_scanned = 0
    take = ValueScanner._take

    def counting(self: ValueScanner, character: str) -> bool:
        nonlocal num_scanned
        num_scanned += 1
        return take(self, character)

    monkeypatch.setattr(ValueScanner, "_take", counting)
    texts = [f'{mark}{{"a":[' * num_marks + "]}" * num_marks for num_marks in (400, 1600)]
    counts = []
    for text in texts:
        num_scanned = 0
        assert parsed(parsing, [text]) == (Parts(text), 0)
        counts.append(num_scanned)
    assert counts[1] < 6 * counts[0], "four times the text, some four times the work"


def test_blanks_are_held_without_being_looked_at_again() -> None:
    parser = ChatParser(HERMES)
    for _ in range(50_000):
        assert parser.push(" ") == Parts()
    assert parser.push("x").text == " " * 50_000 + "x"


class CountedText(str):
    """Text that counts how many of its characters, and of what is made of it, are looked at or copied."""

    num_seen = 0

    def _counted(self, text: str) -> CountedText:
        CountedText.num_seen += len(self)
        return CountedText(text)

    def __add__(self, other: str) -> CountedText:
        return self._counted(super().__add__(other))

    def __radd__(self, other: str) -> CountedText:
        return self._counted(str.__add__(other, self))

    def __getitem__(self, key: Any) -> CountedText:
        return self._counted(super().__getitem__(key))

    def lstrip(self, characters: str | None = None, /) -> CountedText:
        return self._counted(super().lstrip(characters))

    def rstrip(self, characters: str | None = None, /) -> CountedText:
        return self._counted(super().rstrip(characters))

    def find(self, *args: Any) -> int:
        CountedText.num_seen += len(self)
        return super().find(*args)


@pytest.mark.parametrize(
    ("parsing", "begin", "piece"),
    [
        (THINK, "", "\n"),
        (THINK, "", " \n"),
        (THINK, "<think>", "\n"),
        (THINK, "<think>a", "\n"),
        (THINK, "<think>a</think>", "\n"),
        (THINK, "<think>a</think>b", "\n"),
        (IN_THOUGHT, "", "\n"),
        (HERMES, "a", " "),
        (LLAMA, "", " "),
        (LLAMA, "<|python_tag|>", " "),
        (LLAMA, '{"name": "f", "parameters": {}}', ";"),
        (MISTRAL, "a", " "),
    ],
)
def test_what_is_held_back_is_not_looked_at_again_with_every_piece(
    parsing: ChatParsing, begin: str, piece: str
) -> None:
    counts = []
    for num_pieces in (500, 2000):
        parser = ChatParser(parsing)
        parser.push(begin)
        CountedText.num_seen = 0
        for _ in range(num_pieces):
            parser.push(CountedText(piece))
        counts.append(CountedText.num_seen)
    assert counts[0] > 0
    assert counts[1] < 6 * counts[0], "four times the pieces, some four times the work"


HALVES = ("\n", "\n\n", " ", "\t", ";", "a", "<", "<thin", "</thi", "<think>", "</think>", "<|python_tag|>")
CALLS = ('{"name": "f", "parameters": {}}', "<tool_call>", "[TOOL_CALLS]")
blanks = st.lists(st.sampled_from([*HALVES, *CALLS]), max_size=8).map("".join)


@given(st.sampled_from([HERMES, LLAMA, MISTRAL, THINK, IN_THOUGHT]), blanks)
@settings(deadline=None, max_examples=100)
def test_white_space_and_halves_of_marks_are_alike_wherever_they_are_cut(parsing: ChatParsing, text: str) -> None:
    whole = parsed(parsing, [text])
    assert parsed(parsing, text) == whole
    for at in range(len(text) + 1):
        assert parsed(parsing, [text[:at], text[at:]]) == whole


def test_one_call_may_be_enough() -> None:
    parser = ChatParser(ChatParsing(tool_format="hermes", max_tool_calls=1))
    parser.push('<tool_call>{"name": "f", "arguments": {')
    assert not parser.has_enough
    parser.push("}}")
    assert parser.has_enough


@pytest.mark.parametrize("parsing", [ChatParsing(tool_format="other"), ChatParsing(reasoning_format="other")])
def test_an_unknown_format_is_refused(parsing: ChatParsing) -> None:
    with pytest.raises(ValueError, match="other"):
        ChatParser(parsing)
