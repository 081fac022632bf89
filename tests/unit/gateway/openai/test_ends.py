"""However a generation ends, the client is told: whole answers by their status, streams by their last event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from common import errors
from common.jobs import JobState, Reason
from gateway import convert
from gateway.status import GenerationEndedError, code_of
from gateway.stream import stored_body
from tests.builders_gateway import make_record
from tests.builders_http import Answer
from tests.unit.gateway.openai.test_app import Streams, post
from torchrelay.v1 import generation_pb2 as pb

TOKEN = pb.GenerationEvent(deltas=pb.Deltas(deltas=[pb.Delta(text="a", token_ids=[5])]))
CONSTRAINED = pb.Accepted(config=pb.GenerationConfig(structured_output=pb.StructuredOutput(regex="a")))


def failed(reason: Reason, echo: pb.Accepted | None = None) -> GenerationEndedError:
    """What a stream ends with, of a generation that ended so."""
    record = make_record(JobState.FAILED, reason=reason, echo=stored_body(echo) if echo is not None else b"")
    failure = convert.failure_of(record)
    assert failure is not None
    return GenerationEndedError(failure, None)


# Why a stream can end behind its first event: the error, and what clients are told by HTTP and by gRPC.
ENDS: dict[str, tuple[BaseException, int, str, str | None, str]] = {
    **{
        f"dead letter: {reason}": (failed(reason), 500, "worker_failed", None, "INTERNAL")
        for reason in (Reason.ATTEMPTS_EXHAUSTED, Reason.WORKER_FAILED)
        if reason
    },
    "log limit": (failed(Reason.LOG_LIMIT), 500, "log_limit", None, "INTERNAL"),
    "no token left": (failed(Reason.ALL_TOKENS_FORBIDDEN), 400, "all_tokens_forbidden", "config", "INVALID_ARGUMENT"),
    "grammar of tools": (failed(Reason.GRAMMAR_STUCK), 400, "grammar_stuck", "tools", "INVALID_ARGUMENT"),
    "grammar": (
        failed(Reason.GRAMMAR_TOO_COMPLEX, CONSTRAINED),
        400,
        "grammar_too_complex",
        "response_format",
        "INVALID_ARGUMENT",
    ),
    "adapter gone": (failed(Reason.ADAPTER_NOT_FOUND), 404, "model_not_found", "model", "NOT_FOUND"),
    "worker without constraints": (
        failed(Reason.STRUCTURED_OUTPUT_UNSUPPORTED),
        400,
        "structured_output_unsupported",
        None,
        "FAILED_PRECONDITION",
    ),
    "time limit before it began": (
        GenerationEndedError(errors.DeadlineExceeded("too late"), None),
        504,
        "queue_deadline",
        None,
        "DEADLINE_EXCEEDED",
    ),
    "another call": (errors.Superseded(), 409, "superseded", None, "ABORTED"),
    "lost in a failover": (errors.ResultLost(), 409, "result_lost", None, "ABORTED"),
    "server away": (
        errors.BackendUnavailable("away", retry_after_ms=500),
        503,
        "backend_unavailable",
        None,
        "UNAVAILABLE",
    ),
    "server refuses": (errors.BackendRefused("no"), 500, "backend_refused", None, "INTERNAL"),
    "broken seal": (errors.SealBroken("no"), 500, "seal_broken", None, "INTERNAL"),
    "erased meanwhile": (errors.GenerationNotFound(), 404, "request_not_found", None, "NOT_FOUND"),
    "quota": (
        errors.QuotaExceeded("spent", subject="tenant:tokens_per_day", limit=1),
        429,
        "insufficient_quota",
        None,
        "RESOURCE_EXHAUSTED",
    ),
    "a bug": (RuntimeError("secret"), 500, "internal", None, "INTERNAL"),
}


class Ending(Streams):
    """A generation that fails behind its first token."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(TOKEN)
        self._error = error

    async def events(self) -> AsyncIterator[pb.GenerationEvent]:
        yield TOKEN
        raise self._error


def body(prompt: Any, *, stream: bool) -> dict[str, Any]:
    return {"model": "m", "prompt": prompt, "stream": stream}


@pytest.mark.parametrize("prompt", ["p", ["p", "q"]], ids=["one", "several"])
@pytest.mark.parametrize("name", ENDS)
async def test_a_failure_behind_the_first_token_is_the_last_event(name: str, prompt: Any) -> None:
    error, http_status, code, param, grpc_code = ENDS[name]
    status, sent = await post("/v1/completions", body(prompt, stream=True), Ending(error))
    assert status == 200, "it had begun"
    *before, last = Answer(status, {}, sent).events
    assert before
    assert all(event["choices"] for event in before)
    assert last.keys() == {"error"}, "and no mark of a good end"
    assert last["error"].keys() == {"message", "type", "param", "code"}
    assert (last["error"]["code"], last["error"]["param"]) == (code, param)
    assert "secret" not in sent.decode()
    status, whole = await post("/v1/completions", body(prompt, stream=False), Ending(error))
    told = json.loads(whole)["error"]
    assert (status, told["code"], told["param"]) == (http_status, code, param)
    assert told["type"] == last["error"]["type"]
    inner = error.error if isinstance(error, GenerationEndedError) else error
    if isinstance(inner, errors.ServingError):
        assert code_of(inner).name == grpc_code


def test_every_reason_of_a_failed_generation_is_in_the_table() -> None:
    told = {ENDS[name][2].upper() for name in ENDS}
    for reason in Reason:
        failure = convert.failure_of(make_record(JobState.FAILED, reason=reason))
        assert failure is not None
        assert failure.reason in told | {"ADAPTER_NOT_FOUND", "GRAMMAR_INVALID"}, reason


async def test_a_generation_that_another_call_cancels_ends_its_stream_in_an_error() -> None:
    end = pb.OutputEnd(finish_reason=pb.FINISH_REASON_CANCELLED)
    generations = Streams(TOKEN, pb.GenerationEvent(finished=pb.Finished(outputs=[end])))
    _, sent = await post("/v1/completions", body("p", stream=True), generations)
    assert Answer(200, {}, sent).events[-1]["error"]["code"] == "cancelled"


class Endless(Streams):
    """A generation that goes on until its call is cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.has_begun = asyncio.Event()

    async def events(self) -> AsyncIterator[pb.GenerationEvent]:
        yield TOKEN
        self.has_begun.set()
        await asyncio.Event().wait()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_call_that_outlasts_the_server_s_stop_is_told_to_come_again(stream: bool) -> None:
    generations = Endless()
    answers: list[Any] = []
    calling = asyncio.create_task(post("/v1/completions", body("p", stream=stream), generations, answers=answers))
    await generations.has_begun.wait()
    calling.cancel()  # as the server does
    await asyncio.gather(calling, return_exceptions=True)
    assert calling.cancelled()
    status, sent = answers[0]["status"], b"".join(message["body"] for message in answers[1:])
    assert not answers[-1].get("more_body", False), "the answer is whole"
    told = Answer(status, {}, sent).events[-1]["error"] if stream else json.loads(sent)["error"]
    assert (status, told["code"], told["type"]) == (200 if stream else 503, "gateway_stopping", "server_error")
    if not stream:
        assert b"retry-after" in dict(answers[0]["headers"])
