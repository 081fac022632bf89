"""The reference is current, complete, and its table of reasons is that of the code."""

from __future__ import annotations

import re

import pytest
from google.protobuf import descriptor_pb2 as pb

from tests.contract import descriptors, sent
from tests.contract.__main__ import TARGET, page
from tests.contract.descriptors import File
from tests.contract.markdown import Page
from tests.contract.reasons import OF_COMMANDS, REASONS, difference

PAGE = TARGET.read_text()


def test_the_page_is_current() -> None:
    assert page() == PAGE, "run make reference-page"


def test_every_type_method_and_field_is_on_the_page_with_a_comment() -> None:
    files = descriptors.read()
    assert len(files) >= 10
    for file in files:
        for part in (*file.services(), *file.messages(), *file.enums()):
            assert f"### {part.proto.name}\n" in PAGE
            assert file.comment(*part.path), part.name
    rows = re.findall(r"^\| `\w+` \|.*\|$", PAGE, re.MULTILINE)
    assert len(rows) > 500
    assert not [row for row in rows if re.search(r"\|\s*\|$", row)]


def test_every_link_of_the_page_leads_to_a_heading() -> None:
    headings = {
        re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-"))
        for heading in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    }
    links = set(re.findall(r"\]\(#([^)]*)\)", PAGE))
    assert links
    assert links <= headings


def test_every_reason_that_is_sent_has_a_row_and_none_other() -> None:
    found = sent.reasons()
    assert difference(set(found)) == []
    assert difference(set(found) - {"QUEUE_FULL"}) == ["QUEUE_FULL is never sent"]
    assert difference({*found, "NEWLY_INVENTED"}) == ["NEWLY_INVENTED has no row"]
    assert found["QUEUE_FULL"] == {"RESOURCE_EXHAUSTED"}
    assert found["API_KEY_ENDED"] == {"FAILED_PRECONDITION", "PERMISSION_DENIED"}
    assert found.keys() >= {
        "SUPERSEDED",
        "TENANT_CONCURRENCY",
        "GRAMMAR_TOO_COMPLEX",
        "ALL_TOKENS_FORBIDDEN",
        "INTERNAL",
    }
    assert not REASONS.keys() & OF_COMMANDS
    assert all(f"| `{name}` |" in PAGE for name in REASONS)
    for explained in REASONS.values():
        assert explained.meaning.endswith(".")
        assert explained.to_do.endswith(".")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("raise NotFound", {("NOT_FOUND", "NOT_FOUND")}),
        ("raise errors.NotFound('x', reason='A')", {("NOT_FOUND", "A")}),
        ("R: Final = 'A'\nfail(InvalidRequest('x', reason=R))", {("INVALID_ARGUMENT", "A")}),
        ("raise Aborted('x', reason='A' if y else 'B')", {("ABORTED", "A"), ("ABORTED", "B")}),
        ("bad.add('f', 'x')", {("INVALID_ARGUMENT", "FIELD_OUT_OF_RANGE")}),
        ("bad.add('f', 'x', 'A')", {("INVALID_ARGUMENT", "A")}),
        ("FieldViolation('f', 'x', 'A')", {("INVALID_ARGUMENT", "A")}),
        ("names.add('f')", set()),
        ("_REFUSALS = {b'A': 'x'}", {("RESOURCE_EXHAUSTED", "A")}),
        (
            "def failure_reason(m):\n    return 'A' if m else 'B'",
            {("INVALID_ARGUMENT", "A"), ("INVALID_ARGUMENT", "B")},
        ),
    ],
)
def test_reasons_are_read_from_code(source: str, found: set[tuple[str, str]]) -> None:
    assert set(sent.of_source(source, sent.kinds())) == found


def test_a_reason_that_cannot_be_read_is_not_passed_over() -> None:
    with pytest.raises(LookupError, match=r"make_up\(\)"):
        list(sent.of_source("raise NotFound('x', reason=make_up())", sent.kinds()))


def test_fields_are_shown_as_they_are_written() -> None:
    field = pb.FieldDescriptorProto
    message = pb.DescriptorProto(name="M", oneof_decl=[pb.OneofDescriptorProto(name="kind")])
    message.nested_type.add(
        name="BiasEntry",
        options=pb.MessageOptions(map_entry=True),
        field=[
            field(name="key", number=1, type=field.TYPE_UINT32, label=field.LABEL_OPTIONAL),
            field(name="value", number=2, type=field.TYPE_DOUBLE, label=field.LABEL_OPTIONAL),
        ],
    )
    message.field.add(
        name="bias", number=1, type=field.TYPE_MESSAGE, label=field.LABEL_REPEATED, type_name=".p.M.BiasEntry"
    )
    message.field.add(name="many", number=2, type=field.TYPE_MESSAGE, label=field.LABEL_REPEATED, type_name=".p.M")
    message.field.add(name="one", number=3, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL, oneof_index=0)
    message.field.add(
        name="may", number=4, type=field.TYPE_BOOL, label=field.LABEL_OPTIONAL, oneof_index=0, proto3_optional=True
    )
    message.field.add(name="time", number=5, type=field.TYPE_MESSAGE, label=field.LABEL_OPTIONAL, type_name=".google.T")
    file = pb.FileDescriptorProto(name="p/x.proto", package="p", message_type=[message])
    file.source_code_info.location.add(path=[4, 0, 2, 0], leading_comments=" Either a | or\n <b>.\n\n Twice.\n")
    shown = Page([File(file)], {}).write({}, {})
    rows = [line for line in shown.splitlines() if line.startswith("| `")]
    assert rows == [
        "| `bias` | map of uint32 to double | 1 | Either a \\| or &lt;b>.<br>Twice. |",
        "| `many` | repeated [M](#m) | 2 |  |",
        "| `one` | one of *kind*: string | 3 |  |",
        "| `may` | optional bool | 4 |  |",
        "| `time` | `google.T` | 5 |  |",
    ]
