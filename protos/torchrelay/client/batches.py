"""Batches by both clients: made once however often the call is repeated, results read across broken connections."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc

from torchrelay.client.errors import RelayError, from_rpc_error
from torchrelay.client.requests import Priority, make_priority
from torchrelay.client.resume import RetryPolicy
from torchrelay.v1 import batch_pb2 as pb

_FINAL = (pb.BATCH_STATE_DONE, pb.BATCH_STATE_CANCELLED)


def make_batch_header(
    *, idempotency_key: str | None = None, priority: Priority | None = None, display_name: str = ""
) -> pb.BatchHeader:
    """Build a header. Raises ValueError for an unknown priority.

    A key is made up if none is given: it is what makes a repeat after a lost reply safe.
    """
    return pb.BatchHeader(
        idempotency_key=idempotency_key or uuid.uuid4().hex,
        priority=make_priority(priority),
        display_name=display_name,
    )


def batch_requests(header: pb.BatchHeader, items: Iterable[pb.BatchItem]) -> Iterator[pb.CreateBatchRequest]:
    """Yield the messages that make a batch."""
    yield pb.CreateBatchRequest(header=header)
    for item in items:
        yield pb.CreateBatchRequest(item=item)


@dataclass(slots=True)
class ResultPosition:
    """How far the results of a batch were read: what resuming needs. Feed it every message and every failure."""

    policy: RetryPolicy
    batch_id: str
    index: int = 0
    batch: pb.Batch | None = None  # as it was told last
    rng: random.Random = field(default_factory=random.Random)
    num_resumes: int = 0
    _attempt: int = 0
    _last_news: float | None = None
    _was_answered: bool = False

    @property
    def finished(self) -> bool:
        """Whether the batch has ended and all its results were read."""
        batch = self.batch
        return batch is not None and batch.state in _FINAL and self.index >= batch.counts.total

    def on_event(self, event: pb.StreamBatchResultsResponse, now: float) -> pb.BatchResult | None:
        """Take a message; return the result in it, unless it was seen before."""
        self._last_news, self._was_answered = now, True
        if event.WhichOneof("event") == "batch":
            self.batch = event.batch
            return None
        if event.result.index <= self.index:
            return None
        self._attempt = 0
        self.index = event.result.index
        return event.result

    def on_error(self, error: RelayError, now: float) -> float:
        """Return how many seconds to wait before trying again.

        Raises the error itself if trying again is useless, or has gone on for too long.
        """
        if self._last_news is None:
            self._last_news = now
        if not error.is_resumable:
            raise error
        delay = (error.retry_delay_s or 0.0) + self.policy.delay(self._attempt, self.rng)
        patience = self.policy.give_up_after_s if self._was_answered else self.policy.first_contact_s
        if now + delay - self._last_news > patience:
            raise error
        self._attempt += 1
        self.num_resumes += 1
        return delay

    def request(self) -> pb.StreamBatchResultsRequest:
        """Return the request that goes on behind what was read."""
        return pb.StreamBatchResultsRequest(batch_id=self.batch_id, after_index=self.index)


def _ended_early() -> RelayError:
    return RelayError(grpc.StatusCode.UNAVAILABLE, "the stream ended before the batch did")


class BatchResults:
    """Results of a batch in the order of their coming, until it ends. `position` says how far it was read."""

    def __init__(self, client: BatchCalls, position: ResultPosition) -> None:
        self._client = client
        self.position = position

    def __iter__(self) -> Iterator[pb.BatchResult]:
        position, client = self.position, self._client
        while not position.finished:
            with client.opening():
                call = client.batch.StreamBatchResults(position.request(), metadata=client.metadata)
            try:
                for response in call:
                    result = position.on_event(response, time.monotonic())
                    if result is not None:
                        yield result
                if position.finished:
                    return
                error = _ended_early()
            except grpc.RpcError as failure:
                error = from_rpc_error(failure)
            finally:
                call.cancel()  # does nothing to a call that ended
            client.check_open(error)
            time.sleep(position.on_error(error, time.monotonic()))


class AsyncBatchResults:
    """As BatchResults, for the asynchronous client."""

    def __init__(self, client: AsyncBatchCalls, position: ResultPosition) -> None:
        self._client = client
        self.position = position

    async def __aiter__(self) -> AsyncIterator[pb.BatchResult]:
        position, client = self.position, self._client
        while not position.finished:
            client.check_open()
            call = client.batch.StreamBatchResults(position.request(), metadata=client.metadata)
            try:
                async for response in call:
                    result = position.on_event(response, time.monotonic())
                    if result is not None:
                        yield result
                if position.finished:
                    return
                error = _ended_early()
            except grpc.aio.AioRpcError as failure:
                error = from_rpc_error(failure)
            except asyncio.CancelledError:
                client.check_not_closed_meanwhile()
                raise
            finally:
                call.cancel()
            client.check_open(error)
            await asyncio.sleep(position.on_error(error, time.monotonic()))


class BatchCalls:
    """What the blocking client does with batches."""

    batch: Any
    metadata: Any
    check_open: Callable[..., None]
    opening: Callable[[], AbstractContextManager[None]]
    _retry: RetryPolicy
    _retrying: Callable[[Callable[[], Any]], Any]

    def create_batch(
        self,
        items: Sequence[pb.BatchItem],
        *,
        idempotency_key: str | None = None,
        priority: Priority | None = None,
        display_name: str = "",
    ) -> pb.Batch:
        """Make a batch; a call that breaks is repeated, and makes no second one."""
        header = make_batch_header(idempotency_key=idempotency_key, priority=priority, display_name=display_name)

        def call() -> Any:
            return self.batch.CreateBatch(batch_requests(header, items), metadata=self.metadata)

        batch: pb.Batch = self._retrying(call).batch
        return batch

    def get_batch(self, batch_id: str) -> pb.Batch:
        """Return a batch as it is now."""
        batch: pb.Batch = self._called("GetBatch", pb.GetBatchRequest(batch_id=batch_id)).batch
        return batch

    def cancel_batch(self, batch_id: str) -> pb.Batch:
        """End a batch; return it as it is now."""
        batch: pb.Batch = self._called("CancelBatch", pb.CancelBatchRequest(batch_id=batch_id)).batch
        return batch

    def delete_batch(self, batch_id: str) -> None:
        """End a batch if it runs, and erase all that is stored of it."""
        self._called("DeleteBatch", pb.DeleteBatchRequest(batch_id=batch_id))

    def batches(self) -> list[pb.Batch]:
        """List the tenant's batches, the latest first."""
        found: list[pb.Batch] = []
        token = ""
        while True:
            page = self._called("ListBatches", pb.ListBatchesRequest(page_token=token))
            found += page.batches
            token = page.next_page_token
            if not token:
                return found

    def batch_results(self, batch_id: str, after_index: int = 0) -> BatchResults:
        """Return the results behind an index; nothing is sent until it is iterated."""
        return BatchResults(self, ResultPosition(self._retry, batch_id, after_index))

    def _called(self, method: str, request: Any) -> Any:
        return self._retrying(lambda: getattr(self.batch, method)(request, metadata=self.metadata))


class AsyncBatchCalls:
    """What the asynchronous client does with batches."""

    batch: Any
    metadata: Any
    check_open: Callable[..., None]
    check_not_closed_meanwhile: Callable[[], None]
    _retry: RetryPolicy
    _retrying: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]

    async def create_batch(
        self,
        items: Sequence[pb.BatchItem],
        *,
        idempotency_key: str | None = None,
        priority: Priority | None = None,
        display_name: str = "",
    ) -> pb.Batch:
        """Make a batch; a call that breaks is repeated, and makes no second one."""
        header = make_batch_header(idempotency_key=idempotency_key, priority=priority, display_name=display_name)

        def call() -> Any:
            return self.batch.CreateBatch(batch_requests(header, items), metadata=self.metadata)

        batch: pb.Batch = (await self._retrying(call)).batch
        return batch

    async def get_batch(self, batch_id: str) -> pb.Batch:
        """Return a batch as it is now."""
        batch: pb.Batch = (await self._called("GetBatch", pb.GetBatchRequest(batch_id=batch_id))).batch
        return batch

    async def cancel_batch(self, batch_id: str) -> pb.Batch:
        """End a batch; return it as it is now."""
        batch: pb.Batch = (await self._called("CancelBatch", pb.CancelBatchRequest(batch_id=batch_id))).batch
        return batch

    async def delete_batch(self, batch_id: str) -> None:
        """End a batch if it runs, and erase all that is stored of it."""
        await self._called("DeleteBatch", pb.DeleteBatchRequest(batch_id=batch_id))

    async def batches(self) -> list[pb.Batch]:
        """List the tenant's batches, the latest first."""
        found: list[pb.Batch] = []
        token = ""
        while True:
            page = await self._called("ListBatches", pb.ListBatchesRequest(page_token=token))
            found += page.batches
            token = page.next_page_token
            if not token:
                return found

    def batch_results(self, batch_id: str, after_index: int = 0) -> AsyncBatchResults:
        """Return the results behind an index; nothing is sent until it is iterated."""
        return AsyncBatchResults(self, ResultPosition(self._retry, batch_id, after_index))

    async def _called(self, method: str, request: Any) -> Any:
        call = partial(getattr(self.batch, method), request)
        return await self._retrying(lambda: call(metadata=self.metadata))
