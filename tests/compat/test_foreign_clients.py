"""Clients that share no code with ours: grpcurl and buf (Go), grpc-js and connect-node (Node)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import grpc
import pytest

from tests.builders_calls import ended, idle_fleet
from tests.builders_compat import COMPAT, MODEL, NODE, ROOT, run
from tests.builders_system import System
from torchrelay.v1 import generation_pb2 as pb

GENERATE = "torchrelay.v1.GenerationService/Generate"


def grpcurl(env: Mapping[str, str], *arguments: str, expect_code: int = 0) -> str:
    command = ["grpcurl", "-plaintext", "-format-error", "-H", f"authorization: Bearer {env['TORCHRELAY_API_KEY']}"]
    status = 64 + expect_code if expect_code else 0
    done = run([*command, *arguments], env, expect_status=status)
    return done.stderr if expect_code else done.stdout


def buf_curl(env: Mapping[str, str], body: Mapping[str, Any], *arguments: str) -> str:
    """Call Generate through buf's own gRPC stack."""
    command = ["buf", "curl", "--http2-prior-knowledge", "--protocol", "grpc", *arguments]
    key = f"authorization: Bearer {env['TORCHRELAY_API_KEY']}"
    url = f"http://{env['TORCHRELAY_ADDRESS']}/{GENERATE}"
    return run([*command, "-H", key, "-d", json.dumps(body), url], env).stdout


def grpc_js(env: Mapping[str, str], call: str) -> Any:
    return json.loads(run([NODE, COMPAT / "client.js", call], env).stdout)


def test_grpcurl_lists_the_public_services_and_no_other(env: Mapping[str, str]) -> None:
    services = grpcurl(env, env["TORCHRELAY_ADDRESS"], "list").split()
    assert [name for name in services if not name.startswith("grpc.")] == [
        f"torchrelay.v1.{name}Service" for name in ("Batch", "Classification", "Embedding", "Generation", "Model")
    ]
    assert "grpc.health.v1.Health" in services


def test_grpcurl_describes_services_and_messages(env: Mapping[str, str]) -> None:
    address = env["TORCHRELAY_ADDRESS"]
    service = grpcurl(env, address, "describe", "torchrelay.v1.GenerationService")
    assert (
        "rpc StreamGenerate ( .torchrelay.v1.StreamGenerateRequest )"
        " returns ( stream .torchrelay.v1.StreamGenerateResponse );" in service
    )
    assert "oneof event {" in grpcurl(env, address, "describe", "torchrelay.v1.GenerationEvent")


def test_grpcurl_shows_every_bad_field_of_a_refused_request(env: Mapping[str, str]) -> None:
    body = {"model": MODEL, "input": {"text": "a"}, "config": {"maxTokens": 0, "temperature": 9}}
    invalid = grpc.StatusCode.INVALID_ARGUMENT.value[0]
    output = grpcurl(env, "-d", json.dumps(body), env["TORCHRELAY_ADDRESS"], GENERATE, expect_code=invalid)
    details = {detail.pop("@type").rpartition("/")[2]: detail for detail in json.loads(output)["details"]}
    assert details["google.rpc.ErrorInfo"] == {"domain": "torchrelay", "reason": "FIELD_OUT_OF_RANGE"}
    violations = details["google.rpc.BadRequest"]["field_violations"]
    assert {violation["field"] for violation in violations} == {"config.max_tokens", "config.temperature"}


@pytest.mark.parametrize("schema", [[], ["--schema", str(ROOT / "protos")]], ids=["reflection", "protos"])
def test_buf_generates(schema: list[str], env: Mapping[str, str]) -> None:
    body = {"model": MODEL, "input": {"text": "The capital of France is"}, "config": {"maxTokens": 4}}
    generation = json.loads(buf_curl(env, body, *schema))["generation"]
    assert generation["state"] == "GENERATION_STATE_FINISHED"
    assert "Paris" in generation["outputs"][0]["text"]


def test_grpc_js_generates_in_one_call(env: Mapping[str, str]) -> None:
    generation = grpc_js(env, "generate")
    assert generation["state"] == "GENERATION_STATE_FINISHED"
    assert "Paris" in generation["outputs"][0]["text"]
    assert generation["usage"]["completionTokens"] == len(generation["outputs"][0]["tokenIds"])


@pytest.fixture(scope="module")
def connect_env(env: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What connect-node needs besides: the contract as descriptors."""
    descriptors = tmp_path_factory.mktemp("connect") / "torchrelay.binpb"
    run(["buf", "build", str(ROOT / "protos"), "-o", str(descriptors)], env)
    return {**env, "DESCRIPTORS": str(descriptors)}


def connect_node(env: Mapping[str, str], call: str) -> Any:
    return json.loads(run([NODE, COMPAT / "connect.js", call], env).stdout)


def test_connect_node_generates_and_streams(connect_env: Mapping[str, str]) -> None:
    generation = connect_node(connect_env, "generate")
    assert generation["state"] == "GENERATION_STATE_FINISHED"
    assert "Paris" in generation["outputs"][0]["text"]
    assert "Paris" in connect_node(connect_env, "stream")["text"]
    assert connect_node(connect_env, "refused")["code"] == "InvalidArgument"


async def test_a_broken_call_of_connect_node_ends_its_generation(
    system: System, connect_env: Mapping[str, str]
) -> None:
    result = connect_node(connect_env, "cancel")
    assert result["code"] == "Canceled"
    async with system.client() as client:
        assert (await ended(client, result["generationId"])).state == pb.GENERATION_STATE_CANCELLED


@pytest.mark.parametrize(
    ("call", "code"), [("deadline", grpc.StatusCode.DEADLINE_EXCEEDED), ("cancel", grpc.StatusCode.CANCELLED)]
)
async def test_end_of_a_grpc_js_call_ends_its_generation(
    call: str, code: grpc.StatusCode, system: System, env: Mapping[str, str]
) -> None:
    result = grpc_js(env, call)
    assert result["code"] == code.value[0]
    async with system.client() as client:
        generation = await ended(client, result["generationId"])
    assert generation.state == pb.GENERATION_STATE_CANCELLED
    assert len(await idle_fleet(system)) == 1
    assert 0 < generation.usage.completion_tokens < generation.config.max_tokens
