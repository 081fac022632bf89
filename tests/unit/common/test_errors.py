from __future__ import annotations

import re

from common import errors
from common.errors import InvalidRequest, QueueFull, SequenceOutOfRange, ServingError


def all_errors() -> list[type[ServingError]]:
    found, left = [], [ServingError]
    while left:
        kind = left.pop()
        found.append(kind)
        left += kind.__subclasses__()
    return [kind for kind in found if kind.__module__ == errors.__name__]


def test_every_error_has_a_machine_readable_reason() -> None:
    for kind in all_errors():
        assert re.fullmatch(r"[A-Z][A-Z_]+", kind.default_reason), kind


def test_a_field_error_names_field_limit_and_value_once() -> None:
    error = InvalidRequest("must be at most 2", reason="FIELD_OUT_OF_RANGE", field="temperature", limit=2, got=3.5)
    assert error.metadata == {"field": "temperature", "limit": "2", "got": "3.5"}
    assert [(v.field, v.reason) for v in error.violations] == [("temperature", "FIELD_OUT_OF_RANGE")]


def test_an_error_may_name_several_fields() -> None:
    violations = (errors.FieldViolation("a", "x", "FIELD_REQUIRED"), errors.FieldViolation("b", "y", "FIELD_INVALID"))
    assert InvalidRequest("two fields", violations=violations).violations == violations


def test_a_bound_says_when_to_come_back() -> None:
    error = QueueFull("full", reason="TENANT_QUEUE_FULL", retry_after_ms=250)
    assert (error.reason, error.retry_after_ms) == ("TENANT_QUEUE_FULL", 250)


def test_a_sequence_out_of_range_says_what_there_is() -> None:
    assert SequenceOutOfRange(9, 4).metadata == {"field": "after_sequence", "limit": "4", "got": "9"}
