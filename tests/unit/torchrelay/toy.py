"""A gateway without a model, on a real socket: it has one log, breaks off where it is told to, and notes who asked."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from gateway.status import to_status
from torchrelay.admin.v1beta1 import api_key_pb2, api_key_pb2_grpc, fleet_pb2, fleet_pb2_grpc
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import generation_pb2_grpc as pb_grpc
from torchrelay.v1 import model_pb2, model_pb2_grpc

GENERATION_ID = "toy-1.abc"
KEY = "tr_right"


def digest(sequence: int) -> bytes:
    """The chain hash of an event of the toy's log."""
    return hashlib.sha256(str(sequence).encode()).digest()[:8] if sequence else b""


def words(count: int) -> list[pb.GenerationEvent]:
    """A log of `count` events with one token each, then the end."""
    events = [
        pb.GenerationEvent(
            sequence=n + 1,
            chain_hash=digest(n + 1),
            deltas=pb.Deltas(deltas=[pb.Delta(first_token_index=n, token_ids=[n], text=f"w{n} ")]),
        )
        for n in range(count)
    ]
    finished = pb.Finished(
        outputs=[pb.OutputEnd(finish_reason=pb.FINISH_REASON_STOP, stop_token_id=2)],
        usage=pb.Usage(prompt_tokens=3, cached_prompt_tokens=1, completion_tokens=count),
    )
    finished.timings.total_time.FromMilliseconds(200)
    finished.timings.time_to_first_token.FromMilliseconds(100)
    finished.timings.queue_time.FromMilliseconds(2)
    return [*events, pb.GenerationEvent(sequence=count + 1, chain_hash=digest(count + 1), finished=finished)]


@dataclass
class Failure:
    """An error of the gateway itself, with its details; without a reason it looks like a broken connection."""

    code: grpc.StatusCode
    reason: str = ""
    message: str = "what happened"
    details: Sequence[Message] = ()

    def abort(self, context: Any) -> NoReturn:
        if not self.reason:
            context.abort(self.code, self.message)
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain="torchrelay", metadata={"detail": "d"})
        context.abort_with_status(to_status(self.code, self.message, [info, *self.details]))
        raise AssertionError("abort raises")


@dataclass
class Break:
    """How one call ends early: after so many events (Accepted counts), by a failure, or as if it had ended well."""

    after: int
    failure: Failure | None = field(default_factory=lambda: Failure(grpc.StatusCode.UNAVAILABLE))


class Toy(
    pb_grpc.GenerationServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    api_key_pb2_grpc.ApiKeyServiceServicer,
    fleet_pb2_grpc.FleetServiceServicer,
):
    """Serves on `address`; what it does next is in its fields."""

    def __init__(self) -> None:
        self.address = ""
        self.reset()

    def reset(self) -> None:
        self.log = words(5)
        self.breaks: list[Break] = []
        self.failures: list[Failure] = []  # of unary calls, in order
        self.always: Failure | None = None
        self.requests: list[Any] = []
        self.keys: list[str] = []
        self.models = [
            model_pb2.Model(
                name="tiny",
                revision="0123456789abcdef",
                state=model_pb2.MODEL_STATE_READY,
                has_chat_template=True,
                context_length=64,
                num_workers=1,
                dtype="float32",
                weight_format="int8",
                weight_bytes=1_500_000_000,
                attention_backend="cpu_ext",
            )
        ]
        self.api_keys: list[api_key_pb2.ApiKey] = []
        self.generations: list[fleet_pb2.GenerationInfo] = []
        self.snapshots: list[fleet_pb2.FleetSnapshot | Failure] = []  # what WatchFleet tells, once; the last for ever
        self.workers: list[fleet_pb2.Worker] = []
        self.dead_letters: list[fleet_pb2.DeadLetter] = []
        self._accepted: set[str] = set()  # idempotency keys

    def _note(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.keys.append(dict(context.invocation_metadata()).get("authorization", ""))
        if self.always is not None:
            self.always.abort(context)

    def _unary(self, request: Any, context: Any) -> None:
        self._note(request, context)
        if self.failures:
            self.failures.pop(0).abort(context)

    def _stream(self, after: int, context: Any, *, replayed: bool) -> Iterator[pb.GenerationEvent]:
        broken = self.breaks.pop(0) if self.breaks else Break(1 << 30)
        accepted = pb.Accepted(
            generation_id=GENERATION_ID,
            model="tiny",
            config=pb.GenerationConfig(seed=7, max_tokens=9),
            prompt_tokens=3,
            replayed=replayed,
        )
        events = [
            pb.GenerationEvent(sequence=after, chain_hash=digest(after), accepted=accepted),
            *(event for event in self.log if event.sequence > after),
        ]
        yield from events[: broken.after]
        if broken.after < len(events) and broken.failure is not None:
            broken.failure.abort(context)

    def StreamGenerate(self, request: Any, context: Any) -> Iterator[pb.StreamGenerateResponse]:  # noqa: N802
        self._note(request, context)
        replayed = request.idempotency_key in self._accepted
        self._accepted.add(request.idempotency_key)
        for event in self._stream(0, context, replayed=replayed):
            yield pb.StreamGenerateResponse(event=event)

    def ResumeGeneration(self, request: Any, context: Any) -> Iterator[pb.ResumeGenerationResponse]:  # noqa: N802
        self._note(request, context)
        if request.generation_id != GENERATION_ID or request.chain_hash != digest(request.after_sequence):
            Failure(grpc.StatusCode.ABORTED, "RESULT_LOST").abort(context)
        for event in self._stream(request.after_sequence, context, replayed=False):
            yield pb.ResumeGenerationResponse(event=event)

    def GetGeneration(self, request: Any, context: Any) -> pb.GetGenerationResponse:  # noqa: N802
        self._unary(request, context)
        return pb.GetGenerationResponse(generation=pb.Generation(generation_id=request.generation_id))

    def CancelGeneration(self, request: Any, context: Any) -> pb.CancelGenerationResponse:  # noqa: N802
        self._unary(request, context)
        return pb.CancelGenerationResponse(state=pb.GENERATION_STATE_CANCELLED)

    def ListModels(self, request: Any, context: Any) -> model_pb2.ListModelsResponse:  # noqa: N802
        """Pages of one."""
        self._unary(request, context)
        at = int(request.page_token or 0)
        more = str(at + 1) if at + 1 < len(self.models) else ""
        return model_pb2.ListModelsResponse(models=self.models[at : at + 1], next_page_token=more)

    def GetModel(self, request: Any, context: Any) -> model_pb2.GetModelResponse:  # noqa: N802
        self._unary(request, context)
        found = [model for model in self.models if model.name == request.model]
        if not found:
            Failure(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "no such model").abort(context)
        return model_pb2.GetModelResponse(model=found[0])

    def CreateApiKey(self, request: Any, context: Any) -> api_key_pb2.CreateApiKeyResponse:  # noqa: N802
        self._unary(request, context)
        key = api_key_pb2.ApiKey(key_id="k1", tenant=request.tenant, display_name=request.display_name)
        self.api_keys.append(key)
        return api_key_pb2.CreateApiKeyResponse(api_key=key, secret="tr_new")

    def ListApiKeys(self, request: Any, context: Any) -> api_key_pb2.ListApiKeysResponse:  # noqa: N802
        self._unary(request, context)
        at = int(request.page_token or 0)
        more = str(at + 1) if at + 1 < len(self.api_keys) else ""
        return api_key_pb2.ListApiKeysResponse(api_keys=self.api_keys[at : at + 1], next_page_token=more)

    def RevokeApiKey(self, request: Any, context: Any) -> api_key_pb2.RevokeApiKeyResponse:  # noqa: N802
        self._unary(request, context)
        key = api_key_pb2.ApiKey(key_id=request.key_id, tenant="acme")
        return api_key_pb2.RevokeApiKeyResponse(api_key=key)

    def ListWorkers(self, request: Any, context: Any) -> fleet_pb2.ListWorkersResponse:  # noqa: N802
        self._unary(request, context)
        return fleet_pb2.ListWorkersResponse(workers=self.workers)

    def ListGenerations(self, request: Any, context: Any) -> fleet_pb2.ListGenerationsResponse:  # noqa: N802
        self._unary(request, context)
        return fleet_pb2.ListGenerationsResponse(generations=self.generations, total_size=len(self.generations) + 2)

    def WatchFleet(self, request: Any, context: Any) -> Iterator[fleet_pb2.WatchFleetResponse]:  # noqa: N802
        self._note(request, context)
        if self.failures:
            self.failures.pop(0).abort(context)
        snapshots = self.snapshots  # a stream that is being ended must not take those of the next one
        while True:
            told = snapshots.pop(0) if len(snapshots) > 1 else snapshots[0]
            if isinstance(told, Failure):
                told.abort(context)
            yield fleet_pb2.WatchFleetResponse(snapshot=told)
            time.sleep(0.01)

    def DrainWorker(self, request: Any, context: Any) -> fleet_pb2.DrainWorkerResponse:  # noqa: N802
        self._unary(request, context)
        asked = [one for one in self.workers if one.worker_id == request.worker_id or one.model == request.model]
        return fleet_pb2.DrainWorkerResponse(workers=asked)

    def ListDeadLetters(self, request: Any, context: Any) -> fleet_pb2.ListDeadLettersResponse:  # noqa: N802
        """Pages of one."""
        self._unary(request, context)
        at = int(request.page_token or 0)
        more = str(at + 1) if at + 1 < len(self.dead_letters) else ""
        return fleet_pb2.ListDeadLettersResponse(
            dead_letters=self.dead_letters[at : at + 1], next_page_token=more, total_size=len(self.dead_letters)
        )

    def _act(self, request: Any, context: Any, outcome: Any, suffix: str) -> list[fleet_pb2.DeadLetterResult]:
        self._unary(request, context)
        known = [letter.generation_id for letter in self.dead_letters]
        return [
            fleet_pb2.DeadLetterResult(generation_id=name, outcome=outcome, new_generation_id=suffix and name + suffix)
            if name in known
            else fleet_pb2.DeadLetterResult(generation_id=name, outcome=fleet_pb2.DEAD_LETTER_OUTCOME_NOT_FOUND)
            for name in request.generation_ids or known
        ]

    def RetryDeadLetters(self, request: Any, context: Any) -> fleet_pb2.RetryDeadLettersResponse:  # noqa: N802
        results = self._act(request, context, fleet_pb2.DEAD_LETTER_OUTCOME_RETRIED, "-new")
        return fleet_pb2.RetryDeadLettersResponse(results=results)

    def PurgeDeadLetters(self, request: Any, context: Any) -> fleet_pb2.PurgeDeadLettersResponse:  # noqa: N802
        results = self._act(request, context, fleet_pb2.DEAD_LETTER_OUTCOME_PURGED, "")
        return fleet_pb2.PurgeDeadLettersResponse(results=results)


@contextmanager
def serving(toy: Toy | None = None) -> Iterator[Toy]:
    """A toy on a free port of loopback."""
    toy = toy or Toy()
    server = grpc.server(ThreadPoolExecutor(8))
    pb_grpc.add_GenerationServiceServicer_to_server(toy, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(toy, server)
    api_key_pb2_grpc.add_ApiKeyServiceServicer_to_server(toy, server)
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(toy, server)
    toy.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield toy
    finally:
        server.stop(0).wait(5)
