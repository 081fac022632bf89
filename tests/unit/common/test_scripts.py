from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from common import scripts
from common.acl import Role, rules
from common.scripts import assemble, load


@pytest.mark.parametrize("name", scripts.NAMES)
def test_every_script_says_what_it_takes_and_gives_and_bears_the_schema_version(name: str) -> None:
    source = scripts.sources()[0][name]
    assert "-- ARGV" in source
    assert "-- Reply" in source
    assert "local SCHEMA = '1'" in load(name).text


def test_marks_that_a_script_names_are_read_with_the_schema_version() -> None:
    libraries = scripts.sources()[1]
    assert "local MARKS = { 'gap', 'share:1' }\n" in assemble("x", "#!lua\n--@marks gap share:1\n", libraries).text
    for name in scripts.NAMES:
        assert load(name).text.count("'HMGET', KEYS[1], 'schema', unpack(MARKS)") <= 1
        assert load(name).text.count("local MARKS = {") == 1


def test_only_what_adds_work_is_refused_when_memory_is_short() -> None:
    refused = {name for name in scripts.NAMES if "allow-oom" not in scripts.sources()[0][name].splitlines()[0]}
    assert refused == {"enqueue", "retry", "publish", "quota_reserve", "batch_append", "batch_start"}


# What Lua and the server define. A function of Lua that no script uses yet is not listed: that would hide a slip.
BUILTINS = frozenset({"ipairs", "pairs", "tonumber", "unpack"})
LIBRARIES = frozenset({"cmsgpack", "math", "redis", "string", "table"})
KEYWORDS = frozenset({"and", "elseif", "function", "if", "in", "not", "or", "return", "until", "while"})
NOT_CODE = re.compile(r"--[^\n]*|'(?:\\.|[^'\\\n])*'|\"(?:\\.|[^\"\\\n])*\"")
DEFINED = re.compile(
    r"\blocal\s+(?!function\b)(\w+(?:\s*,\s*\w+)*)|\bfunction\s*(\w*)\s*\(([\w\s,]*)\)|\bfor\s+([\w\s,]+?)\s+(?:in\b|=)"
)
CALLED = re.compile(r"(?<![\w.:])(\w+)((?:[.:]\w+)*)\s*\(")


def unknown_calls(text: str) -> list[str]:
    """Functions that a Lua text calls before, or without, a local definition of theirs: the server finds them only when
    it gets there. Blocks are not told apart: a name that is local to an earlier one counts as defined."""
    code = NOT_CODE.sub(lambda part: "''" if part[0][0] != "-" else "", text)
    defined_at: dict[str, int] = {}
    for found in DEFINED.finditer(code):
        for name in re.findall(r"\w+", ",".join(filter(None, found.groups()))):
            defined_at.setdefault(name, found.start())
    return [
        name + path
        for name, path, at in ((found[1], found[2], found.start()) for found in CALLED.finditer(code))
        if name not in (LIBRARIES if path else BUILTINS | KEYWORDS) and defined_at.get(name, at) >= at
    ]


@pytest.mark.parametrize("name", scripts.NAMES)
def test_a_script_calls_only_what_it_defines(name: str) -> None:
    assert unknown_calls(load(name).text) == []


@pytest.mark.parametrize(
    ("planted", "unknown"),
    [
        ("local wrong = check_schema()", ["check_schema"]),
        ("if ready(load('x')) then return 1 end", ["ready"]),
        ("return int(soon()) -- later()", ["soon"]),
        ("local function two() return 2 end\nreturn two()", []),
        ("local a = one()\nlocal function one() return 1 end", ["one"]),
        ("call('SET', 'f(x)', strings.rep('(', 2))", ["strings.rep"]),
        ("for _, act in ipairs({ int }) do act(1) end", []),
    ],
)
def test_a_call_of_what_no_script_defines_is_found(planted: str, unknown: list[str]) -> None:
    _, libraries = scripts.sources()
    source = f"#!lua\n--@include base\n--@include jobs\n{planted}\n"
    assert unknown_calls(assemble("planted", source, libraries).text) == unknown


LIBRARY = """\
-- Is used() by what is used. Says 'unused()'.
local limit = most()

local function most()
  return 1
end

local function deep()

  return 'end'
end

local function used()
  return deep() -- not unused()
end

local function loop()
  return loop()
end

local function unused()
  return used()
end

local function brief() return 3 end
local function after()
  return 4
end
"""


def test_a_script_holds_the_functions_that_it_uses() -> None:
    text = assemble("x", "#!lua\n--@include one\nlocal n = used() -- loop()\n\nreturn n\n", {"one": LIBRARY}).text
    assert re.findall(r"function (\w+)", text) == ["most", "deep", "used", "brief"]
    assert "local limit = most()\n" in text
    assert text.endswith("local n = used() -- loop()\n\nreturn n\n")


@pytest.mark.parametrize("name", scripts.NAMES)
def test_no_script_defines_what_it_does_not_use(name: str) -> None:
    code = NOT_CODE.sub("", load(name).text)
    for function in re.findall(r"^local function (\w+)", code, re.MULTILINE):
        assert len(re.findall(rf"\b{function}\b", code)) > 1


def test_another_schema_gives_another_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.keys.SCHEMA_VERSION", 2)
    assert assemble("claim", *_source("claim")).sha1 != load("claim").sha1


def _source(name: str) -> tuple[str, dict[str, str]]:
    texts, libraries = scripts.sources()
    return texts[name], libraries


def test_a_library_that_does_not_exist_and_a_missing_shebang_are_errors() -> None:
    with pytest.raises(KeyError):
        assemble("x", "#!lua\n--@include nothing\n", {})
    with pytest.raises(ValueError, match="#!lua"):
        assemble("x", "return 1\n", {})


def test_the_commands_inside_the_scripts_are_in_the_roles_that_run_them() -> None:
    texts, libraries = scripts.sources()
    job_scripts = [text for name, text in texts.items() if not re.match(r"(un)?publish|quota|batch", name)]
    job_scripts += [text for name, text in libraries.items() if name != "batches"]
    used = _commands(job_scripts)
    assert len(used) > 30
    for role in (Role.GATEWAY, Role.WORKER):
        assert used <= _allowed(role)
    of_tenants = [text for name, text in texts.items() if name.startswith(("quota", "batch"))]
    assert _commands([*of_tenants, libraries["batches"]]) <= _allowed(Role.GATEWAY)


def _commands(texts: Iterable[str]) -> set[str]:
    return {command.lower() for text in texts for command in re.findall(r"\bcall\('([A-Z]+)'", text)}


def _allowed(role: Role) -> set[str]:
    return {rule[1:] for rule in rules(role) if rule.startswith("+")}
