"""The README's examples, as they stand there, against a running system."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import time
from collections.abc import Mapping

import pytest

from tests.builders_compat import MODEL, RunningCaller, command_of, readme_examples, run
from tests.builders_link import Link
from tests.builders_system import START_S, System

EXAMPLES = {name: code for name, code in readme_examples().items() if name != "go"}  # see test_go_example.py
# Resuming by hand is the caller's own work in these.
RESUMING = ("python stubs", "node")


def with_long_answer(code: str) -> str:
    """Ask for some seconds of text in which a missing or repeated token shows: the model counts on."""
    code, num_prompts = re.subn("The capital of France is", "1, 2, 3, 4, 5, 6,", code)
    code, num_limits = re.subn(r"(max_tokens=|maxTokens: )\d+", r"\g<1>300", code)
    assert (num_prompts, num_limits) == (1, 1)
    return code


@pytest.fixture(scope="module")
def undisturbed(env: Mapping[str, str]) -> str:
    """What every example that counts on prints if nothing is killed; greedy, so always the same."""
    name = RESUMING[0]
    return run(command_of(name, with_long_answer(EXAMPLES[name])), env).stdout


def test_every_example_of_a_call_is_tested() -> None:
    assert set(EXAMPLES) == {"python client", "python stubs", "node", "shell"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_answers(name: str, env: Mapping[str, str]) -> None:
    assert "Paris" in run(command_of(name, EXAMPLES[name]), env).stdout


def wait_for_port(address: str) -> None:
    """Wait until somebody listens there. Raises OSError."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection((host, int(port))).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.05)


@pytest.mark.parametrize("name", RESUMING)
def test_example_goes_on_when_the_gateway_is_killed_again_and_again(
    name: str, system: System, env: Mapping[str, str], undisturbed: str
) -> None:
    gateway, worker = system.gateways[0], system.workers[0]
    asyncio.run(system.ready(MODEL))
    with RunningCaller(command_of(name, with_long_answer(EXAMPLES[name])), env) as caller:
        for num_chars in (20, 90, 160):
            caller.wait_for_text(num_chars)
            worker.signal(signal.SIGSTOP)  # or it would have said everything by the time that the gateway is back
            gateway.kill()
            before = caller.text
            assert caller.is_running
            gateway.start()
            wait_for_port(gateway.address)
            worker.signal(signal.SIGCONT)
        text = caller.wait()
    assert len(before) < len(undisturbed) - 40, "the last kill came in the middle of the stream"
    assert text == undisturbed


def wait_for_connection(link: Link, number: int) -> None:
    """Wait until there has been one more than so many."""
    end = time.monotonic() + START_S
    while link.num_connections <= number:
        assert time.monotonic() < end, "the caller does not connect again"
        time.sleep(0.01)


@pytest.mark.parametrize("name", RESUMING)
def test_example_goes_on_when_its_connections_are_reset(
    name: str, system: System, env: Mapping[str, str], undisturbed: str
) -> None:
    worker = system.workers[0]
    asyncio.run(system.ready(MODEL))
    with Link(system.gateways[0].address) as link:
        through = {**env, "TORCHRELAY_ADDRESS": link.address}
        with RunningCaller(command_of(name, with_long_answer(EXAMPLES[name])), through) as caller:
            for num_chars in range(20, 200, 20):
                caller.wait_for_text(num_chars)
                worker.signal(signal.SIGSTOP)  # or a fast one would have said everything while the caller connects
                num_connections = link.num_connections
                link.reset()
                wait_for_connection(link, num_connections)
                worker.signal(signal.SIGCONT)
            text = caller.wait()
    assert text == undisturbed
