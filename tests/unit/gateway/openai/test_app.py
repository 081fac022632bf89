"""The routes of the OpenAI door where a test needs no worker: what keeps the event loop free."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, cast

import pytest

from common.errors import InvalidRequest
from common.grants import Caps, Grants
from common.registry import ModelCard
from gateway.audit import Audit
from gateway.catalog import MAX_INLINE_BYTES, Catalog, ServedModel, default_config
from gateway.generations import Generations
from gateway.identity.caller import Caller, CallInfo
from gateway.openai import app as openai_app
from gateway.openai import requests
from gateway.openai.app import OpenAiDoor
from gateway.openai.exchange import Door, bodies_of
from gateway.settings import GatewaySettings
from gateway.tasks.core import Tasks
from gateway.tokenization import TextCodec
from gateway.turns import TenantTurns
from torchrelay.v1 import generation_pb2 as pb
from worker.engine.demo import demo_model_dir

CARD = ModelCard(
    name="m", revision="r1", shard="s", vocab_size=49152, context_tokens=64, max_output_tokens=63, block_tokens=16,
    kv_tokens=128,
)  # fmt: skip


@cache
def _codec() -> TextCodec:
    return TextCodec((demo_model_dir() / "tokenizer.json").read_bytes(), None)


class OneModel:
    """A catalog of one model."""

    def __init__(self) -> None:
        self.turns = TenantTurns()
        self._model = ServedModel(CARD, _codec(), default_config(CARD), self.turns)

    async def get(self, name: str) -> ServedModel:
        return self._model


async def post(
    path: str,
    body: dict[str, Any],
    generations: Any = None,
    caps: Caps | None = None,
    answers: list[Any] | None = None,
) -> tuple[int, bytes]:
    """The answer to a call: its status and its body. Its messages go into `answers`."""

    async def authenticate(call: CallInfo) -> Caller:
        return Caller("acme", "k1", grants=Grants(caps=caps or Caps()))

    sent: list[Any] = answers if answers is not None else []

    body_read = False

    async def receive() -> Any:
        nonlocal body_read
        if body_read:
            await asyncio.Event().wait()  # the client stays
        body_read = True
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message: Any) -> None:
        sent.append(message)

    settings = GatewaySettings()
    around = Door(authenticate, lambda method, caller: None, Audit(), bodies=bodies_of(settings), send_timeout_s=5)
    door = OpenAiDoor(cast(Generations, generations), cast(Tasks, None), cast(Catalog, OneModel()), settings, around)
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "client": ("127.0.0.1", 1)}
    await door.app(scope, receive, send)
    return sent[0]["status"], b"".join(message["body"] for message in sent[1:])


class Streams:
    """Generations that end at once; keeps what was asked for."""

    def __init__(self, *events: pb.GenerationEvent) -> None:
        self._events = events
        self.configs: list[pb.GenerationConfig] = []

    @asynccontextmanager
    async def open(self, request: Any, caller: Any, call: Any, part: int = 0) -> AsyncIterator[Any]:
        self.configs.append(request.config)
        yield self, pb.Accepted(generation_id="g", model="m", config=request.config)

    async def events(self) -> AsyncIterator[pb.GenerationEvent]:
        for event in self._events:
            yield event

    async def whole(self, generation_id: str, caller: Caller) -> pb.Generation:
        return pb.Generation()


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
        assert (status, json.loads(answer)["error"]["message"]) == (400, "seen")
    assert was_here == [("parse", True), (convert, True), ("parse", False), (convert, False)]


IDS = [504, 3575, 282]


@pytest.mark.parametrize(
    ("prompt", "caps", "expected"),
    [
        (IDS, Caps(), 16),
        ("hi", Caps(), 16),
        (IDS * 16, Caps(), 16),  # 48 of 64 tokens: it fits exactly
        ([*IDS * 16, 1], Caps(), None),
        (" a" * 49, Caps(), None),
        (" a" * 48, Caps(), 16),
        (IDS, Caps(max_tokens=15), None),
        (IDS, Caps(max_tokens=16), 16),
        (IDS, Caps(max_context_tokens=18), None),
        (IDS, Caps(max_context_tokens=19), 16),
    ],
)
async def test_the_default_of_max_tokens_gives_way_to_what_is_left(
    prompt: Any, caps: Caps, expected: int | None
) -> None:
    generations = Streams()
    status, _ = await post("/v1/completions", {"model": "m", "prompt": prompt}, generations, caps)
    assert status == 200
    (config,) = generations.configs
    assert (config.max_tokens if config.HasField("max_tokens") else None) == expected
    # What a caller asks for is not cut here: it is refused where it does not fit.
    await post("/v1/completions", {"model": "m", "prompt": prompt, "max_tokens": 60}, generations, caps)
    assert generations.configs[-1].max_tokens == 60


async def test_word_of_progress_keeps_a_silent_stream_open() -> None:
    ends = [pb.OutputEnd(finish_reason=pb.FINISH_REASON_STOP)]
    generations = Streams(
        pb.GenerationEvent(progress=pb.Progress()), pb.GenerationEvent(finished=pb.Finished(outputs=ends))
    )
    status, answer = await post("/v1/completions", {"model": "m", "prompt": "p", "stream": True}, generations)
    assert status == 200
    comment, end, done, rest = answer.split(b"\n\n")
    assert comment == b": "
    assert json.loads(end.removeprefix(b"data: "))["choices"][0]["finish_reason"] == "stop"
    assert (done, rest) == (b"data: [DONE]", b"")
