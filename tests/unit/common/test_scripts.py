from __future__ import annotations

import re

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


def test_only_what_adds_work_is_refused_when_memory_is_short() -> None:
    refused = {name for name in scripts.NAMES if "allow-oom" not in scripts.sources()[0][name].splitlines()[0]}
    assert refused == {"enqueue", "retry", "publish"}


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
    job_scripts = [text for name, text in texts.items() if "publish" not in name] + list(libraries.values())
    used = {command.lower() for text in job_scripts for command in re.findall(r"\bcall\('([A-Z]+)'", text)}
    assert len(used) > 30
    for role in (Role.GATEWAY, Role.WORKER):
        allowed = {rule[1:] for rule in rules(role) if rule.startswith("+")}
        assert used <= allowed
