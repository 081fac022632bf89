"""BatchService: makes batches, tells of them, streams their results."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc.aio

from common import errors, keys
from common.batches import Batches, BatchRecord
from gateway import audit
from gateway.batches.creation import Maker
from gateway.batches.feeders import Feeders
from gateway.batches.items import batch_message, result_message
from gateway.batches.running import Bells
from gateway.generations import Generations
from gateway.identity.caller import current_caller
from gateway.model_servicer import page_size
from torchrelay.v1 import batch_pb2 as pb
from torchrelay.v1 import batch_pb2_grpc as pb_grpc

_LOOK_AGAIN_S: Final = 0.5  # for results that another gateway's feeder has written


class BatchServicer(pb_grpc.BatchServiceServicer):
    """Serves the batches of the caller's tenant."""

    def __init__(
        self,
        batches: Batches,
        maker: Maker,
        feeders: Feeders,
        bells: Bells,
        generations: Generations,
        *,
        progress_s: float,
    ) -> None:
        """`generations` has the places for calls; after `progress_s` of silence a stream tells of the batch."""
        self._batches = batches
        self._maker = maker
        self._feeders = feeders
        self._bells = bells
        self._generations = generations
        self._progress_s = progress_s

    async def CreateBatch(  # noqa: N802 - the method's name in the contract
        self, request_iterator: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.CreateBatchResponse:
        caller = current_caller()
        with self._generations.place(caller):
            record, replayed = await self._maker.make(request_iterator, caller)
        self._feeders.take_up()
        return pb.CreateBatchResponse(batch=batch_message(record), replayed=replayed)

    async def GetBatch(  # noqa: N802
        self, request: pb.GetBatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetBatchResponse:
        batch_id = _checked(request.batch_id)
        return pb.GetBatchResponse(batch=batch_message(await self._batches.get(current_caller().tenant, batch_id)))

    async def ListBatches(  # noqa: N802
        self, request: pb.ListBatchesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListBatchesResponse:
        size = page_size(request.page_size)
        found = await self._batches.all_of(current_caller().tenant)
        if request.page_token:
            after = _position(request.page_token)
            found = [record for record in found if (record.created_ms, record.batch_id) < after]
        page = found[:size]
        token = f"{page[-1].created_ms}.{page[-1].batch_id}" if len(found) > size else ""
        return pb.ListBatchesResponse(batches=map(batch_message, page), next_page_token=token)

    async def CancelBatch(  # noqa: N802
        self, request: pb.CancelBatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.CancelBatchResponse:
        batch_id = _checked(request.batch_id)
        record = await self._batches.cancel(current_caller().tenant, batch_id)
        return pb.CancelBatchResponse(batch=batch_message(record))

    async def DeleteBatch(  # noqa: N802
        self, request: pb.DeleteBatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DeleteBatchResponse:
        await self._batches.delete(current_caller().tenant, _checked(request.batch_id))
        return pb.DeleteBatchResponse()

    async def StreamBatchResults(  # noqa: N802
        self, request: pb.StreamBatchResultsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.StreamBatchResultsResponse]:
        caller, batch_id = current_caller(), _checked(request.batch_id)
        with self._generations.place(caller), self._bells.listening(batch_id) as news:
            index, last_sent = request.after_index, 0.0
            is_first = True
            while True:
                news.clear()
                record, results = await self._batches.results(caller.tenant, batch_id, index)
                is_last = record.state.is_final and index + len(results) >= record.num_results
                if is_first or time.monotonic() - last_sent >= self._progress_s:
                    yield _told(record)
                    is_first, last_sent = False, time.monotonic()
                for _, body in results:
                    index += 1
                    yield pb.StreamBatchResultsResponse(result=result_message(index, body))
                if results:
                    last_sent = time.monotonic()
                if is_last:
                    yield _told(record)
                    return
                if not results:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(news.wait(), _LOOK_AGAIN_S)


def _told(record: BatchRecord) -> pb.StreamBatchResultsResponse:
    return pb.StreamBatchResultsResponse(batch=batch_message(record))


def _checked(batch_id: str) -> str:
    """Return the id, for the audit log too if it may be one of ours. Raises InvalidRequest and BatchNotFound."""
    if not batch_id:
        raise errors.InvalidRequest("batch_id is required", reason="FIELD_REQUIRED", field="batch_id")
    keys.batch("", batch_id)
    audit.note(batch_id=batch_id)
    return batch_id


def _position(token: str) -> tuple[int, str]:
    created, dot, batch_id = token.partition(".")
    if not dot or not created.isdecimal():
        raise errors.InvalidRequest("is none of ours", reason="FIELD_INVALID", field="page_token")
    return int(created), batch_id
