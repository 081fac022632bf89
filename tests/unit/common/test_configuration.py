"""`torchrelay config`: what is in force and where it comes from, secrets apart, and every fault by its variable."""

from __future__ import annotations

import importlib
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common import configuration
from common.acl_command import acl
from common.config_command import config
from common.configuration import Problem, Program, Setting, problems, settings_in_force
from common.settings import LogSettings, QueueSettings, RedisSettings
from gateway.configuration import PROGRAM as GATEWAY
from gateway.settings import GatewaySettings
from worker.configuration import PROGRAM as WORKER

PASSWORD = "s3cr3t-pass"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variables of whoever runs the tests, and with the programs as they are once installed."""
    for name in os.environ:
        if name.upper().startswith("TORCHRELAY_"):
            monkeypatch.delenv(name)
    shared = configuration.programs()[:1]
    monkeypatch.setattr(configuration, "programs", lambda: [*shared, GATEWAY, WORKER])


def by_name(*classes: Any) -> dict[str, Setting]:
    return {one.variable: one for one in settings_in_force(classes, os.environ)}


def test_a_setting_says_whether_a_variable_sets_it_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("torchrelay_queue_max_queued", "7")
    monkeypatch.setenv("TORCHRELAY_LOG_LEVEL", "info")  # what it is by default, but somebody has said so
    found = by_name(QueueSettings, LogSettings)
    assert (found["TORCHRELAY_QUEUE_MAX_QUEUED"].value, found["TORCHRELAY_QUEUE_MAX_QUEUED"].is_set) == (7, True)
    assert (found["TORCHRELAY_QUEUE_RETENTION_MS"].value, found["TORCHRELAY_QUEUE_RETENTION_MS"].is_set) == (
        3_600_000,
        False,
    )
    assert (found["TORCHRELAY_LOG_LEVEL"].value, found["TORCHRELAY_LOG_LEVEL"].is_set) == ("INFO", True)
    assert all(one.description for one in found.values())


@pytest.mark.parametrize("is_valid", [True, False])
def test_no_secret_is_shown_whether_the_rest_is_valid_or_not(monkeypatch: pytest.MonkeyPatch, is_valid: bool) -> None:
    monkeypatch.setenv("TORCHRELAY_REDIS_URL", f"redis://worker:{PASSWORD}@queue:6379/0")
    monkeypatch.setenv("TORCHRELAY_REDIS_PASSWORD", PASSWORD)
    monkeypatch.setenv("TORCHRELAY_GATEWAY_ADMIN_REDIS_URL", f"redis+sentinel://:{PASSWORD}@a:1,b:2/main/0")
    if not is_valid:
        monkeypatch.setenv("TORCHRELAY_REDIS_MAX_CONNECTIONS", "none")
    found = by_name(RedisSettings, GatewaySettings)
    assert found["TORCHRELAY_REDIS_URL"].value == "redis://***@queue:6379/0"
    assert found["TORCHRELAY_REDIS_PASSWORD"].value == "***"
    assert found["TORCHRELAY_GATEWAY_ADMIN_REDIS_URL"].value == "redis+sentinel://***@a:1,b:2/main/0"
    assert found["TORCHRELAY_REDIS_SENTINEL_PASSWORD"].value is None
    for command in (("show",), ("show", "--json"), ("check",), ("check", "--json")):
        assert PASSWORD not in CliRunner().invoke(config, command).output


def test_every_setting_of_every_program_is_shown() -> None:
    result = CliRunner().invoke(config, ["show", "--json"])
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    names = {one["variable"] for one in found}
    assert len(names) == len(found)
    assert {
        "TORCHRELAY_REDIS_URL",
        "TORCHRELAY_GATEWAY_ADDRESS",
        "TORCHRELAY_AUTH_METHODS",
        "TORCHRELAY_TRUSTED_PROXIES",
        "TORCHRELAY_WORKER_MODEL",
        "TORCHRELAY_ENGINE_MAX_NUM_SEQS",
        "TORCHRELAY_ENCRYPTION_KEYS_FILE",
    } <= names
    assert {one["source"] for one in found} == {"default"}


def test_only_what_a_variable_sets_is_shown_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CliRunner().invoke(config, ["show", "--changed", "--json"]).stdout == ""
    monkeypatch.setenv("TORCHRELAY_GATEWAY_REFLECTION", "1")
    monkeypatch.setenv("TORCHRELAY_AUTH_METHODS", "jwt,api_key")
    rows = [line.split() for line in CliRunner().invoke(config, ["show", "--changed"]).stdout.splitlines()]
    assert rows[0] == ["VARIABLE", "VALUE", "SOURCE"]
    assert sorted(rows[1:]) == [
        ["TORCHRELAY_AUTH_METHODS", "jwt,api_key", "variable"],
        ["TORCHRELAY_GATEWAY_REFLECTION", "true", "variable"],
    ]


FAULTS: list[tuple[dict[str, str], str, str]] = [
    ({"TORCHRELAY_QUEUE_MAX_QUEUD": "1"}, "TORCHRELAY_QUEUE_MAX_QUEUD is read by", "to TORCHRELAY_QUEUE_MAX_QUEUED"),
    ({"TORCHRELAY_WORKER_MODLE": "x"}, "TORCHRELAY_WORKER_MODLE is read by", "to TORCHRELAY_WORKER_MODEL"),
    ({"TORCHRELAY_PLUGH_XYZZY_0123456789": "x"}, "TORCHRELAY_PLUGH_XYZZY_0123456789 is read by nothing", "unset it"),
    ({"TORCHRELAY_QUEUE_MAX_QUEUED": "many"}, "TORCHRELAY_QUEUE_MAX_QUEUED: Input should be", "Default: 10000"),
    (
        {"TORCHRELAY_ENGINE_BLOCK_SIZE": "0"},
        "TORCHRELAY_ENGINE_BLOCK_SIZE: Input should be",
        "Token slots per KV block.",
    ),
    ({"TORCHRELAY_LOG_LEVEL": "loud"}, "TORCHRELAY_LOG_LEVEL: Input should be 'DEBUG'", "Least that is written."),
    (
        {"TORCHRELAY_QUEUE_DEFAULT_LIFETIME_MS": "9", "TORCHRELAY_QUEUE_MAX_LIFETIME_MS": "8"},
        "TORCHRELAY_QUEUE_*: default_lifetime_ms must be at most max_lifetime_ms",
        "change one of them",
    ),
    ({"TORCHRELAY_GATEWAY_ADDRESS": "0.0.0.0:50051"}, "0.0.0.0:50051 is beyond loopback", "no gateway starts"),
    (
        {"TORCHRELAY_GATEWAY_TLS_CERT_FILE": "/no/such", "TORCHRELAY_GATEWAY_TLS_KEY_FILE": "/no/such"},
        "/no/such",
        "no gateway starts",
    ),
    ({"TORCHRELAY_TRUSTED_PROXIES": "10.0.0.7"}, "TORCHRELAY_AUTH_CERTIFICATE_TENANTS does not say", "no gateway"),
    ({"TORCHRELAY_ENCRYPTION_KEYS_FILE": "/no/such"}, "KEYS_FILE cannot be read", "no process starts"),
]


@pytest.mark.parametrize(("given", "what", "fix"), FAULTS, ids=[next(iter(given)) for given, _, _ in FAULTS])
def test_every_fault_is_one_line_and_one_line_to_mend_it(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], what: str, fix: str
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    (problem,) = problems(configuration.programs(), os.environ)
    assert what in problem.what
    assert fix in problem.fix
    assert "\n" not in problem.what + problem.fix
    plain, as_json = (CliRunner().invoke(config, ["check", *option]) for option in ((), ("--json",)))
    assert (plain.exit_code, as_json.exit_code) == (1, 1)
    assert plain.stdout == f"{problem.what}\n  {problem.fix}\n"
    assert Problem(**json.loads(as_json.stdout)) == problem


def test_what_is_right_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHRELAY_QUEUE_MAX_QUEUED", "9")
    monkeypatch.setenv("TORCHRELAY_ADMIN_KEY", "for the command line")
    result = CliRunner().invoke(config, ["check"])
    assert (result.exit_code, result.stdout) == (0, "2 variables are set, and all are understood\n")
    assert CliRunner().invoke(config, ["check", "--json"]).stdout == ""


def test_a_program_whose_check_fails_beside_others_is_named() -> None:
    def fail() -> None:
        raise ValueError("two things\ndisagree")

    (problem,) = problems([Program("gateway", (QueueSettings,), fail)], {})
    assert (problem.what, problem.variable) == ("two things disagree", "")


def test_the_entry_points_of_the_package_lead_somewhere() -> None:
    """They are seen only where the package was installed since they were written; these come from its source."""
    project = tomllib.loads((Path(acl.__code__.co_filename).parents[1] / "pyproject.toml").read_text())["project"]
    found = {
        group: {name: _load(target) for name, target in points.items()}
        for group, points in project["entry-points"].items()
    }
    assert set(found) == {"torchrelay.commands", "torchrelay.settings", "torchrelay.checks"}
    assert found["torchrelay.settings"] == {"gateway": GATEWAY, "worker": WORKER}
    assert {"config", "doctor"} <= set(found["torchrelay.commands"])
    assert all(callable(checks) for checks in found["torchrelay.checks"].values())


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
