"""Calls of the client library through the proxy, and what became of each."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc.aio

from tests.mesh.envoy import SERVED_BY
from torchrelay.client import AsyncClient, RelayError, RetryPolicy, StreamPosition
from torchrelay.client.errors import from_rpc_error
from torchrelay.client.requests import make_stream_request
from torchrelay.v1 import generation_pb2 as pb

KINDS: Final = ("unary", "stream", "generate")
_GRACE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Task:
    """One keyed call: what is asked, and what the model says to it."""

    number: int
    prompt: tuple[int, ...]
    expected: tuple[int, ...]

    @property
    def kind(self) -> str:
        return KINDS[self.number % len(KINDS)]

    @property
    def key(self) -> str:
        return f"call-{self.number}"


@dataclass(slots=True)
class Result:
    """What a caller got. `served_by` are the gateways that answered its attempts, in order."""

    task: Task
    generation_id: str = ""
    token_ids: tuple[int, ...] = ()
    error: str = ""
    served_by: list[str] = field(default_factory=list)
    resumed_by: list[tuple[str, str]] = field(default_factory=list)  # (gateway before, gateway that resumed)

    @property
    def is_right(self) -> bool:
        return not self.error and self.token_ids == self.task.expected


class Recorder:
    """A stub around the library's own: notes which gateway answers, and may change what is sent."""

    def __init__(self, stub: Any, change: Callable[[Any], Any], metadata: Sequence[tuple[str, str]]) -> None:
        self._stub = stub
        self._change = change
        self._metadata = tuple(metadata)
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._stub, name)

        def call(request: Any, *, metadata: Sequence[tuple[str, str]] = (), **options: Any) -> Any:
            made = method(self._change(request), metadata=(*metadata, *self._metadata), **options)
            self.calls.append((name, made))
            return made

        return call

    async def note(self, result: Result) -> None:
        """Write down who answered the calls so far."""
        before = ""
        for name, call in self.calls:
            gateway = ""
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                gateway = dict(await call.initial_metadata()).get(SERVED_BY, "")
            if not gateway:
                continue
            result.served_by.append(gateway)
            if name == "ResumeGeneration" and before:
                result.resumed_by.append((before, gateway))
            before = gateway


def without_key(request: Any) -> Any:
    """The same request without its idempotency key: the mutant that a mesh's retries make visible."""
    if "idempotency_key" in request.DESCRIPTOR.fields_by_name:
        request = type(request).FromString(request.SerializeToString())
        request.ClearField("idempotency_key")
    return request


async def make_call(
    client: AsyncClient, model: str, task: Task, *, change: Callable[[Any], Any], metadata: Sequence[tuple[str, str]]
) -> Result:
    """Make one call by the library, whatever breaks on the way; return what became of it."""
    result = Result(task)
    recorder = Recorder(client.generation, change, metadata)
    caller = _Caller(client, recorder)
    options: Any = {"max_tokens": len(task.expected), "temperature": 0}
    try:
        if task.kind == "unary":
            generation = await _unary(caller, model, task, options)
        elif task.kind == "generate":
            generation = await caller.generate(task.prompt, model=model, idempotency_key=task.key, **options)
        else:
            generation = await _follow(caller, model, task, options)
        result.generation_id = generation.generation_id
        result.token_ids = tuple(generation.outputs[0].token_ids)
    except RelayError as error:
        result.error = f"{error.code.name} {error.reason} {error.message}"
    await recorder.note(result)
    return result


class _Caller(AsyncClient):
    """The library's client, over a connection that all share, with a recorder of its own."""

    def __init__(self, client: AsyncClient, recorder: Recorder) -> None:
        self.__dict__.update(client.__dict__)
        self.generation = recorder  # type: ignore[assignment]


async def _follow(client: AsyncClient, model: str, task: Task, options: Any) -> pb.Generation:
    """Read a stream; what comes out is put together as Generate would."""
    stream = client.stream(task.prompt, model=model, idempotency_key=task.key, **options)
    token_ids: list[int] = []
    async for event in stream:
        for delta in event.deltas.deltas:
            if delta.first_token_index != len(token_ids):
                raise AssertionError(f"{stream.generation_id}: a gap or a repetition at {delta.first_token_index}")
            token_ids += delta.token_ids
    return pb.Generation(
        generation_id=stream.generation_id, outputs=[pb.GenerationOutput(output_index=0, token_ids=token_ids)]
    )


async def _unary(client: AsyncClient, model: str, task: Task, options: Any) -> pb.Generation:
    """The unary call, tried again with its key as the library tries streams again."""
    stream = make_stream_request(
        model, task.prompt, options, time_limit_s=None, disconnect_grace_s=_GRACE_S, idempotency_key=task.key
    )
    request = pb.GenerateRequest.FromString(stream.SerializeToString())  # the same fields under the same numbers
    position = StreamPosition(RetryPolicy(give_up_after_s=60))
    while True:
        try:
            return (await client.generation.Generate(request, metadata=client.metadata)).generation
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
        await asyncio.sleep(position.on_error(error, time.monotonic()))
