"""Whether a text is what its schema asks for."""

from __future__ import annotations

import json

from jsonschema import Draft202012Validator, FormatChecker

from tests.structured.schemas import Schema

# Those whose right form is all there is to them: a date of the right form may still be the 30th of February.
_FORMATS = FormatChecker(formats=["ipv4", "ipv6", "uuid", "email"])


def why_not_valid(text: str, schema: Schema) -> str | None:
    """Return what is wrong with a text under a schema, None if nothing is."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}"
    error = next(Draft202012Validator(schema, format_checker=_FORMATS).iter_errors(value), None)
    return None if error is None else f"{error.json_path}: {error.message[:200]}"
