from __future__ import annotations

import pytest
from pydantic import ValidationError

from common.settings import QueueSettings, RedisSettings, unknown_variables, variables_of


def test_settings_come_from_their_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHRELAY_QUEUE_MAX_QUEUED", "7")
    monkeypatch.setenv("TORCHRELAY_REDIS_URL", "unix:///run/server.sock")
    assert QueueSettings().max_queued == 7
    assert RedisSettings().url == "unix:///run/server.sock"


@pytest.mark.parametrize(
    "fields",
    [{"max_queued": 0}, {"worker_lease_ms": 10}, {"default_lifetime_ms": 10_000, "max_lifetime_ms": 9_999}],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        QueueSettings(**fields)


def test_a_client_certificate_needs_its_key() -> None:
    with pytest.raises(ValidationError, match="tls_key_file"):
        RedisSettings(tls_cert_file="client.pem")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "url", ["nonsense://host", "host:6379", "redis://user:secret@host:port/0", "redis://:sec/ret@h"]
)
def test_an_address_that_is_none_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(ValidationError, match="an address begins with redis://, rediss://, unix://") as refusal:
        RedisSettings(url=url)
    (error,) = refusal.value.errors(include_url=False, include_input=False)
    assert "sec" not in error["msg"]


@pytest.mark.parametrize(
    "url", ["redis://h", "rediss://user:p%2Fw@[::1]:6380/2", "unix:///run/valkey.sock?db=1", "redis+sentinel://h/main"]
)
def test_an_address_of_each_kind_is_taken(url: str) -> None:
    assert RedisSettings(url=url).url == url


def test_a_password_is_not_shown() -> None:
    assert "hunter2" not in repr(RedisSettings(password="hunter2"))  # type: ignore[arg-type]


def test_a_misspelt_variable_is_found_with_what_was_meant() -> None:
    environment = {"TORCHRELAY_QUEUE_MAX_QUEUD": "1", "TORCHRELAY_QUEUE_MAX_QUEUED": "1", "HOME": "/root"}
    found = unknown_variables(environment, [QueueSettings, RedisSettings])
    assert [(variable.name, variable.nearest) for variable in found] == [
        ("TORCHRELAY_QUEUE_MAX_QUEUD", "TORCHRELAY_QUEUE_MAX_QUEUED")
    ]


def test_variables_are_named_after_their_fields() -> None:
    assert "TORCHRELAY_REDIS_SOCKET_TIMEOUT_MS" in variables_of(RedisSettings)


def test_upkeep_runs_more_than_twice_in_the_shorter_lease() -> None:
    settings = QueueSettings(worker_lease_ms=1500, gateway_lease_ms=8000)
    assert settings.max_upkeep_pause_s < settings.worker_lease_ms / 1000 / 2
    assert QueueSettings(gateway_lease_ms=400).max_upkeep_pause_s < 0.4 / 2
