"""What llguidance says of a grammar that it refuses, without what the caller wrote: that may be long, or secret.

It repeats names, values, whole expressions and lines. Kept are its own words, positions, and keywords of JSON Schema.
"""

from __future__ import annotations

import re
from typing import Final

_MAX_CHARS: Final = 240
_LEFT_OUT: Final = "..."
_MIN_REPEATED_CHARS: Final = 12  # what is shorter is most likely a word of the library's own
_KEYWORDS: Final = frozenset({
    "$anchor", "$defs", "$dynamicAnchor", "$dynamicRef", "$id", "$ref", "$schema", "$vocabulary", "additionalItems",
    "additionalProperties", "allOf", "anyOf", "array", "boolean", "const", "contains", "contentEncoding",
    "contentMediaType", "contentSchema", "default", "definitions", "dependencies", "dependentRequired",
    "dependentSchemas", "else", "enum", "exclusiveMaximum", "exclusiveMinimum", "format", "if", "integer", "items",
    "maxContains", "maxItems", "maxLength", "maxProperties", "maximum", "minContains", "minItems", "minLength",
    "minProperties", "minimum", "multipleOf", "not", "null", "number", "object", "oneOf", "pattern",
    "patternProperties", "prefixItems", "properties", "propertyNames", "required", "string", "substring_chars",
    "substring_words", "substring_chunks", "then", "type", "unevaluatedItems", "unevaluatedProperties", "uniqueItems",
})  # fmt: skip
# A regular expression's fault, which stands behind the expression.
_EXPRESSION: Final = re.compile(r"regex parse error:.*?^error: ([^\n]*)", re.DOTALL | re.MULTILINE)
_LISTING: Final = re.compile(r"^(?: *\d+ \|.*| *\^+[ ^]*)$", re.MULTILINE)
_QUOTED: Final = re.compile(r"""("(?:\\.|[^"\\])*"|'[^']*'|`[^`]*`)""", re.DOTALL)
# Values that stand unquoted at the end.
_VALUE: Final = re.compile(
    r"(Invalid type|Unknown format|unknown grammar|unknown special token)\b.*|, got .*|; following .*", re.DOTALL
)


def told_without(message: str, written: str) -> str:
    """Return the library's message without what is of the caller's text."""
    expression = _EXPRESSION.search(message)
    if expression is not None:
        place = re.match(r"at \d+\(\d+\): ", message)
        text = f"{place[0] if place else ''}in a regular expression: {expression[1]}"
    else:
        text = _LISTING.sub("", message)
        text = _QUOTED.sub(lambda found: found[0] if found[0][1:-1] in _KEYWORDS else _LEFT_OUT, text)
        text = _VALUE.sub(lambda found: found[1] or "", text)
    text = "".join(character if character.isprintable() else " " for character in text)
    words = [_LEFT_OUT if _is_repeated(word, written) else word for word in text.split()]
    text = " ".join(words)
    return text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + " ..."


def _is_repeated(word: str, written: str) -> bool:
    bare = word.strip("\"'`[](){},.:;")
    return len(bare) >= _MIN_REPEATED_CHARS and bare not in _KEYWORDS and bare.lower() in written.lower()
