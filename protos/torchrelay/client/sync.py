"""The blocking client: the same calls as the asynchronous one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, Unpack, overload

import grpc

from torchrelay.client import channel as channels
from torchrelay.client.batches import BatchCalls
from torchrelay.client.errors import RelayError, from_rpc_error
from torchrelay.client.requests import GenerationOptions, Priority, Prompt, make_stream_request
from torchrelay.client.resume import RetryPolicy, StreamPosition
from torchrelay.client.tasks import keyed, method_of
from torchrelay.v1 import batch_pb2_grpc, classification_pb2_grpc, embedding_pb2_grpc, model_pb2, model_pb2_grpc
from torchrelay.v1 import classification_pb2 as cpb
from torchrelay.v1 import embedding_pb2 as epb
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import generation_pb2_grpc as pb_grpc

_T = TypeVar("_T")


class _EventCall(Protocol):
    """What both streaming methods return; grpc gives the type no name at run time."""

    def __iter__(self) -> Iterator[pb.StreamGenerateResponse | pb.ResumeGenerationResponse]: ...

    def cancel(self) -> bool: ...


class GenerationStream:
    """Events of one generation, across any number of broken connections. Iterate over it, or over `text()`."""

    def __init__(self, client: Client, request: pb.StreamGenerateRequest | None, position: StreamPosition) -> None:
        self._client = client
        self._request = request
        self.position = position

    @property
    def generation_id(self) -> str:
        """Empty until Accepted arrived."""
        return self.position.generation_id

    def __iter__(self) -> Iterator[pb.GenerationEvent]:
        position = self.position
        while not position.finished:
            with self._client.opening():
                call = self._call()
            try:
                for response in call:
                    if position.on_event(response.event, time.monotonic()):
                        yield response.event
                if position.finished:
                    return
                error = RelayError(grpc.StatusCode.UNAVAILABLE, "the stream ended before the generation did")
            except grpc.RpcError as failure:
                error = from_rpc_error(failure, position.generation_id)
            finally:
                call.cancel()  # does nothing to a call that ended
            self._client.check_open(error)
            time.sleep(position.on_error(error, time.monotonic()))

    def text(self, output_index: int = 0) -> Iterator[str]:
        """Yield the text of one output as it comes."""
        for event in self:
            for delta in event.deltas.deltas:
                if delta.output_index == output_index and delta.text:
                    yield delta.text

    def _call(
        self,
    ) -> _EventCall:
        resume = self.position.resume_request()
        if resume is not None:
            return self._client.generation.ResumeGeneration(resume, metadata=self._client.metadata)
        assert self._request is not None
        return self._client.generation.StreamGenerate(self._request, metadata=self._client.metadata)


class Client(BatchCalls):
    """Calls a torchrelay gateway. One instance holds one channel and may be shared by threads.

    `address` is host:port or any gRPC target, such as dns:///gateway:50051 or ipv4:10.0.0.1:50051,10.0.0.2:50051.
    Plaintext beyond loopback carries the key in the clear, so it needs `insecure=True`; otherwise `tls` is used there.
    A `token` that is a function is asked at every call, and should return at once.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        api_key: str | None = None,
        token: channels.Token | None = None,
        tls: channels.Tls | None = None,
        insecure: bool = False,
        retry: RetryPolicy | None = None,
        disconnect_grace_s: float = 30.0,
    ) -> None:
        self._bearer = channels.Bearer(api_key, token)
        plaintext = insecure or (tls is None and channels.is_loopback(address))
        if plaintext:
            self._channel = grpc.insecure_channel(address, options=channels.OPTIONS)
        else:
            credentials = (tls or channels.Tls()).credentials()
            self._channel = grpc.secure_channel(address, credentials, options=channels.OPTIONS)
        self.generation = pb_grpc.GenerationServiceStub(self._channel)
        self.embedding = embedding_pb2_grpc.EmbeddingServiceStub(self._channel)
        self.classification = classification_pb2_grpc.ClassificationServiceStub(self._channel)
        self.model = model_pb2_grpc.ModelServiceStub(self._channel)
        self.batch = batch_pb2_grpc.BatchServiceStub(self._channel)
        self._retry = retry or RetryPolicy()
        self._disconnect_grace_s = disconnect_grace_s
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What the next call bears; to be given to calls of `generation` and `model`."""
        return self._bearer.metadata()

    def close(self) -> None:
        """Close the channel; calls in flight end, and are not tried again."""
        self._closed = True
        self._channel.close()

    def check_open(self, error: RelayError | None = None) -> None:
        """Raise RelayError once the client was closed: what broke then was not the connection."""
        if self._closed:
            raise error or RelayError(grpc.StatusCode.CANCELLED, "the client was closed")

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Stand around a call's start. Raises RelayError where the client is closed, maybe by another thread now."""
        self.check_open()
        try:
            yield
        except ValueError:  # what a closed channel raises
            self.check_open()
            raise

    def stream(
        self,
        prompt: Prompt,
        *,
        model: str,
        time_limit_s: float | None = None,
        idempotency_key: str | None = None,
        priority: Priority | None = None,
        cache_salt: bytes = b"",
        adapter: str = "",
        **options: Unpack[GenerationOptions],
    ) -> GenerationStream:
        """Generate, and return the stream of events; nothing is sent until it is iterated."""
        request = make_stream_request(
            model,
            prompt,
            options,
            time_limit_s=time_limit_s,
            disconnect_grace_s=self._disconnect_grace_s,
            idempotency_key=idempotency_key,
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter,
        )
        return GenerationStream(self, request, StreamPosition(self._retry))

    def resume(self, generation_id: str, after_sequence: int = 0, chain_hash: bytes = b"") -> GenerationStream:
        """Return the stream of the events behind one that was received before, in this process or another."""
        position = StreamPosition(
            self._retry, generation_id=generation_id, sequence=after_sequence, chain_hash=chain_hash
        )
        return GenerationStream(self, None, position)

    def generate(
        self,
        prompt: Prompt,
        *,
        model: str,
        time_limit_s: float | None = None,
        idempotency_key: str | None = None,
        priority: Priority | None = None,
        cache_salt: bytes = b"",
        adapter: str = "",
        **options: Unpack[GenerationOptions],
    ) -> pb.Generation:
        """Generate, wait for the end, and return the whole result."""
        stream = self.stream(
            prompt,
            model=model,
            time_limit_s=time_limit_s,
            idempotency_key=idempotency_key,
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter,
            **options,
        )
        for _ in stream:
            pass
        return self.get(stream.generation_id)

    def get(self, generation_id: str) -> pb.Generation:
        """Return a generation with what it has produced so far."""
        request = pb.GetGenerationRequest(generation_id=generation_id)
        return self._retrying(lambda: self.generation.GetGeneration(request, metadata=self.metadata)).generation

    def cancel(self, generation_id: str) -> pb.GenerationState.ValueType:
        """End a generation; return the state that it is in."""
        request = pb.CancelGenerationRequest(generation_id=generation_id)
        return self._retrying(lambda: self.generation.CancelGeneration(request, metadata=self.metadata)).state

    def delete(self, generation_id: str) -> None:
        """End a generation if it runs, and erase all that is stored of it."""
        request = pb.DeleteGenerationRequest(generation_id=generation_id)
        self._retrying(lambda: self.generation.DeleteGeneration(request, metadata=self.metadata))

    @overload
    def run(self, request: epb.EmbedRequest) -> epb.EmbedResponse: ...
    @overload
    def run(self, request: cpb.ClassifyRequest) -> cpb.ClassifyResponse: ...
    @overload
    def run(self, request: cpb.ClassifyTokensRequest) -> cpb.ClassifyTokensResponse: ...
    @overload
    def run(self, request: cpb.AnswerQuestionRequest) -> cpb.AnswerQuestionResponse: ...
    @overload
    def run(self, request: cpb.RerankRequest) -> cpb.RerankResponse: ...
    def run(self, request: Any) -> Any:
        """Send a request of EmbeddingService or ClassificationService, and return its response.

        Lost replies are asked for again, with an idempotency key that is made up if the request has none. Raises
        TypeError for any other message.
        """
        service, method = method_of(request)
        call = getattr(getattr(self, service), method)
        request = keyed(request)
        return self._retrying(lambda: call(request, metadata=self.metadata))

    def models(self) -> list[model_pb2.Model]:
        """List every model that the caller may use."""
        models: list[model_pb2.Model] = []
        token = ""
        while True:
            request = model_pb2.ListModelsRequest(page_token=token)
            page = self._retrying(partial(self._list_models, request))
            models += page.models
            token = page.next_page_token
            if not token:
                return models

    def _list_models(self, request: model_pb2.ListModelsRequest) -> model_pb2.ListModelsResponse:
        return self.model.ListModels(request, metadata=self.metadata)

    def _retrying(self, call: Callable[[], _T]) -> _T:
        """Run an idempotent call until it succeeds or trying again is useless."""
        position = StreamPosition(self._retry)
        while True:
            try:
                with self.opening():
                    return call()
            except grpc.RpcError as failure:
                error = from_rpc_error(failure)
            self.check_open(error)
            time.sleep(position.on_error(error, time.monotonic()))
