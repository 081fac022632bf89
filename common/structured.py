"""Constraints on an output's text, compiled by llguidance: checked by gateways, followed by workers.

The library bounds what a grammar may cost by counting its own steps, so that one that passes here passes everywhere.
What it does not bound is bounded before: the bytes, and `multipleOf`, whose automaton has a state for each remainder.

JSON is written with a space after each comma and colon and no other whitespace. A model could otherwise go on in blanks
for ever, and small ones do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from itertools import chain
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from common.chat_grammars import chat_grammar
from common.generation import GrammarKind, StructuredOutput
from common.grammar_messages import told_without

MAX_BYTES: Final = 64 << 10
MAX_CHOICES: Final = 1000
MAX_DEPTH: Final = 64  # of a schema's text
MAX_MULTIPLE: Final = 10_000  # 0.1 s to compile
JSON_KINDS: Final = frozenset({GrammarKind.JSON_OBJECT, GrammarKind.JSON_SCHEMA})

_MAX_BITS: Final = 512  # of a number in a schema: more is none that a float comes near
_UNWRITABLE: Final = re.compile("[\\x00-\\x07\\x0b\\x0e-\\x1f]")  # JSON has only \\u for these
_JSON_OPTIONS: Final = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "coerce_one_of": False,
    "lenient": False,
    # Without \\u: a property's name could otherwise be spelled so that what holds for it is passed by.
    "json_allowed_escapes": 'bfnrt"\\',
}
# A step's limits are what one request may take of a step that it shares with others: some ten milliseconds.
_LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=1_000_000,  # 20 to 70 ms
    step_lexer_fuel=200_000,
    step_max_items=20_000,
    max_lexer_states=20_000,  # of 1 to 2 KiB
    max_grammar_size=100_000,
    verbose_errors=False,
)
_BOUNDS: Final = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
_BESIDE_A_REFERENCE: Final = frozenset(
    {"$ref", "$defs", "definitions", "$schema", "$id", "$comment", "title", "description", "default", "examples"}
)
_EMBEDDED: Final = re.compile(r"%(json|lark|llguidance|regex)\b")
_IGNORED_ATTRIBUTE: Final = re.compile(r"\btemperature\s*=")


class GrammarError(Exception):
    """A constraint that cannot be kept to; `reason` is GRAMMAR_INVALID, GRAMMAR_TOO_LARGE, GRAMMAR_TOO_COMPLEX or
    GRAMMAR_STUCK.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def make_tokenizer(tokenizer_json: bytes, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """Return the tokens as the library looks them up: half a second for 50,000 of them.

    `vocab_size` is the width of the logits, which may be wider than the tokenizer. Raises ValueError for a tokenizer
    whose tokens do not stand for fixed bytes, or a model without an end-of-sequence id.
    """
    ends = [token_id for token_id in eos_token_ids if token_id < vocab_size]
    if not ends:
        raise ValueError("the model has no end-of-sequence id")
    try:
        return LLTokenizer(tokenizer_json.decode(), n_vocab=vocab_size, eos_token=ends)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ValueError("the tokenizer's tokens do not stand for fixed bytes") from error


def compile_grammar(spec: StructuredOutput, tokenizer: LLTokenizer) -> LLMatcher:
    """Return a matcher at its beginning: milliseconds, at most some hundred. Does not hold the interpreter's lock.

    Raises GrammarError.
    """
    check_size(spec)
    try:
        return _compile(_whole_grammar(spec, tokenizer), tokenizer)
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise GrammarError("GRAMMAR_INVALID", "it cannot be compiled") from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise GrammarError("GRAMMAR_INVALID", "llguidance cannot compile it") from error


def _whole_grammar(spec: StructuredOutput, tokenizer: LLTokenizer) -> str:
    grammar = _grammar(spec)
    if spec.tools is None and not spec.reasoning_format:
        return grammar
    return chat_grammar(
        None if spec.kind is GrammarKind.TEXT else _part(grammar),
        spec.tools,
        spec.reasoning_format,
        tokenizer,
        lambda schema: _part(_grammar(StructuredOutput(GrammarKind.JSON_SCHEMA, schema))),
        in_reasoning=spec.in_reasoning,
    )


def _compile(grammar: str, tokenizer: LLTokenizer) -> LLMatcher:
    is_bad, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer, limits=_LIMITS)
    if is_bad:
        raise _refusal(messages, grammar)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()  # what it finds out here, copies of this matcher know
    if matcher.is_error():
        raise _refusal([matcher.get_error()], grammar)
    return matcher


def is_panic(error: BaseException) -> bool:
    """Whether this is a panic in the library: no Exception, and its class cannot be imported."""
    return not isinstance(error, Exception) and type(error).__name__ == "PanicException"


def check_size(spec: StructuredOutput) -> None:
    """Raise GrammarError for what is not even looked at."""
    if len(spec.choices) > MAX_CHOICES:
        raise GrammarError("GRAMMAR_TOO_LARGE", f"at most {MAX_CHOICES} choices are taken")
    num_bytes = len(spec.text.encode()) + sum(len(choice.encode()) for choice in spec.choices)
    for _, schema in spec.tools.tools if spec.tools is not None else ():
        num_bytes += len(schema.encode())
    if num_bytes > MAX_BYTES:
        raise GrammarError("GRAMMAR_TOO_LARGE", f"at most {MAX_BYTES} bytes are taken")


def failure_reason(message: str) -> str:
    """Return the reason for what the library says of a grammar or of a matcher's state."""
    is_limit = any(word in message for word in ("fuel", "too many", "Too many", "schema too large", "max is"))
    return "GRAMMAR_TOO_COMPLEX" if is_limit else "GRAMMAR_INVALID"


def _refusal(messages: Sequence[str], written: str) -> GrammarError:
    """`written` is what the library was given."""
    message = "\n".join(messages)
    if message.startswith("NoExtension"):
        return GrammarError("GRAMMAR_INVALID", "no text of the model's tokens matches")
    reason = failure_reason(message)
    return GrammarError(reason, told_without(message.removesuffix("<non-verbose/>"), written))


def _part(grammar: str) -> dict[str, Any]:
    """Return the one part that a grammar of llguidance's own making has."""
    if not grammar.startswith("{"):
        return {"lark_grammar": grammar}
    (part,) = json.loads(grammar)["grammars"]
    found: dict[str, Any] = part
    return found


def _grammar(spec: StructuredOutput) -> str:
    if spec.kind is GrammarKind.TEXT:
        return ""
    if spec.kind in JSON_KINDS:
        text = spec.text if spec.kind is GrammarKind.JSON_SCHEMA else '{"type": "object"}'
        _check_schema(_parsed(text))
        try:
            return LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)  # type: ignore[arg-type]
        except ValueError as error:
            raise _refusal([str(error)], text) from error
    if spec.kind is GrammarKind.REGEX:
        # As in JSON schemas \d is a digit of ASCII; in the library it is one of any script.
        return LLMatcher.grammar_from_regex(regex_to_lark(spec.text, "d").replace("\\/", "/"))
    if spec.kind is GrammarKind.CHOICES:
        return LLMatcher.grammar_from_regex("|".join(map(_escaped, spec.choices)))
    _check_lark(spec.text)
    return LLMatcher.grammar_from_lark(spec.text)


def _escaped(text: str) -> str:
    """The expression that matches just this text."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else "not JSON"
        raise GrammarError("GRAMMAR_INVALID", f"the schema is not JSON: {message}") from error
    except RecursionError as error:
        raise _too_deep() from error


def _too_deep() -> GrammarError:
    return GrammarError("GRAMMAR_TOO_COMPLEX", f"the schema is nested more than {MAX_DEPTH} deep")


def _check_schema(schema: object) -> None:
    if not isinstance(schema, dict):
        raise GrammarError("GRAMMAR_INVALID", "a schema is a JSON object")
    if "x-guidance" in schema:
        raise GrammarError("GRAMMAR_INVALID", "x-guidance is not taken: how JSON is written is the same for all")
    values = list(_values(schema))
    if any(isinstance(value, int) and value.bit_length() > _MAX_BITS for value in values):
        raise GrammarError("GRAMMAR_TOO_COMPLEX", f"whole numbers of more than {_MAX_BITS} bits are not taken")
    objects = [found for found in values if isinstance(found, dict)]
    _check_bounds(objects)
    for found in objects:
        _check_counts(found)
    multiple = 1
    for key, value in chain.from_iterable(found.items() for found in objects):
        if _UNWRITABLE.search(key) or (key in ("const", "enum") and _has_unwritable(value)):
            raise GrammarError("GRAMMAR_INVALID", "names and values with control characters are not taken")
        # Also where it is no keyword: a property of this name has a schema for a value, which is no number.
        if key == "multipleOf" and _is_number(value):
            multiple = math.lcm(multiple, _coefficient(value))
            if multiple > MAX_MULTIPLE:
                raise GrammarError(
                    "GRAMMAR_TOO_COMPLEX",
                    f"the least common multiple of all multipleOf, without decimal point, is over {MAX_MULTIPLE}",
                )


def _check_counts(schema: dict[str, Any]) -> None:
    """Members that may have any name may have the same one twice, which counts once where JSON is read."""
    least, required = schema.get("minProperties"), schema.get("required")
    if isinstance(least, int | float) and least > (len(required) if isinstance(required, list) else 0):
        raise GrammarError("GRAMMAR_INVALID", "minProperties above the number of required properties is not taken")


def _check_bounds(objects: list[dict[str, Any]]) -> None:
    """Refuse what the library gets wrong: a whole number as an exclusive bound is let in by another bound of the other
    side that is less than 1 away. Where schemas are merged, bounds of any two of them may meet.
    """
    leads_anywhere = False
    for found in objects:
        _check_edges([found])
        if "allOf" in found or ("$ref" in found and not found.keys() <= _BESIDE_A_REFERENCE):
            inside = [value for value in _values(found) if isinstance(value, dict)]
            leads_anywhere = leads_anywhere or any("$ref" in value for value in inside)
            _check_edges(inside)
    if leads_anywhere:
        _check_edges(objects)


def _check_edges(objects: list[dict[str, Any]]) -> None:
    """In time linear in their number. The other bound is further from zero than the exclusive one."""
    bounds = [_bounds_of(found) for found in objects]
    for exclusive, others, towards_zero in (
        ("exclusiveMinimum", ("maximum", "exclusiveMaximum"), math.floor),
        ("exclusiveMaximum", ("minimum", "exclusiveMinimum"), math.ceil),
    ):
        sign = 1 if towards_zero is math.floor else -1
        near = {towards_zero(own[name]) for own in bounds for name in others if name in own and own[name] % 1}
        if any(own[exclusive] * sign >= 0 and own[exclusive] in near for own in bounds if exclusive in own):
            message = f"{exclusive} at a whole number is not taken where the other bound is less than 1 away"
            raise GrammarError("GRAMMAR_INVALID", message)


def _bounds_of(found: dict[str, Any]) -> dict[str, float]:
    return {name: found[name] for name in _BOUNDS if _is_number(found.get(name))}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _has_unwritable(value: object) -> bool:
    if isinstance(value, str):
        return _UNWRITABLE.search(value) is not None
    if isinstance(value, list):
        return any(map(_has_unwritable, value))
    return isinstance(value, dict) and any(map(_has_unwritable, value.values()))


def _coefficient(number: float) -> int:
    """The digits of a number: 25 of 0.25."""
    return max(1, abs(int("".join(map(str, Decimal(repr(number)).normalize().as_tuple().digits)))))


def _values(value: object, depth: int = 1) -> Iterator[object]:
    """The value and all inside. Raises GrammarError where they are nested too deep."""
    if depth > MAX_DEPTH:
        raise _too_deep()
    yield value
    inner: Iterable[object] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        yield from _values(item, depth + 1)


def _check_lark(text: str) -> None:
    """Hold schemas inside a grammar to what holds for others; refuse what would have no effect."""
    for match in _EMBEDDED.finditer(text):
        rest = text[match.end() :].lstrip()
        try:
            value, _ = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError) as error:
            raise GrammarError("GRAMMAR_INVALID", f"{match[0]} is not followed by JSON") from error
        if match[1] == "json":
            _check_schema(value)
        elif match[1] == "lark":
            raise GrammarError("GRAMMAR_INVALID", "%lark is not taken: write the rules themselves")
    if _IGNORED_ATTRIBUTE.search(re.sub(r'"(\\.|[^"\\\n])*"|//[^\n]*', "", text)):
        raise GrammarError("GRAMMAR_INVALID", "the attribute temperature is not taken: it would have no effect")
