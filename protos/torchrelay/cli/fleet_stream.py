"""Snapshots of the fleet as they come, over one stream that is opened again when its gateway goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from torchrelay.admin.v1beta1 import fleet_pb2 as pb
from torchrelay.admin.v1beta1 import fleet_pb2_grpc as pb_grpc
from torchrelay.client.errors import from_rpc_error

_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class Update:
    """A snapshot, or why there is none now."""

    snapshot: pb.FleetSnapshot | None
    note: str = ""


def request_of(model: str, interval_s: float, *, max_generations: int = 0) -> pb.WatchFleetRequest:
    """Return what to ask for; without `max_generations` no generations are told."""
    request = pb.WatchFleetRequest(model=model, include_generations=max_generations > 0, page_size=max_generations)
    request.interval.FromMilliseconds(int(interval_s * 1000))
    return request


def first(channel: grpc.Channel, model: str = "") -> pb.FleetSnapshot:
    """Return one snapshot. Raises grpc.RpcError."""
    call = pb_grpc.FleetServiceStub(channel).WatchFleet(request_of(model, 1.0))
    try:
        return next(call).snapshot
    finally:
        call.cancel()


def follow(
    channel: grpc.Channel, request: pb.WatchFleetRequest, sleep: Callable[[float], None] = time.sleep
) -> Iterator[Update]:
    """Yield snapshots for ever. Raises grpc.RpcError where the first does not come, or for another fault than a loss.

    While the gateway is away there is an update without a snapshot for each try.
    """
    stub = pb_grpc.FleetServiceStub(channel)
    has_begun = False
    while True:
        call = stub.WatchFleet(request)
        try:
            for response in call:
                has_begun = True
                yield Update(response.snapshot)
            note = "the gateway has ended the stream"
        except grpc.RpcError as error:
            failure = from_rpc_error(error)
            if not has_begun or failure.code is not grpc.StatusCode.UNAVAILABLE:
                raise
            note = failure.message if failure.reason else "the gateway does not answer"
        finally:
            call.cancel()
        yield Update(None, f"{note}; trying again")
        sleep(_PAUSE_S)
