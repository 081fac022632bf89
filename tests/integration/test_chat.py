"""Chats over gRPC with the real small model: tools, reasoning, constraints, takeovers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from transformers import AutoTokenizer

from tests.builders_calls import Outcome, refused
from tests.builders_system import System, gateway_and_worker
from torchrelay.client import make_chat
from torchrelay.v1 import generation_pb2 as pb
from worker.engine.demo import demo_model_dir

MODEL = "smollm2"
WEATHER = {
    "name": "get_weather",
    "description": "Tells the weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
    },
}
SUM = {
    "name": "add",
    "description": "Adds two whole numbers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 999}, "b": {"enum": [1, 2, 3]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
QUESTION = [{"role": "user", "content": "What is the weather in Oslo?"}]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with gateway_and_worker(tmp_path_factory.mktemp("system"), demo_model_dir(), MODEL) as system:
        yield system


async def ask(system: System, prompt: pb.GenerationInput, **options: Any) -> Outcome:
    async with system.client() as client:
        return await Outcome(client.stream(prompt, model=MODEL, **{"max_tokens": 200, **options})).read()


def called(outcome: Outcome, index: int = 0) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in outcome.outputs[index].tool_calls]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_call_that_must_be_is_made_and_valid(system: System, temperature: float) -> None:
    await system.ready(MODEL)
    outcome = await ask(
        system,
        make_chat(QUESTION, tools=[WEATHER, SUM], tool_choice="required", parallel_tool_calls=False),
        temperature=temperature,
        seed=3,
        num_outputs=3,
    )
    for index, output in enumerate(outcome.outputs):
        ((name, arguments),) = called(outcome, index)
        schema = {"get_weather": WEATHER, "add": SUM}[name]["parameters"]
        jsonschema.validate(arguments, schema)
        assert (output.text, output.finish_reason) == ("", pb.FINISH_REASON_TOOL_CALLS)
    async with system.client() as client:
        whole = await client.get(outcome.generation_id)
    for index, stored in enumerate(whole.outputs):
        assert [(c.id, c.name, c.arguments) for c in stored.tool_calls] == [
            (c.id, c.name, c.arguments) for c in outcome.outputs[index].tool_calls
        ]
        assert stored.tool_calls[0].id.isalnum()


async def test_a_named_tool_is_called_and_several_calls_may_be(system: System) -> None:
    await system.ready(MODEL)
    outcome = await ask(system, make_chat(QUESTION, tools=[WEATHER, SUM], tool_choice="add"), seed=1, temperature=1.0)
    assert {name for name, _ in called(outcome)} == {"add"}
    if outcome.output.finish_reason == pb.FINISH_REASON_TOOL_CALLS:
        for _, arguments in called(outcome):
            jsonschema.validate(arguments, SUM["parameters"])


async def test_the_results_of_calls_are_answered(system: System) -> None:
    await system.ready(MODEL)
    first = await ask(system, make_chat(QUESTION, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False))
    (call,) = first.output.tool_calls
    talk = [
        *QUESTION,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": call.id, "name": call.name, "arguments": call.arguments}],
        },
        {"role": "tool", "content": "Rain, 7 degrees", "tool_call_id": call.id, "name": call.name},
    ]
    second = await ask(system, make_chat(talk, tools=[WEATHER], tool_choice="none"), max_tokens=40)
    assert second.output.text
    assert second.output.tool_calls == []


async def test_a_conversation_s_prefix_is_cached(system: System) -> None:
    await system.ready(MODEL)
    talk = [{"role": "user", "content": "Tell me about the history of the city of Oslo in some detail, please."}]
    first = await ask(system, make_chat(talk), max_tokens=20)
    more = [*talk, {"role": "assistant", "content": first.output.text}, {"role": "user", "content": "And Bergen?"}]
    second = await ask(system, make_chat(more), max_tokens=5)
    assert first.finished is not None
    assert second.finished is not None
    assert second.finished.usage.cached_prompt_tokens >= first.finished.usage.prompt_tokens // 16 * 16


async def test_an_answer_may_be_continued(system: System) -> None:
    await system.ready(MODEL)
    talk = [*QUESTION, {"role": "assistant", "content": "The weather in Oslo is"}]
    ids = AutoTokenizer.from_pretrained(demo_model_dir()).apply_chat_template(
        talk, continue_final_message=True, tokenize=True, return_dict=False
    )
    outcome = await ask(system, make_chat(talk, continue_last_message=True), max_tokens=8, temperature=0.0)
    expected = await ask(system, pb.GenerationInput(token_ids=pb.TokenIds(ids=ids)), max_tokens=8, temperature=0.0)
    assert outcome.token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"tools": [WEATHER, WEATHER]}, "input.chat.tools", "FIELD_INVALID"),
        ({"tool_choice": "required"}, "input.chat.tool_choice", "FIELD_CONFLICT"),
        ({"template_arguments": {"messages": 1}}, "input.chat.template_arguments", "FIELD_INVALID"),
        (
            {
                "tools": [
                    {**WEATHER, "strict": True, "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
                ]
            },
            "input.chat.tools[0].parameters",
            "GRAMMAR_INVALID",
        ),
    ],
)
async def test_what_cannot_be_done_is_refused(system: System, fields: dict[str, Any], field: str, reason: str) -> None:
    await system.ready(MODEL)
    with refused() as refusal:
        await ask(system, make_chat(QUESTION, **fields))
    assert (refusal.fields, refusal.reason) == ([field], reason)
