"""Without the queue's server calls are refused, with a time to come again, until it is back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

from tests.builders_calls import Outcome
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    folder = write_tiny_model(tmp_path / "model")
    (tmp_path / "system").mkdir()
    with running_system(tmp_path / "system") as system:
        system.add_gateway(TORCHRELAY_REDIS_RETRY_DEADLINE_MS="1500")
        system.add_worker(folder, MODEL)
        asyncio.run(system.ready(MODEL))
        yield system


def request() -> pb.StreamGenerateRequest:
    return pb.StreamGenerateRequest(
        model=MODEL, input=pb.GenerationInput(text="hello"), config=pb.GenerationConfig(max_tokens=2)
    )


@pytest.mark.row(51)
async def test_without_the_server_calls_are_unavailable_until_it_is_back(system: System) -> None:
    async with system.client() as client:
        system.server.kill()
        try:
            # A key that the gateway has just verified, and one that it does not know.
            for metadata in (client.metadata, [("x-api-key", system.key)]):
                call = client.generation.StreamGenerate(request(), metadata=metadata, timeout=60)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in call:
                        pass
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                details = dict(caught.value.trailing_metadata() or ())["grpc-status-details-bin"]
                names = {
                    detail.TypeName(): detail
                    for detail in status_pb2.Status.FromString(details).details  # type: ignore[arg-type]
                }
                info = error_details_pb2.ErrorInfo()
                names["google.rpc.ErrorInfo"].Unpack(info)
                assert (info.reason, info.domain) == ("BACKEND_UNAVAILABLE", "torchrelay")
                assert "google.rpc.RetryInfo" in names
        finally:
            system.server.start()
        outcome = await Outcome(client.stream("back again", model=MODEL, max_tokens=3)).read()
        assert outcome.finished is not None
