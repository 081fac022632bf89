"""The OpenAI door over a socket: what it takes, answers and refuses, field by field."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from common.grants import Quotas
from tests.builders_http import Answer, HttpDoor
from tests.builders_system import System, gateway_and_worker, until
from torchrelay.v1 import generation_pb2 as pb
from worker.engine.demo import demo_model_dir

MODEL = "smollm2"
CAPITAL = "The capital of France is"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with gateway_and_worker(tmp_path_factory.mktemp("system"), demo_model_dir(), MODEL) as system:
        yield system


@pytest.fixture
async def door(system: System) -> HttpDoor:
    await system.ready(MODEL)
    return HttpDoor(system.gateways[0].openai_address, system.key)


async def complete(door: HttpDoor, **fields: Any) -> Answer:
    body = {"model": MODEL, "prompt": CAPITAL, "max_tokens": 6, "temperature": 0, **fields}
    return await door.post("/v1/completions", body)


async def chat(door: HttpDoor, **fields: Any) -> Answer:
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 12, "temperature": 0, **fields}
    return await door.post("/v1/chat/completions", body)


async def test_a_completion_is_what_grpc_gives(door: HttpDoor, system: System) -> None:
    answer = await complete(door)
    assert answer.status == 200, answer.body
    (choice,) = answer.json["choices"]
    async with system.client() as client:
        generation = await client.generate(CAPITAL, model=MODEL, max_tokens=6, temperature=0.0)
    assert choice == {
        "index": 0,
        "text": generation.outputs[0].text,
        "logprobs": None,
        "finish_reason": "length",
    }
    usage = answer.json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 6)
    assert answer.json["object"] == "text_completion"
    assert answer.json["id"] == f"cmpl-{answer.headers['x-request-id']}"


@pytest.mark.parametrize("prompt", [["a b", "c d e"], [[504, 3575], [282]], [504, 3575, 282]])
async def test_prompts_of_every_shape(door: HttpDoor, prompt: list[Any]) -> None:
    answer = await complete(door, prompt=prompt, n=2, temperature=0.5)
    num_prompts = 1 if isinstance(prompt[0], int) else len(prompt)
    assert [choice["index"] for choice in answer.json["choices"]] == list(range(2 * num_prompts))
    assert answer.json["usage"]["completion_tokens"] == 12 * num_prompts
    streamed = await complete(door, prompt=prompt, n=2, seed=4, temperature=0.5, stream=True)
    whole = await complete(door, prompt=prompt, n=2, seed=4, temperature=0.5)
    texts = [""] * (2 * num_prompts)
    ends = {}
    for event in streamed.events[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            if choice["finish_reason"]:
                ends[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in whole.json["choices"]]
    assert ends == dict.fromkeys(range(2 * num_prompts), "length")
    assert streamed.events[-1] == "[DONE]"


async def test_a_streamed_chat_is_the_whole_one(door: HttpDoor) -> None:
    whole = await chat(door, stop=["zzz"])
    streamed = await chat(door, stream=True, stream_options={"include_usage": True})
    events = streamed.events[:-1]
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1])
    assert text == whole.json["choices"][0]["message"]["content"]
    assert events[-1]["choices"] == []
    counted = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [events[-1]["usage"][name] for name in counted] == [whole.json["usage"][name] for name in counted]
    assert all(event["usage"] is None for event in events[:-1])
    assert {event["id"] for event in events} == {f"chatcmpl-{streamed.headers['x-request-id']}"}


async def test_log_probabilities_in_both_shapes(door: HttpDoor, system: System) -> None:
    async with system.client() as client:
        generation = await client.generate(
            CAPITAL, model=MODEL, max_tokens=4, temperature=0.0, logprobs=True, top_logprobs=2, prompt_logprobs=2
        )
    output = generation.outputs[0]
    answer = await complete(door, logprobs=2, max_tokens=4)
    found = answer.json["choices"][0]["logprobs"]
    assert found["token_logprobs"] == pytest.approx(list(output.logprobs))
    assert "".join(found["tokens"]) == output.text
    assert found["text_offset"] == [len("".join(found["tokens"][:i])) for i in range(4)]
    assert [sorted(best.values()) for best in found["top_logprobs"]] == [
        pytest.approx(sorted(best.logprobs)) for best in output.top_logprobs
    ]
    echoed = await complete(door, logprobs=2, max_tokens=4, echo=True)
    choice = echoed.json["choices"][0]
    assert choice["text"] == CAPITAL + output.text == "".join(choice["logprobs"]["tokens"])
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1:5] == pytest.approx(list(generation.prompt_scores.logprobs))
    streamed = await complete(door, logprobs=2, max_tokens=4, echo=True, stream=True)
    parts = [e["choices"][0]["logprobs"] for e in streamed.events[:-1] if e["choices"][0]["logprobs"]]
    assert [t for part in parts for t in part["tokens"]] == choice["logprobs"]["tokens"]
    assert [t for part in parts for t in part["text_offset"]] == choice["logprobs"]["text_offset"]
    # Scores of the prompt belong to its text: without echo nothing of them is in the answer.
    unechoed = await complete(door, logprobs=2, prompt_logprobs=2, max_tokens=4)
    assert unechoed.json["choices"][0]["logprobs"]["tokens"] == found["tokens"]
    alone = await complete(door, prompt=[504], logprobs=0, max_tokens=2, echo=True)
    streamed = await complete(door, prompt=[504], logprobs=0, max_tokens=2, echo=True, stream=True)
    choice = alone.json["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    parts = [e["choices"][0]["logprobs"] for e in streamed.events[:-1] if e["choices"][0]["logprobs"]]
    assert [t for part in parts for t in part["tokens"]] == choice["logprobs"]["tokens"]
    assert choice["logprobs"]["token_logprobs"][0] is None
    talk = await chat(door, logprobs=True, top_logprobs=3, max_tokens=4)
    content = talk.json["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == talk.json["choices"][0]["message"]["content"]
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == "".join(e["token"] for e in content)
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in content)


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"unit": {"enum": ["c", "f"]}}, "required": ["unit"]},
    },
}


async def test_tools_are_called_and_answered(door: HttpDoor) -> None:
    fields = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 100}
    answer = await chat(door, **fields)
    (choice,) = answer.json["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"])["unit"] in ("c", "f")
    streamed = await chat(door, stream=True, **fields)
    pieces = [p for e in streamed.events[:-1] for p in e["choices"][0]["delta"].get("tool_calls", ())]
    assert (pieces[0]["type"], pieces[0]["function"]["name"]) == ("function", "get_weather")
    assert "".join(p["function"]["arguments"] for p in pieces) == call["function"]["arguments"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "7 degrees"}
    again = await chat(door, messages=[*QUESTION, choice["message"], result], tools=[WEATHER], tool_choice="none")
    assert again.status == 200, again.body
    assert again.json["choices"][0]["message"]["content"]


async def test_the_answer_matches_a_schema(door: HttpDoor) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    wanted = {**schema, "additionalProperties": False}
    answer = await chat(
        door,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": wanted, "strict": True}},
    )
    assert json.loads(answer.json["choices"][0]["message"]["content"])["city"] in ("Paris", "Rome")
    assert answer.json["choices"][0]["finish_reason"] == "stop"


async def test_models_are_listed(door: HttpDoor) -> None:
    listed = (await door.get("/v1/models")).json
    assert [model["id"] for model in listed["data"]] == [MODEL]
    assert (await door.get(f"/v1/models/{MODEL}")).json["id"] == MODEL


BAD = {"model": MODEL, "messages": QUESTION}
UNKEEPABLE = {
    "type": "function",
    "function": {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {"a": {"not": {}}}}},
}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("chat/completions", b"{", 400, None, "malformed_message"),
        ("chat/completions", b"[]", 400, None, "malformed_message"),
        ("chat/completions", b'{"a":' * 5000, 400, None, "malformed_message"),
        ("chat/completions", {"messages": QUESTION}, 400, "model", "field_required"),
        ("chat/completions", {**BAD, "model": "other"}, 404, "model", "model_not_found"),
        ("chat/completions", {**BAD, "temperature": 3}, 400, "temperature", "field_out_of_range"),
        ("chat/completions", {**BAD, "temperature": "warm"}, 400, "temperature", "field_invalid"),
        ("chat/completions", {**BAD, "n": 0}, 400, "n", "field_out_of_range"),
        ("chat/completions", {**BAD, "n": 99}, 400, "n", "field_out_of_range"),
        ("chat/completions", {**BAD, "top_logprobs": 2}, 400, "top_logprobs", "field_conflict"),
        ("chat/completions", {**BAD, "functions": []}, 400, "functions", "unknown_field"),
        ("chat/completions", {**BAD, "store": True}, 400, "store", "field_invalid"),
        ("chat/completions", {**BAD, "logit_bias": {"x": 1}}, 400, "logit_bias", "field_invalid"),
        ("chat/completions", {**BAD, "messages": []}, 400, "messages", "field_required"),
        (
            "chat/completions",
            {**BAD, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages[0].content[0]",
            "unsupported_part",
        ),
        (
            "chat/completions",
            {**BAD, "messages": [{"role": "cook", "content": ""}]},
            400,
            "messages[0].role",
            "field_invalid",
        ),
        (
            "chat/completions",
            {**BAD, "max_tokens": 1, "max_completion_tokens": 2},
            400,
            "max_completion_tokens",
            "field_conflict",
        ),
        ("chat/completions", {**BAD, "max_tokens": 10**7}, 400, "max_tokens", "context_length_exceeded"),
        ("chat/completions", {**BAD, "tool_choice": "required"}, 400, "tool_choice", "field_conflict"),
        (
            "chat/completions",
            {**BAD, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}},
            400,
            "response_format",
            "grammar_invalid",
        ),
        ("chat/completions", {**BAD, "tools": [UNKEEPABLE]}, 400, "tools[0].function.parameters", "grammar_invalid"),
        (
            "chat/completions",
            {**BAD, "tools": [WEATHER], "forced_eos_token_id": 2},
            400,
            "forced_eos_token_id",
            "field_conflict",
        ),
        ("chat/completions", {**BAD, "service_tier": "flex"}, 200, None, None),
        ("chat/completions", {**BAD, "service_tier": "priority"}, 403, None, "priority_not_allowed"),
        ("chat/completions", {**BAD, "min_p": 2}, 400, "min_p", "field_out_of_range"),
        ("chat/completions", {**BAD, "min_p": "x"}, 400, "min_p", "field_invalid"),
        ("completions", {"model": MODEL}, 400, "prompt", "field_required"),
        ("completions", {"model": MODEL, "prompt": []}, 400, "prompt", "field_required"),
        ("completions", {"model": MODEL, "prompt": ["a", 1]}, 400, "prompt", "field_invalid"),
        ("completions", {"model": MODEL, "prompt": [10**6]}, 400, "prompt", "field_out_of_range"),
        ("completions", {"model": MODEL, "prompt": ["a"] * 129}, 400, "prompt", "field_out_of_range"),
        ("completions", {"model": MODEL, "prompt": "a", "suffix": "b"}, 400, "suffix", "unknown_field"),
        ("completions", {"model": MODEL, "prompt": "a", "best_of": 1, "n": 2}, 400, "best_of", "field_out_of_range"),
        ("embeddings", {"model": MODEL, "input": "a"}, 400, "max_tokens", "unknown_field"),
        ("images", {"model": MODEL}, 404, None, "not_found"),
    ],
)
async def test_what_is_bad_is_refused_by_param_and_code(
    door: HttpDoor, path: str, body: Any, status: int, param: str | None, code: str | None
) -> None:
    answer = await door.post(f"/v1/{path}", body if isinstance(body, bytes) else {"max_tokens": 2, **body})
    assert answer.status == status, answer.body
    if status != 200:
        error = answer.json["error"]
        assert (error["param"], error["code"]) == (param, code), error


async def test_keys_rights_and_limits_are_the_same_as_by_grpc(door: HttpDoor, system: System) -> None:
    nobody = await HttpDoor(door.address).post("/v1/completions", {})
    assert (nobody.status, nobody.json["error"]["code"]) == (401, "invalid_api_key")
    wrong = await HttpDoor(door.address, "tr_wrong_key").get("/v1/models")
    assert (wrong.status, wrong.json["error"]["type"]) == (401, "authentication_error")
    method = await asyncio.to_thread(door.call, "GET", "/v1/completions")
    assert (method.status, method.json["error"]["code"]) == (405, "method_not_allowed")
    long = await door.post("/v1/completions", b"x" * (5 << 20))
    assert (long.status, long.json["error"]["code"]) == (413, "request_too_large")
    poor = HttpDoor(door.address, system.create_key("poor", quotas=Quotas(requests_per_minute=1)))
    assert (await complete(poor, max_tokens=1)).status == 200
    limited = await complete(poor, max_tokens=1)
    assert (limited.status, limited.json["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(limited.headers["retry-after"]) <= 60


async def test_a_repeat_with_a_key_is_the_same_completion(door: HttpDoor) -> None:
    body = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 4, "temperature": 1.5}
    first, second = [await door.post("/v1/completions", body, {"Idempotency-Key": "twice"}) for _ in range(2)]
    assert first.json["choices"] == second.json["choices"]
    assert first.json["id"] == second.json["id"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_ends_its_generation(door: HttpDoor, system: System, stream: bool) -> None:
    wish = {"model": MODEL, "prompt": "1, 2, 3,", "max_tokens": 1000, "ignore_eos": True, "stream": stream}
    body = json.dumps(wish).encode()
    host, port = door.address.split(":")
    before = {worker.worker_id: worker.generated_tokens for worker in await system.fleet()}
    connection = socket.create_connection((host, int(port)))
    head = f"host: x\r\nauthorization: Bearer {door.key}\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + body)

    async def is_decoding() -> bool:
        return any(w.generated_tokens > before.get(w.worker_id, 0) + 3 for w in await system.fleet())

    await until(is_decoding, what="the first tokens")
    connection.close()

    async def is_idle() -> bool:
        return all(w.num_running == w.num_waiting == 0 for w in await system.fleet())

    await until(is_idle, 20, "a worker without work")
    assert sum(w.generated_tokens - before.get(w.worker_id, 0) for w in await system.fleet()) < 1000


async def test_an_unset_temperature_samples(door: HttpDoor, system: System) -> None:
    texts = set()
    for _ in range(3):
        answer = await door.post("/v1/completions", {"model": MODEL, "prompt": CAPITAL, "max_tokens": 12})
        texts.add(answer.json["choices"][0]["text"])
    assert len(texts) > 1
    async with system.client() as client:
        generation = await client.get(answer.headers["x-request-id"])
    assert generation.config.temperature > 0
    assert generation.state == pb.GENERATION_STATE_FINISHED
