"""A client of the OpenAI door that lost its connection repeats the call by its idempotency key, and gets it all.

And what no log could hold is not begun.
"""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from common.grants import Caps
from tests.builders_batches import num_generations
from tests.builders_calls import ended, refused
from tests.builders_http import HttpDoor
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"
MAX_TOKENS = 700
LOG_BYTES = 256 << 10


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = write_tiny_model(
        tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=1 << 13, eos_token_id=None
    )
    with running_system(tmp_path_factory.mktemp("system"), TORCHRELAY_QUEUE_MAX_LOG_BYTES=str(LOG_BYTES)) as system:
        system.add_gateway()
        system.add_worker(folder, MODEL)
        asyncio.run(system.ready(MODEL))
        yield system


def door_of(system: System, key: str = "") -> HttpDoor:
    return HttpDoor(system.gateways[0].openai_address, key or system.key)


def wish(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "abc", "max_tokens": MAX_TOKENS, **fields}


def begin_and_leave(door: HttpDoor, body: dict[str, Any], key: str) -> str:
    """Stream up to the first event, and close the connection; return the generation's id."""
    connection = http.client.HTTPConnection(door.address, timeout=60)
    headers = {"authorization": f"Bearer {door.key}", "idempotency-key": key}
    connection.request("POST", "/v1/completions", json.dumps({**body, "stream": True}), headers)
    response = connection.getresponse()
    assert response.status == 200
    assert response.readline()
    generation_id: str = response.headers["x-request-id"]
    response.close()
    connection.close()
    return generation_id


async def end_of(system: System, generation_id: str, key: str | None = None) -> int:
    """Wait until a generation is over, and return how."""
    async with system.client(key=key) as client:
        return (await ended(client, generation_id)).state


async def test_a_repeat_after_a_lost_connection_gets_the_whole_answer(system: System) -> None:
    door = door_of(system)
    generation_id = await asyncio.to_thread(begin_and_leave, door, wish(), "k1")
    assert await end_of(system, generation_id) == pb.GENERATION_STATE_FINISHED
    again = await door.post("/v1/completions", wish(), {"Idempotency-Key": "k1"})
    assert again.status == 200, again.body
    assert again.headers["x-request-id"] == generation_id
    assert again.json["usage"]["completion_tokens"] == MAX_TOKENS


async def test_a_repeat_of_several_prompts_finds_all_of_them(system: System) -> None:
    tenant = "of-several-prompts"
    door = door_of(system, system.create_key(tenant))
    body = wish(prompt=["abc", "def", "abc"], max_tokens=400, n=2)
    generation_id = await asyncio.to_thread(begin_and_leave, door, body, "k" * 128)
    assert await end_of(system, generation_id, door.key) == pb.GENERATION_STATE_FINISHED
    again = await door.post("/v1/completions", {**body, "stream": True}, {"Idempotency-Key": "k" * 128})
    assert again.headers["x-request-id"] == generation_id
    ends = [c["finish_reason"] for e in again.events[:-1] for c in e["choices"] if c["finish_reason"]]
    assert ends == ["length"] * 6
    assert await num_generations(system, tenant) == 3, "nothing was generated twice"


async def test_no_key_of_a_caller_meets_one_of_several_prompts(system: System) -> None:
    """What is stored for the second prompt cannot be written in a header: names that look like it are others'."""
    door, body = door_of(system), wish(prompt=["abc", "def"], max_tokens=2)
    assert (await door.post("/v1/completions", body, {"Idempotency-Key": "many"})).status == 200
    for key in ("many-0", "many-1", "many_1"):
        alone = await door.post("/v1/completions", wish(prompt="other", max_tokens=3), {"Idempotency-Key": key})
        assert alone.status == 200, alone.body
    other = await door.post("/v1/completions", {**body, "prompt": ["xyz", "def"]}, {"Idempotency-Key": "many"})
    assert (other.status, other.json["error"]["code"]) == (400, "idempotency_key_reused")
    blank = await door.post("/v1/completions", body, {"Idempotency-Key": "many 1"})
    assert (blank.status, blank.json["error"]["param"]) == (400, "Idempotency-Key")


async def test_the_grace_is_cut_to_what_the_credential_may_have(system: System) -> None:
    door = door_of(system, system.create_key("impatient", caps=Caps(max_disconnect_grace_ms=0)))
    generation_id = await asyncio.to_thread(begin_and_leave, door, wish(), "k1")
    assert await end_of(system, generation_id, door.key) == pb.GENERATION_STATE_CANCELLED


async def test_more_than_a_log_may_hold_is_refused_at_both_doors(system: System) -> None:
    asked: dict[str, Any] = {"max_tokens": 5000}
    answer = await door_of(system).post("/v1/completions", wish(logprobs=20, **asked))
    error = answer.json["error"]
    assert (answer.status, error["param"], error["code"]) == (400, "max_tokens", "request_too_large"), error
    async with system.client() as client:
        with refused() as refusal:
            await client.generate("abc", model=MODEL, logprobs=True, top_logprobs=20, **asked)
        assert (refusal.reason, refusal.fields) == ("REQUEST_TOO_LARGE", ["config.max_tokens"])
        # What fits is served to its end, also where nobody said how much.
        whole = await client.generate("abc", model=MODEL, logprobs=True, top_logprobs=20, num_outputs=2)
    assert whole.config.max_tokens < 500
    assert [len(output.token_ids) for output in whole.outputs] == [whole.config.max_tokens] * 2
