"""The routes of the OpenAI door where a test needs no worker: what keeps the event loop free."""

from __future__ import annotations

import json
import threading
from typing import Any, cast

import pytest

from common.errors import InvalidRequest
from common.grants import Grants
from common.registry import ModelCard
from gateway.audit import Audit
from gateway.catalog import MAX_INLINE_BYTES, Catalog, ServedModel, default_config
from gateway.generations import Generations
from gateway.identity.caller import Caller, CallInfo
from gateway.openai import app as openai_app
from gateway.openai import requests
from gateway.openai.app import OpenAiDoor
from gateway.openai.exchange import Door
from gateway.settings import GatewaySettings
from gateway.tokenization import TextCodec
from gateway.turns import TenantTurns
from worker.engine.demo import demo_model_dir

CARD = ModelCard(
    name="m", revision="r1", shard="s", vocab_size=49152, context_tokens=64, max_output_tokens=63, block_tokens=16,
    kv_tokens=128,
)  # fmt: skip


class OneModel:
    """A catalog of one model."""

    def __init__(self) -> None:
        self.turns = TenantTurns()
        codec = TextCodec((demo_model_dir() / "tokenizer.json").read_bytes(), None)
        self._model = ServedModel(CARD, codec, default_config(CARD), self.turns)

    async def get(self, name: str) -> ServedModel:
        return self._model


async def post(path: str, body: dict[str, Any], generations: Any = None, grants: Grants | None = None) -> Any:
    """The answer to a call: its status, and its body as JSON."""

    async def authenticate(call: CallInfo) -> Caller:
        return Caller("acme", "k1", grants=grants or Grants())

    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message: Any) -> None:
        sent.append(message)

    around = Door(authenticate, lambda method, caller: None, Audit(), send_timeout_s=5)
    door = OpenAiDoor(cast(Generations, generations), cast(Catalog, OneModel()), GatewaySettings(), around)
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "client": ("127.0.0.1", 1)}
    await door.app(scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.mark.parametrize(
    ("path", "convert", "fields"),
    [
        ("/v1/completions", "completion_requests", {"prompt": "p"}),
        ("/v1/chat/completions", "chat_request", {"messages": [{"role": "user", "content": "hi"}]}),
    ],
)
async def test_a_long_body_is_read_and_converted_beside_the_event_loop(
    path: str, convert: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = threading.current_thread()
    was_here: list[tuple[str, bool]] = []
    reading = requests.parse

    def parse(*values: Any) -> Any:
        was_here.append(("parse", threading.current_thread() is here))
        return reading(*values)

    def refuse(*values: Any, **options: Any) -> Any:
        was_here.append((convert, threading.current_thread() is here))
        raise InvalidRequest("seen", field="prompt")

    monkeypatch.setattr(openai_app, "parse", parse)
    monkeypatch.setattr(openai_app, convert, refuse)
    for user in ("me", "x" * MAX_INLINE_BYTES):
        status, answer = await post(path, {"model": "m", **fields, "user": user})
        assert (status, answer["error"]["message"]) == (400, "seen")
    assert was_here == [("parse", True), (convert, True), ("parse", False), (convert, False)]
