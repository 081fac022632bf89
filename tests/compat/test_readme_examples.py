"""The README's examples, as they stand there, against a running system."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from tests.builders_compat import RunningCaller, command_of, readme_examples, run
from tests.builders_system import System

EXAMPLES = readme_examples()
# Resuming by hand is the caller's own work in these.
RESUMING = ("python stubs", "node")


def with_long_answer(code: str) -> str:
    """Ask for some seconds of text in which a missing or repeated token shows: the model counts on."""
    code, num_prompts = re.subn("The capital of France is", "1, 2, 3, 4, 5, 6,", code)
    code, num_limits = re.subn(r"(max_tokens=|maxTokens: )\d+", r"\g<1>120", code)
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


@pytest.mark.parametrize("name", RESUMING)
def test_example_goes_on_when_the_gateway_is_killed(
    name: str, system: System, env: Mapping[str, str], undisturbed: str
) -> None:
    gateway = system.gateways[0]
    with RunningCaller(command_of(name, with_long_answer(EXAMPLES[name])), env) as caller:
        caller.wait_for_text(40)
        gateway.kill()
        before = caller.text
        assert caller.is_running
        gateway.start()
        text = caller.wait()
    assert len(before) < len(undisturbed) - 40, "the kill came in the middle of the stream"
    assert text == undisturbed
