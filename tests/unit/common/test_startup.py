"""A wrong setting ends the process by its variable's name; one that nothing reads is named with what was meant."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from common.settings import QueueSettings, RedisSettings
from common.startup import CANNOT_START, read_settings
from gateway.settings import GatewaySettings


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in os.environ:
        if name.upper().startswith("TORCHRELAY_"):
            monkeypatch.delenv(name)
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_good_settings_are_returned_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHRELAY_QUEUE_MAX_QUEUED", "7")
    assert read_settings(QueueSettings).max_queued == 7
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("TORCHRELAY_REDIS_ULR", "TORCHRELAY_REDIS_URL"),
        ("TORCHRELAY_QUEUE_MAX_QUEUD", "TORCHRELAY_QUEUE_MAX_QUEUED"),
        ("TORCHRELAY_LOG_LEVLE", "TORCHRELAY_LOG_LEVEL"),
        ("TORCHRELAY_GATEWAY_ADRESS", "TORCHRELAY_GATEWAY_ADDRESS"),
        ("torchrelay_gateway_max_call", "TORCHRELAY_GATEWAY_MAX_CALLS"),
    ],
)
def test_a_misspelt_variable_is_named_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, nearest: str
) -> None:
    monkeypatch.setenv(name, "1")
    read_settings(GatewaySettings, GatewaySettings)
    (line,) = lines(capsys)
    assert (line["event"], line["variable"], line["did_you_mean"]) == ("settings.unknown", name, nearest)


def test_variables_of_other_roles_and_of_the_command_line_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("TORCHRELAY_WORKER_MODEL", "TORCHRELAY_ENGINE_BLOCK_SIZE", "TORCHRELAY_API_KEY", "TORCHRELAY_ADDRESS"):
        monkeypatch.setenv(name, "1")
    read_settings(GatewaySettings, GatewaySettings)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TORCHRELAY_REDIS_MAX_CONNECTIONS", "0"),
        ("TORCHRELAY_QUEUE_MAX_QUEUED", "many"),
        ("TORCHRELAY_LOG_FORMAT", "xml"),
        ("TORCHRELAY_LOG_LEVEL", "loud"),
        ("TORCHRELAY_GATEWAY_MAX_OUTPUTS", "0"),
    ],
)
def test_a_wrong_value_ends_the_process_by_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    def read() -> tuple[object, ...]:
        return GatewaySettings(), RedisSettings(), QueueSettings()

    with pytest.raises(SystemExit) as ended:
        read_settings(read, GatewaySettings)
    assert ended.value.code == CANNOT_START
    shown = capsys.readouterr().err
    assert shown.startswith(f"{name}: ")
    assert len(shown.splitlines()) == 1


def test_every_wrong_value_of_a_class_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHRELAY_REDIS_PASSWORD", "hunter2")
    monkeypatch.setenv("TORCHRELAY_REDIS_MAX_CONNECTIONS", "hunter2")
    monkeypatch.setenv("TORCHRELAY_REDIS_RETRY_CAP_MS", "-1")
    with pytest.raises(SystemExit):
        read_settings(RedisSettings)
    shown = capsys.readouterr().err
    assert [line.partition(":")[0] for line in shown.splitlines()] == [
        "TORCHRELAY_REDIS_MAX_CONNECTIONS",
        "TORCHRELAY_REDIS_RETRY_CAP_MS",
    ]
    assert "hunter2" not in shown


def test_values_that_contradict_each_other_name_their_group(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHRELAY_REDIS_TLS_CERT_FILE", "client.pem")
    with pytest.raises(SystemExit):
        read_settings(RedisSettings)
    shown = capsys.readouterr().err
    assert shown.startswith("TORCHRELAY_REDIS_*: ")
    assert "belong together" in shown


def test_what_a_role_refuses_itself_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    def read() -> None:
        raise ValueError("plaintext is not allowed there")

    with pytest.raises(SystemExit) as ended:
        read_settings(read)
    assert ended.value.code == CANNOT_START
    assert capsys.readouterr().err == "plaintext is not allowed there\n"


def test_the_level_of_the_log_may_be_in_lower_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHRELAY_LOG_LEVEL", "error")
    monkeypatch.setenv("TORCHRELAY_REDIS_ULR", "1")
    read_settings(RedisSettings)
    assert capsys.readouterr().err == ""


def test_what_a_process_has_loaded_is_looked_at_by_no_later_collection() -> None:
    """In a process of its own: nothing thaws what is frozen but for all at once."""
    program = (
        "import gc; from common.startup import settle_heap; loaded = [[i] for i in range(1000)]; settle_heap();"
        "assert gc.get_freeze_count() > 1000; assert not any(one is loaded for one in gc.get_objects());"
        "made = [[i] for i in range(1000)]; assert any(one is made for one in gc.get_objects())"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_and_one_that_comes_when_all_is_done_does_no_harm(number: signal.Signals) -> None:
    code = f"""
import asyncio, os
from common.startup import ignore_signals, stop_at_signals

class Loop(asyncio.SelectorEventLoop):
    def close(self):
        super().close()
        os.kill(os.getpid(), {number})

async def main():
    stop = asyncio.Event()
    stop_at_signals(stop)
    asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), {number})
    await asyncio.wait_for(stop.wait(), 20)
    print("stopped")

with asyncio.Runner(loop_factory=Loop) as runner:
    runner.run(main())
ignore_signals()
os.kill(os.getpid(), {number})
print("ended")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout.split()) == (0, ["stopped", "ended"]), ended.stderr
