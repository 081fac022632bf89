"""The unmodified `openai` client against the OpenAI door, from an environment of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from common.grants import Quotas
from tests.builders_calls import ended
from tests.builders_compat import COMPAT, MODEL, openai_python, run
from tests.builders_system import System
from torchrelay.v1 import generation_pb2 as pb


@pytest.fixture(scope="module")
def results(system: System, env: Mapping[str, str]) -> dict[str, Any]:
    """What all calls came to; they are made by one process, one after the other."""
    poor = system.create_key("poor", quotas=Quotas(requests_per_minute=1))
    # Nothing of our environment but what the script reads.
    own = {name: env[name] for name in ("PATH", "TORCHRELAY_OPENAI_ADDRESS", "TORCHRELAY_API_KEY", "TORCHRELAY_MODEL")}
    done = run([openai_python(), "-I", COMPAT / "openai_client.py"], {**own, "POOR_KEY": poor})
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_completions(results: Mapping[str, Any]) -> None:
    assert results["models"] == [MODEL]
    assert results["completion"].startswith(" Paris")
    assert results["streamed_completion"] == {
        "text": results["completion"],
        "finish_reason": ["length"],
        "completion_tokens": 8,
    }
    assert results["prompts"] == [0, 1, 2, 3]
    assert results["stop"] == ["stop"]
    assert results["seed"] == 1
    assert results["echo"] == "The capital of France is" + results["completion"]
    assert results["extension"] == 8


def test_chats(results: Mapping[str, Any]) -> None:
    assert "Paris" in results["chat"]
    assert results["n"] == [0, 1, 2]
    streamed = results["streamed_chat"]
    assert streamed["text"] == results["chat"]
    assert {"chunk", "content.delta", "content.done"} <= set(streamed["kinds"])


def test_tools(results: Mapping[str, Any]) -> None:
    found = results["tools"]
    assert (found["finish_reason"], found["name"]) == ("tool_calls", "get_weather")
    assert found["arguments"].keys() == {"city", "unit"}
    assert found["streamed"] == found["arguments"]
    assert found["answer"] in ("stop", "length", "tool_calls")


def test_a_schema_is_kept_to(results: Mapping[str, Any]) -> None:
    found = results["json_schema"]
    assert found["finish_reason"] == "stop"
    assert found["value"]["city"] in ("Paris", "Rome")
    assert isinstance(found["value"]["sure"], bool)


def test_log_probabilities(results: Mapping[str, Any]) -> None:
    found = results["logprobs"]
    assert set(found["chat"]) == {2}
    assert all(found["same"]), "greedy takes the most probable"
    assert found["completion"] == [8, 8, 8, 8]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no key", ["AuthenticationError", 401, None, "invalid_api_key", None]),
        ("no model", ["NotFoundError", 404, "model", "model_not_found", None]),
        ("bad value", ["BadRequestError", 400, "temperature", "field_out_of_range", None]),
        ("unknown", ["BadRequestError", 400, "suffix", "unknown_field", None]),
    ],
)
def test_errors_are_the_client_s_own(results: Mapping[str, Any], name: str, expected: list[Any]) -> None:
    assert results[name] == expected


def test_a_limit_says_when_to_come_back(results: Mapping[str, Any]) -> None:
    *error, retry_after = results["limited"]
    assert error == ["RateLimitError", 429, None, "rate_limit_exceeded"]
    assert 1 <= int(retry_after) <= 60


async def test_a_broken_stream_ends_its_generation(results: Mapping[str, Any], system: System) -> None:
    async with system.client() as client:
        assert (await ended(client, results["cancelled"])).state == pb.GENERATION_STATE_CANCELLED
